"""One diffusion process over several resolutions: its noise levels, its loss and one reverse step.

Matryoshka Diffusion Models (Gu et al. 2024, arXiv 2310.15111), section 3. Levels are listed from the highest resolution
to the lowest. Time t counts noising steps, 0…num_steps, ᾱ_0 = 1; a network at x_t is given t − 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mdm_kernels.multires import multires_loss, multires_noise
from mdm_models.diffusion.schedule import alpha_bar_table, shifted

Time = int | Tensor
THRESHOLDS = {  # name → quantile of |x_0| that becomes the clipping bound, and the bound's largest value
    "dynamic": (0.995, 100.0),
    "dynamic_if": (0.95, 1.5),
}


class MatryoshkaDiffusion(nn.Module):
    """The noise schedule, training loss and reverse step of a nested model; it has no parameters.

    scales: each level's resolution as a multiple of the smallest, highest first, (4, 1) say; a level's signal-to-noise
    ratio is divided by scale ** shift_power. schedule: "deepfloyd", "ddpm" or "cosine". prediction: what the network
    outputs, loss_target: the space its error is measured in, each "v", "eps" or "x0". level_weights: the loss's weight
    of each level, default 1.
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
        table = alpha_bar_table(schedule, num_steps)
        table = torch.stack([shifted(table, scale**shift_power) for scale in scales]).float()
        self.register_buffer("alpha_bars", table, persistent=False)  # (levels, num_steps + 1)

    @property
    def device(self) -> torch.device:
        """Where the schedule lies, and so where `sample` runs."""
        return self.alpha_bars.device

    def alpha_bar(self, t: Time, level: int) -> Tensor:
        """ᾱ_t of a level, float32 in t's shape; t: an int or an integer tensor in 0…num_steps (else IndexError)."""
        return self.alpha_bars[level][self._checked_time(t)]

    def training_alpha_bars(self, time: Tensor) -> Tensor:
        """ᾱ of the x_t a network at `time` sees, (B,) in 0…num_steps−1 → (levels, B)."""
        if time.dim() != 1:
            raise ValueError(f"time has shape {tuple(time.shape)}; it must be (B,)")
        return self.alpha_bars[:, self._checked_time(time + 1)]

    def _checked_time(self, t: Time) -> Time:
        if isinstance(t, int):
            smallest = largest = t
        elif t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"t is {t.dtype}; it must be an integer tensor in 0…{self.num_steps}")
        elif t.device.type != "cpu" or t.numel() == 0 or torch.compiler.is_compiling():
            return t  # looking at values would stall a GPU's stream, and break a graph
        else:
            smallest, largest = t.min(), t.max()
        if smallest < 0 or largest > self.num_steps:
            raise IndexError(f"t is in {smallest}…{largest}; it must be in 0…{self.num_steps}")
        return t

    def add_noise(
        self,
        images: Tensor,
        time: Tensor,
        strides: Sequence[int | tuple[int, int]],
        noise: Sequence[Tensor] | None = None,
        *,
        seed: int | None = None,
    ) -> list[Tensor]:
        """What the network is trained on: x_t of every level, list of (B, C, H, W) or (B, C, T, H, W).

        images at full resolution; time (B,) in 0…num_steps−1; strides, noise and seed as for
        `mdm_kernels.multires.multires_noise`: one of noise and seed is given, and the loss is given the same.
        """
        return multires_noise(images, self.training_alpha_bars(time), strides, noise, seed=seed)

    def per_sample_loss(
        self,
        preds: Sequence[Tensor],
        images: Tensor,
        time: Tensor,
        noise: Sequence[Tensor] | None = None,
        *,
        seed: int | None = None,
    ) -> Tensor:
        """Weighted sum over levels of the mean squared error of `preds` → (B,) float32, differentiable in preds.

        time and noise (or seed) are what `add_noise` was given; strides follow from the shapes. In a mixed batch
        preds[i] holds the leading samples only: the others get nothing from that level, and its loss is divided by the
        fraction of the batch it has, so that the mean over the batch weighs levels alike.
        """
        if len(preds) != len(self.scales):
            raise ValueError(f"preds has {len(preds)} tensors; the process has {len(self.scales)} levels")
        batch = images.shape[0]
        rows = [pred.shape[0] for pred in preds]
        weights = [weight * batch / max(n, 1) for weight, n in zip(self.level_weights, rows, strict=True)]
        return multires_loss(
            preds,
            images,
            self.training_alpha_bars(time),
            [_stride(images, pred, f"preds[{i}]") for i, pred in enumerate(preds)],
            noise,
            seed=seed,
            prediction=self.prediction,
            loss_target=self.loss_target,
            weights=weights,
            rows=rows,
        )

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
        """One reverse step from time t to an earlier time s → (x_0 list, x_s list), float32.

        x_t, preds: one tensor a level; t > s, each an int or (B,) integers. eta None: the DDPM posterior q(x_s | x_t,
        x_0) (Ho et al. 2020, equation 7); eta in 0…1: DDIM (Song et al. 2021, equation 12), deterministic at 0. noise:
        standard normal, one tensor a level; drawn from torch's generator if None; unused by eta = 0.
        threshold: "clip" x_0 to ±1; "dynamic", divide by the 0.995 quantile of |x_0| in 1…100; "dynamic_if", by the
        0.95 quantile in 1…1.5 (Saharia et al. 2022, section 2.3), over a whole image or clip; or "none".
        """
        levels = len(self.scales)
        if not len(x_t) == len(preds) == levels:
            raise ValueError(f"x_t has {len(x_t)} and preds {len(preds)} tensors; there are {levels} levels")
        if isinstance(t, int) and isinstance(s, int) and not 0 <= s < t <= self.num_steps:
            raise ValueError(f"t is {t} and s is {s}; they must satisfy 0 ≤ s < t ≤ {self.num_steps}")
        if eta is not None and not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; it must be None or in 0…1")
        x_0, x_s = [], []
        for level, (x, pred) in enumerate(zip(x_t, preds, strict=True)):
            if x.shape != pred.shape:
                raise ValueError(f"preds[{level}] has shape {tuple(pred.shape)} and x_t[{level}] {tuple(x.shape)}")
            x, pred = x.float(), pred.float()
            alpha_bar_t, alpha_bar_s = (_beside(self.alpha_bar(time, level), x) for time in (t, s))
            x_0.append(thresholded(self._denoised(x, pred, alpha_bar_t), threshold))
            mean, deviation = _reverse(x, x_0[-1], alpha_bar_t, alpha_bar_s, eta)
            if eta != 0:
                mean = mean + deviation * (torch.randn_like(x) if noise is None else noise[level].float())
            x_s.append(mean)
        return x_0, x_s

    def _denoised(self, x: Tensor, pred: Tensor, alpha_bar: Tensor) -> Tensor:
        """The image that a prediction at x_t means."""
        if self.prediction == "v":
            return alpha_bar.sqrt() * x - (1 - alpha_bar).sqrt() * pred
        if self.prediction == "eps":
            return (x - (1 - alpha_bar).sqrt() * pred) / alpha_bar.sqrt()
        return pred


