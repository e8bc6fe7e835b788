"""The benchmark cases of multires_noise and multires_loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import mdm_kernels as mk
from benchmarks import plain
from benchmarks.case import Case, Place

NOISE_OPERATIONS = 30  # an element: a quarter of a Philox call, half a Box-Muller transform, the noising
SEED = 1


@dataclass(frozen=True)
class Levels:
    """Images (B, 3, size, size), or clips (B, 3, frames, size, size), at several (time, space) strides."""

    place: Place
    batch: int
    size: int
    strides: Sequence[tuple[int, int]]
    frames: int | None = None

    @property
    def name(self) -> str:
        """The sizes of all levels, as in "8×3×64² + 16²"."""
        frames = [f"{self.frames // time}×" if self.frames else "" for time, _ in self.strides]
        sizes = [f"{self.size // space}²" for _, space in self.strides]
        return f"{self.batch}×3×" + " + ".join(map("".join, zip(frames, sizes, strict=True)))

    @property
    def arguments(self) -> list:
        """The strides as the ops take them: of images, integers."""
        return list(self.strides) if self.frames else [space for _, space in self.strides]

    def shape(self, time: int = 1, space: int = 1) -> tuple[int, ...]:
        """Give the shape of the images at these strides in time and space."""
        frames = (self.frames // time,) if self.frames else ()
        return (self.batch, 3, *frames, self.size // space, self.size // space)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [self.shape(*stride) for stride in self.strides]

    def elements(self) -> tuple[int, int]:
        """Count the elements of the images, and those of all levels together."""
        return torch.Size(self.shape()).numel(), sum(torch.Size(shape).numel() for shape in self.shapes)

    def images(self) -> Tensor:
        """Draw images, or clips, uniform in −1…1, float32."""
        return torch.rand(self.shape(), device=self.place.device) * 2 - 1

    def alpha_bars(self) -> Tensor:
        """Draw ᾱ (levels, B), uniform in 0…1, float32."""
        return torch.rand(len(self.strides), self.batch, device=self.place.device)

    def noise(self) -> list[Tensor]:
        """Give the noise that SEED stands for: x_t where the image is 0 and so is ᾱ."""
        black = torch.zeros(self.shape(), device=self.place.device)
        with mk.use_backend("torch"):
            return mk.multires_noise(black, torch.zeros_like(self.alpha_bars()), self.arguments, seed=SEED)


def multires_noise(levels: Levels) -> Case:
    """Seeded noising; plain PyTorch has to draw the noise into memory, which it is charged with."""
    image, all_levels = levels.elements()

    def plain_noise(images, alpha_bars):
        noise = [torch.randn(shape, device=images.device) for shape in levels.shapes]
        return plain.multires_noise(images, alpha_bars, levels.arguments, noise)

    def ours(images, alpha_bars):
        return mk.multires_noise(images, alpha_bars, levels.arguments, seed=SEED)

    return Case(
        op="multires_noise, seeded",
        shape=levels.name,
        inputs=lambda: (levels.images(), levels.alpha_bars()),
        ours=ours,
        plain=plain_noise,
        oracle=ours,
        plain_is_random=True,
        forward_bytes=4 * (image + all_levels),  # float32 images
        forward_operations=NOISE_OPERATIONS * all_levels,
        sample_dims=(0, 1),
    )


def multires_loss(levels: Levels) -> Case:
    """Seeded loss of predictions in the place's dtype; plain PyTorch reads the noise that was drawn before."""
    image, all_levels = levels.elements()
    n = len(levels.strides)

    def inputs():
        preds = [levels.place.randn(*shape) for shape in levels.shapes]
        return *preds, levels.images(), levels.alpha_bars(), *levels.noise()

    def ours(*tensors):
        return mk.multires_loss(list(tensors[:n]), tensors[n], tensors[n + 1], levels.arguments, seed=SEED)

    def plain_loss(*tensors):
        return plain.multires_loss(tensors[:n], tensors[n], tensors[n + 1], levels.arguments, tensors[n + 2 :])

    preds_bytes = all_levels * levels.place.itemsize
    return Case(
        op="multires_loss, seeded",
        shape=levels.name,
        inputs=inputs,
        ours=ours,
        plain=plain_loss,
        oracle=ours,
        forward_bytes=4 * image + preds_bytes,
        backward_bytes=preds_bytes,
        forward_operations=NOISE_OPERATIONS * all_levels,
        backward_operations=2 * all_levels,
        sample_dims=(*[0] * n, 0, 1, *[0] * n),
        differentiated=n,
    )
