"""Sampling every resolution at once: `sample`, and the samplers it knows by name."""

import difflib
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mdm_models.diffusion.guidance import Condition, GuidedModel
from mdm_models.diffusion.noise import Generators, noise_for, seeded_generators
from mdm_models.diffusion.objective import MatryoshkaDiffusion, at_least_float32, check_eta, level_stride
from mdm_models.diffusion.solvers import Levels, Process, ddim, ddpm, dpmpp_2m, heun
from mdm_models.diffusion.times import check_step_count, quadratic_times, time_grid

SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "dpmpp_2m": dpmpp_2m, "heun": heun}
ON_OFFICIAL_TIMES = ("ddim", "ddpm")  # so that they draw what the official code draws
EVERYWHERE = (0.0, float("inf"))
Callback = Callable[[int, float, list[Tensor]], object]


@torch.no_grad()
def sample(
    model: Callable[..., list[Tensor]],
    diffusion: MatryoshkaDiffusion,
    shapes: Sequence[Sequence[int]],
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
    *,
    negative_context: Tensor | None = None,
    negative_context_mask: Tensor | None = None,
    micro: dict[str, Tensor] | None = None,
    guidance_scale: float | Sequence[float] = 1.0,
    guidance_interval: tuple[float, float] = EVERYWHERE,
    num_inference_steps: int = 50,
    sampler: str = "ddim",
    eta: float = 0.0,
    threshold: str = "clip",
    generator: Generators = None,
    seed: int | None = None,
    start: tuple[Tensor, float] | None = None,
    callback: Callback | None = None,
    return_levels: bool = False,
) -> Tensor | list[Tensor]:
    """Draw a batch of images or clips → (B, C, H, W) or (B, C, T, H, W) float32 within ±1.

    model(x, time, context, context_mask, micro) → predictions, one a level, is called without gradients, as it is (put
    it in eval mode). One that has a method prepare(context, context_mask, micro), such as a UNet, is called as
    model(x, time, prepared): what it makes of the text alone is computed once. Everything runs where `diffusion` lies.

    Args:
        shapes: each level's (B, C, H, W) or (B, C, T, H, W), highest resolution first.
        context, context_mask: (B, S, D) and (B, S), True = a token.
        negative_context, negative_context_mask: what guidance pushes away from, of the same shapes.
        micro: micro-conditions by name, each (B,).
        guidance_scale: w in u + w·(c − u), for all levels or one a level. Unless it is 1, the model sees one doubled
            batch, the negative context's half first.
        guidance_interval: (low, high), the times 0…num_steps at which there is guidance; at others the model sees the
            context alone, which is half the work.
        num_inference_steps: steps, 1…num_steps; each is one call of the model, two for "heun" except the last.
        sampler: "ddim" or "ddpm", which step through the official code's whole times, or "dpmpp_2m" or "heun", of
            second order, which step through real ones (`times.quadratic_times`).
        eta: 0…1, the fresh noise of "ddim".
        threshold: clip, dynamic, dynamic_if or none, as for `thresholding.thresholded`, at every call of the model.
        generator: None for torch's own, one for the batch, or one a sample, so that a sample does not depend on the
            batch around it. Or else seed: sample i draws from `noise.seeded_generators(seed, [i])`.
        start: (images within ±1 of the highest level's shape, time 1 < t ≤ num_steps) to begin from these images as
            they are at t, rather than from noise; then every sampler takes num_inference_steps real times. If the
            images are float64, so are x_t, what the model sees and what is returned.
        callback: called as callback(i, t, x_0) after step i, which began at time t, with every level's images as
            predicted at t. What it returns is not looked at.
        return_levels: return a list of all levels, not the highest alone.

    Raises ValueError if an argument is not one of these or does not fit another.
    """
    solver = _solver(sampler, eta)
    _check_shapes(shapes, diffusion)
    check_step_count(diffusion.num_steps, num_inference_steps)
    if seed is not None:
        if generator is not None:
            raise ValueError("seed and generator are both given; give one of them")
        generator = seeded_generators(seed, range(shapes[0][0]))
    scales = _level_scales(guidance_scale, len(shapes))
    condition, doubled = Condition(context, context_mask, micro), None
    if set(scales) != {1}:
        doubled = condition.beside(negative_context, negative_context_mask)
    guided_model = GuidedModel(model, condition, doubled, scales, _checked_interval(guidance_interval))

    if start is None and sampler in ON_OFFICIAL_TIMES:
        times = time_grid(diffusion.num_steps, num_inference_steps)
    else:
        begin = diffusion.num_steps if start is None else _checked_start(diffusion, *start, shapes)
        times = quadratic_times(begin, num_inference_steps)
    noise_levels = diffusion.schedule.tabulated(times)

    def denoise(x: Levels, t: float) -> Levels:
        return diffusion.denoised(x, guided_model(x, t), noise_levels[t], threshold)

    fresh = num_inference_steps if sampler == "ddpm" or eta > 0 else 0  # draws after the first
    with noise_for(shapes, generator, diffusion.device, 1 + fresh) as noise:
        x = noise() if start is None else _started(diffusion, *start, shapes, noise())
        process = Process(noise_levels.__getitem__, denoise, noise)
        for i, (t, x_0, x_s) in enumerate(solver(process, x, times)):
            x = x_s
            if callback is not None:
                callback(i, t, x_0)
    levels = [level.clamp(-1, 1) for level in x]
    return levels if return_levels else levels[0]


