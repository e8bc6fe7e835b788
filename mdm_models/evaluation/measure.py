"""All that is measured of a model on held-out samples, in one pass over them."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from tqdm import tqdm

from mdm_models.data.held_out import HeldOut, HeldOutBatch
from mdm_models.data.stream import to_unit_range
from mdm_models.diffusion.noise import seeded_generators
from mdm_models.errors import DataError
from mdm_models.evaluation.comparison import Comparison
from mdm_models.evaluation.kept import KeptSamples
from mdm_models.evaluation.validation_loss import level_losses
from mdm_models.pictures import to_pixels
from mdm_models.pipeline import Pipeline
from mdm_models.processes import Processes


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn; a sample follows from the seed and its number, whatever the batch around it; but a
    model that looks at the padding of shorter prompts, as the official ones, sees how long its longest prompt is."""

    seed: int
    num_inference_steps: int
    sampler: str
    guidance_scale: float | None = None  # None: the pipeline's


def measure(
    pipeline: Pipeline,
    held_out: HeldOut,
    comparison: Comparison,
    processes: Processes,
    workers: int,
    sampling: Sampling,
    kept: KeptSamples | None = None,
) -> dict[str, float]:
    """Measure numbers by name, the same on all ranks, all of which call this; see `mdm evaluate --help` for what they
    are. All call the pipeline equally often, unless samples are kept.

    workers: processes that decode; kept: where samples are that were drawn before, and where others go. Raises
    DataError, on all ranks, if too few of the samples can be used or if one rank cannot read its share.
    """
    total, count = torch.zeros(len(pipeline.shapes), dtype=torch.float64, device=processes.device), 0
    with tqdm(
        total=len(held_out.numbers) * processes.world_size, desc="evaluating", unit=" samples",
        dynamic_ncols=True, leave=False, disable=not processes.is_main,
    ) as bar:  # fmt: skip
        for batch in _together(held_out.batches(workers), processes):
            pixels, rows = batch.images.to(processes.device), batch.rows
            prompts = batch.prompts if pipeline.text_encoder is not None else [""] * len(batch.prompts)
            losses = level_losses(pipeline, to_unit_range(pixels), prompts, batch.numbers, sampling.seed)
            total += losses[:, rows].double().sum(dim=1)
            count += len(rows)
            if comparison.needs_samples or kept:
                captions, numbers = [batch.captions[row] for row in rows], [batch.numbers[row] for row in rows]
                sampled = kept.load(numbers) if kept else None
                if sampled is None:
                    sampled = _sampled(pipeline, prompts, batch.numbers, sampling)[rows]
                    if kept:
                        kept.save(numbers, sampled, captions)
                comparison.add(pixels[rows], _as_pixels(sampled.to(processes.device)), captions)
            bar.update(len(batch.numbers) * processes.world_size)
    shares = processes.mean(torch.cat([total.new_tensor([count]), total]))
    count = round(shares[0].item() * processes.world_size)
    _check_enough(count, 2 if comparison.frechet is not None else 1, held_out)
    losses = (shares[1:] / shares[0]).tolist()
    by_level = {f"validation_loss_{level}": loss for level, loss in enumerate(losses)}
    return {"evaluated_samples": count, "validation_loss": sum(losses), **by_level, **comparison.results()}


def _together(batches: Iterator[HeldOutBatch], processes: Processes) -> Iterator[HeldOutBatch]:
    """The same; where one cannot be had on one rank, as its decoding process was killed, all of them raise why."""
    while True:
        found = []
        processes.agree(lambda found=found: found.extend(itertools.islice(batches, 1)))
        if not found:
            return
        yield found[0]


def _sampled(pipeline: Pipeline, prompts: list[str], numbers: Sequence[int], sampling: Sampling) -> Tensor:
    """→ (B, 3, H, W) or (B, 3, T, H, W) in −1…1."""
    samples = pipeline(
        prompts,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        sampler=sampling.sampler,
        generator=seeded_generators(sampling.seed, numbers),
        output_type="pt",
        progress=False,
    )
    return cast(Tensor, samples)


def _check_enough(count: int, least: int, held_out: HeldOut) -> None:
    """Raises DataError, with the reason of one sample that cannot be used, if too few can."""
    if count < least:
        skip = held_out.a_skip()
        why = f": {skip}" if skip else ""
        raise DataError(f"evaluation: {count} of the held-out samples can be used; at least {least} are needed{why}")


def _as_pixels(images: Tensor) -> Tensor:
    """−1…1 → uint8 of the same shape, rounded as in a picture that is saved."""
    return torch.from_numpy(to_pixels(images)).movedim(-1, 1).to(images.device)
