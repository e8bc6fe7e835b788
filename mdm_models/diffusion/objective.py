"""One diffusion process over several resolutions: its noise, its loss and one reverse step.

Matryoshka Diffusion Models (Gu et al. 2024, arXiv 2310.15111), section 3. Levels are listed from the highest resolution
to the lowest and share the time t; a network at x_t is given t − 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mdm_kernels.multires import multires_loss, multires_noise
from mdm_models.diffusion.schedule import NoiseLevel, NoiseSchedule, Time
from mdm_models.diffusion.solvers import ddim_step, ddpm_step, flow_step
from mdm_models.diffusion.thresholding import thresholded


class MatryoshkaDiffusion(nn.Module):
    """The noise schedule, training loss and reverse step of a nested model; it has no parameters.

    scales: each level's resolution as a multiple of the smallest, highest first, (4, 1) say; a level's signal-to-noise
    ratio is divided by scale ** shift_power. schedule: "deepfloyd", "ddpm" or "cosine". prediction: what the network
    outputs, loss_target: the space its error is measured in, each "v", "eps" or "x0"; an error in one is an error in
    another times a factor of ᾱ (`mdm_kernels.multires.reference.loss_factor`). level_weights: the weight of each level
    in the loss, default 1.
    """

    def __init__(
        self,
        scales: Sequence[float],
        shift_power: float = 1,
        schedule: str = "deepfloyd",
        num_steps: int = 1000,
        prediction: str = "v",
        loss_target: str = "eps",
        level_weights: Sequence[float] | None = None,
    ):
        super().__init__()
        if len(scales) == 0 or not all(scale > 0 for scale in scales):
            raise ValueError(f"scales is {tuple(scales)}; it must hold one positive number a level")
        for name, value in (("prediction", prediction), ("loss_target", loss_target)):
            if value not in ("v", "eps", "x0"):
                raise ValueError(f"{name} is {value!r}; it must be one of v, eps, x0")
        weights = [1.0] * len(scales) if level_weights is None else list(level_weights)
        if len(weights) != len(scales):
            raise ValueError(f"level_weights has {len(weights)} entries; scales has {len(scales)}")
        self.scales = tuple(scales)
        self.num_steps = num_steps
        self.prediction = prediction
        self.loss_target = loss_target
        self.level_weights = weights
        self.schedule = NoiseSchedule(schedule, num_steps, scales, shift_power)

    @property
    def device(self) -> torch.device:
        """Where the schedule lies, and so where `sample` runs."""
        return self.schedule.log_alpha_bars.device

    def alpha_bar(self, t: Time, level: int) -> Tensor:
        """Give ᾱ_t of a level, float32 in t's shape; t: a number or a tensor, whole or real, in 0…num_steps (else
        ValueError)."""
        return self.schedule.alpha_bars(t)[level]

    def training_alpha_bars(self, time: Tensor) -> Tensor:
        """Give ᾱ of the x_t that a network at `time` sees, (B,) in 0…num_steps−1 → (levels, B)."""
        if time.dim() != 1:
            raise ValueError(f"time has shape {tuple(time.shape)}; it must be (B,)")
        return self.schedule.alpha_bars(time + 1)

    def add_noise(
        self,
        images: Tensor,
        time: Tensor,
        strides: Sequence[int | tuple[int, int]],
        noise: Sequence[Tensor] | None = None,
        *,
        seed: int | Tensor | None = None,
    ) -> list[Tensor]:
        """Give what the network is trained on: x_t of every level, list of (B, C, H, W) or (B, C, T, H, W).

        images at full resolution; time (B,) in 0…num_steps−1, whole or real (drawn by `times`); strides, noise and seed
        as for `mdm_kernels.multires.multires_noise`: one of noise and seed is given, and the loss is given the same.
        """
        return multires_noise(images, self.training_alpha_bars(time), strides, noise, seed=seed)

    def per_sample_loss(
        self,
        preds: Sequence[Tensor],
        images: Tensor,
        time: Tensor,
        noise: Sequence[Tensor] | None = None,
        *,
        seed: int | Tensor | None = None,
        per_level: bool = False,
    ) -> Tensor:
        """Give the weighted sum over levels of the mean squared error of `preds` → (B,) float32, differentiable in
        preds; with per_level what is summed, before the weights: (levels, B).

        time and noise (or seed) are what `add_noise` was given; strides follow from the shapes. In a mixed batch
        preds[i] holds the leading samples only: the others get nothing from that level, and its loss is divided by the
        fraction of the batch it has, so that the mean over the batch weighs levels alike.
        """
        if len(preds) != len(self.scales):
            raise ValueError(f"preds has {len(preds)} tensors; the process has {len(self.scales)} levels")
        batch = images.shape[0]
        rows = [pred.shape[0] for pred in preds]
        level_weights = [1.0] * len(rows) if per_level else self.level_weights
        weights = [weight * batch / max(n, 1) for weight, n in zip(level_weights, rows, strict=True)]
        return multires_loss(
            preds,
            images,
            self.training_alpha_bars(time),
            [level_stride(images.shape, pred.shape, f"preds[{i}]") for i, pred in enumerate(preds)],
            noise,
            seed=seed,
            prediction=self.prediction,
            loss_target=self.loss_target,
            weights=weights,
            rows=rows,
            per_level=per_level,
        )

    def denoised(
        self, x_t: Sequence[Tensor], preds: Sequence[Tensor], at_t: Sequence[NoiseLevel], threshold: str
    ) -> list[Tensor]:
        """Give the images x_0 that predictions at x_t mean, float32 or x_t's float64, held inside ±1 by
        `thresholding.thresholded`. at_t: what x_t is made of at each level, as numbers that broadcast against it."""
        if not len(x_t) == len(preds) == len(self.scales):
            raise ValueError(f"x_t has {len(x_t)} and preds {len(preds)} tensors; there are {len(self.scales)} levels")
        x_0 = []
        for i, (x, pred, at) in enumerate(zip(x_t, preds, at_t, strict=True)):
            if x.shape != pred.shape:
                raise ValueError(f"preds[{i}] has shape {tuple(pred.shape)} and x_t[{i}] {tuple(x.shape)}")
            x = at_least_float32(x)
            x_0.append(thresholded(self._meaning(x, pred.to(x.dtype), at), threshold))
        return x_0

    def _meaning(self, x: Tensor, pred: Tensor, at_t: NoiseLevel) -> Tensor:
        if self.prediction == "v":
            return at_t.alpha * x - at_t.sigma * pred
        if self.prediction == "eps":
            return (x - at_t.sigma * pred) / at_t.alpha
        return pred

    def _noise_beside(self, x: Sequence[Tensor], t: Time) -> list[NoiseLevel]:
        """What each level is made of at t, a number or (B,), as numbers that broadcast against x (B, …)."""
        if isinstance(t, Tensor) and t.dim() > 0:
            t = t.view(-1, *[1] * (x[0].dim() - 1))
        return self.schedule.noise_levels(t)

    def step(
        self,
        x_t: Sequence[Tensor],
        preds: Sequence[Tensor],
        t: Time,
        s: Time,
        *,
        eta: float | None = None,
        noise: Sequence[Tensor] | None = None,
        threshold: str = "clip",
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Take one reverse step from time t to an earlier time s → (x_0 list, x_s list), float32 or x_t's float64.

        x_t, preds: one tensor a level; t > s, each a number or (B,). eta None: a DDPM step; eta in 0…1: a DDIM step,
        deterministic at 0 (`solvers.ddpm_step`, `solvers.ddim_step`). noise: standard normal, one tensor a level; drawn
        from torch's generator if None; unused by eta = 0. threshold: clip, dynamic, dynamic_if or none, as for
        `thresholding.thresholded`.
        """
        if not isinstance(t, Tensor) and not isinstance(s, Tensor) and not 0 <= s < t <= self.num_steps:
            raise ValueError(f"t is {t} and s is {s}; they must satisfy 0 ≤ s < t ≤ {self.num_steps}")
        check_eta(eta)
        at_t, at_s = self._noise_beside(x_t, t), self._noise_beside(x_t, s)
        x_0 = self.denoised(x_t, preds, at_t, threshold)
        x_t = [at_least_float32(x) for x in x_t]
        if eta == 0:
            return x_0, [flow_step(*level) for level in zip(x_t, x_0, at_t, at_s, strict=True)]
        noise = [torch.randn_like(x) for x in x_t] if noise is None else noise
        levels = zip(x_t, x_0, at_t, at_s, noise, strict=True)
        if eta is None:
            return x_0, [ddpm_step(*level) for level in levels]
        return x_0, [ddim_step(x, y, at, to, eta, eps) for x, y, at, to, eps in levels]


def check_eta(eta: float | None) -> None:
    """Raise ValueError unless eta is None or in 0…1."""
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must be None or in 0…1")


def at_least_float32(x: Tensor) -> Tensor:
    """Keep float64, make float32 of every other dtype: what samples are kept in, whatever the network computes in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def level_stride(full: Sequence[int], level: Sequence[int], name: str) -> tuple[int, int]:
    """Give (time, space) by which a level of a shape (B, C, …) lies below the highest. Raises ValueError, which calls
    the level `name`, unless its sizes divide the highest's, height and width by one number."""
    found = f"{name} has shape {tuple(level)} beside images of {tuple(full)}"
    sizes = list(zip(full[2:], level[2:], strict=False))
    if len(full) != len(level) or not all(small and large % small == 0 for large, small in sizes):
        raise ValueError(f"{found}; its size must divide theirs evenly")
    *time, height, width = [large // small for large, small in sizes]
    if height != width:
        raise ValueError(f"{found}; they are {height}× as high and {width}× as wide, which must be equal")
    return (time[0] if time else 1), width