def _reverse(x: Tensor, x_0: Tensor, at_t: Tensor, at_s: Tensor, eta: float | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x_s given x_t, x_0 and the ᾱ of t and s."""
    alpha = at_t / at_s
    beta = 1 - alpha
    variance = beta * (1 - at_s) / (1 - at_t)
    if eta is None:
        mean = x_0 * (beta * at_s.sqrt() / (1 - at_t)) + x * (alpha.sqrt() * (1 - at_s) / (1 - at_t))
    else:
        variance = eta**2 * variance
        eps = (x - at_t.sqrt() * x_0) / (1 - at_t).sqrt()
        mean = at_s.sqrt() * x_0 + (1 - at_s - variance).clamp_min(0).sqrt() * eps
    return mean, variance.sqrt()


def thresholded(x_0: Tensor, threshold: str) -> Tensor:
    """x_0 held inside ±1 by one of the rules of `MatryoshkaDiffusion.step`."""
    if threshold == "none":
        return x_0
    if threshold == "clip":
        return x_0.clamp(-1, 1)
    if threshold not in THRESHOLDS:
        raise ValueError(f"threshold is {threshold!r}; it must be one of clip, {', '.join(THRESHOLDS)}, none")
    quantile, largest = THRESHOLDS[threshold]
    bound = torch.stack([torch.quantile(sample.abs().flatten(), quantile) for sample in x_0]).clamp(1, largest)
    bound = _beside(bound, x_0)
    return x_0.clamp(-bound, bound) / bound


def _beside(values: Tensor, x: Tensor) -> Tensor:
    """() or (B,) → broadcastable against x (B, …)."""
    return values if values.dim() == 0 else values.view(-1, *[1] * (x.dim() - 1))


def _stride(images: Tensor, pred: Tensor, name: str) -> tuple[int, int]:
    """(time, space) by which a level lies below the full-resolution images."""
    full, level = images.shape[2:], pred.shape[2:]
    found = f"{name} has shape {tuple(pred.shape)} beside images of {tuple(images.shape)}"
    sizes = list(zip(full, level, strict=False))
    if len(full) != len(level) or not all(small and large % small == 0 for large, small in sizes):
        raise ValueError(f"{found}; its size must divide theirs evenly")
    *time, height, width = [large // small for large, small in sizes]
    if height != width:
        raise ValueError(f"{found}; they are {height}× as high and {width}× as wide, which must be equal")
    return (time[0] if time else 1), width