def _solver(sampler: str, eta: float) -> Callable:
    if sampler not in SAMPLERS:
        near = difflib.get_close_matches(sampler, SAMPLERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it must be one of {', '.join(SAMPLERS)}"
        raise ValueError(f"sampler is {sampler!r}; {hint}")
    check_eta(eta)
    if sampler == "ddim":
        return functools.partial(ddim, eta=eta)
    if eta != 0:
        raise ValueError(f"eta is {eta} with sampler {sampler!r}; only 'ddim' takes one")
    return SAMPLERS[sampler]


def _check_shapes(shapes: Sequence[Sequence[int]], diffusion: MatryoshkaDiffusion) -> None:
    if len(shapes) != len(diffusion.scales) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"shapes is {shapes}; it must hold {len(diffusion.scales)} shapes, all of one batch size")


def _level_scales(guidance_scale: float | Sequence[float], levels: int) -> list[float]:
    if isinstance(guidance_scale, str):
        raise TypeError(f"guidance_scale is {guidance_scale!r}; it must be one number, or {levels}, one a level")
    scales = [*guidance_scale] if isinstance(guidance_scale, Sequence) else [float(guidance_scale)] * levels
    if len(scales) != levels:
        raise ValueError(f"guidance_scale has {len(scales)} entries; it must be one number, or {levels}, one a level")
    if not all(0 <= scale < math.inf for scale in scales):
        raise ValueError(f"guidance_scale is {guidance_scale}; it must be 0 or more, 1 for no guidance")
    return scales


def _checked_interval(interval: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(interval, Sequence) or len(interval) != 2 or not interval[0] <= interval[1]:
        raise ValueError(f"guidance_interval is {interval}; it must be (low, high), low ≤ high")
    return interval


def _checked_start(
    diffusion: MatryoshkaDiffusion, images: Tensor, t: float, shapes: Sequence[Sequence[int]]
) -> float:
    if tuple(images.shape) != tuple(shapes[0]):
        raise ValueError(f"start has images of shape {tuple(images.shape)}; shapes[0] is {tuple(shapes[0])}")
    if not 1 < t <= diffusion.num_steps:
        raise ValueError(f"start has time {t}; it must be above 1 and at most {diffusion.num_steps}")
    return t


def _started(
    diffusion: MatryoshkaDiffusion, images: Tensor, t: float, shapes: Sequence[Sequence[int]], noise: Levels
) -> Levels:
    """Every level of the images as it is at t."""
    strides = [level_stride(shapes[0], shape, f"shapes[{i}]") for i, shape in enumerate(shapes)]
    images = at_least_float32(images).to(diffusion.device)
    time = torch.full((len(images),), t - 1, dtype=images.dtype, device=images.device)
    return diffusion.add_noise(images, time, strides, [eps.to(images.dtype) for eps in noise])
