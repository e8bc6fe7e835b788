"""DDPM and DDIM sampling of every resolution at once, with classifier-free guidance."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mdm_models.diffusion.objective import MatryoshkaDiffusion

SAMPLERS = ("ddim", "ddpm")
Generators = torch.Generator | Sequence[torch.Generator] | None


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
    guidance_scale: float = 1.0,
    num_inference_steps: int = 50,
    sampler: str = "ddim",
    eta: float = 0.0,
    threshold: str = "clip",
    generator: Generators = None,
    callback: Callable[[int, int, list[Tensor]], None] | None = None,
) -> list[Tensor]:
    """Draw images or clips, one batch at every level: list of float32 tensors within ±1, highest resolution first.

    model(x, time, context, context_mask, micro) → predictions, one a level, is called without gradients, as it is (put
    it in eval mode). shapes: each level's (B, C, H, W) or (B, C, T, H, W). Everything runs where `diffusion` lies.

    context (B, S, D), context_mask (B, S) True = a token. Unless guidance_scale is 1, the model sees one doubled batch,
    negative_context (its shape) before context, and predictions are u + guidance_scale·(c − u) (Ho & Salimans 2022).
    sampler: "ddim" with its eta, or "ddpm"; threshold as for `MatryoshkaDiffusion.step`. generator: None for torch's
    own, one generator, or one a sample, when a sample does not depend on the batch around it.
    callback(i, t, x_0) is called after step i, which began at time t, with the images as predicted so far.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; it must be one of {', '.join(SAMPLERS)}")
    if len(shapes) != len(diffusion.scales) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"shapes is {shapes}; it must hold {len(diffusion.scales)} shapes, all of one batch size")
    guided = guidance_scale != 1
    if guided:
        context, context_mask = _doubled_context(context, context_mask, negative_context, negative_context_mask)
        micro = micro and {name: torch.cat([value, value]) for name, value in micro.items()}
    batch = shapes[0][0]
    times = time_grid(diffusion.num_steps, num_inference_steps)
    step_eta = eta if sampler == "ddim" else None
    x_t = [draw_noise(shape, generator, diffusion.device) for shape in shapes]
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        time = torch.full((2 * batch if guided else batch,), t - 1, device=diffusion.device)
        preds = model([torch.cat([x, x]) for x in x_t] if guided else x_t, time, context, context_mask, micro)
        if guided:
            preds = guide(preds, guidance_scale)
        noise = None if step_eta == 0 else [draw_noise(shape, generator, diffusion.device) for shape in shapes]
        x_0, x_t = diffusion.step(x_t, preds, t, s, eta=step_eta, noise=noise, threshold=threshold)
        if callback is not None:
            callback(i, t, x_0)
    return [x.clamp(-1, 1) for x in x_t]


def time_grid(num_steps: int, num_inference_steps: int) -> list[int]:
    """num_inference_steps + 1 times down to 0: multiples of (num_steps + 1) / (num_inference_steps + 1), rounded."""
    if not 1 <= num_inference_steps <= num_steps:
        raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be in 1…{num_steps}")
    spacing = (num_steps + 1) / (num_inference_steps + 1)
    return [round(i * spacing) for i in range(num_inference_steps, -1, -1)]


def guide(preds: Sequence[Tensor], guidance_scale: float) -> list[Tensor]:
    """u + guidance_scale·(c − u) at every level, in float32; (2B, …) → (B, …), preds holding u's half, then c's."""
    halves = [pred.float().chunk(2) for pred in preds]
    return [torch.lerp(unconditional, conditional, guidance_scale) for unconditional, conditional in halves]


def draw_noise(shape: Sequence[int], generator: Generators, device: torch.device) -> Tensor:
    """Standard normal noise in float32, drawn where the generator lies; a list of generators draws one sample each."""
    if generator is None:
        return torch.randn(*shape, device=device)
    if isinstance(generator, torch.Generator):
        return torch.randn(*shape, generator=generator, device=generator.device).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"generator has {len(generator)} entries; the batch has {shape[0]} samples")
    return torch.stack([draw_noise(shape[1:], one, device) for one in generator])


def _doubled_context(
    context: Tensor | None, mask: Tensor | None, negative_context: Tensor | None, negative_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """[negative, positive] along the batch, of features and of masks; a single mask missing means all tokens count."""
    if context is None or negative_context is None:
        raise ValueError("guidance_scale other than 1 needs both context and negative_context")
    if context.shape != negative_context.shape:
        raise ValueError(
            f"negative_context has shape {tuple(negative_context.shape)}; it must be context's, {tuple(context.shape)}"
        )
    masks = None
    if mask is not None or negative_mask is not None:
        everything = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        masks = torch.cat([everything if m is None else m.to(torch.bool) for m in (negative_mask, mask)])
    return torch.cat([negative_context, context]), masks
