"""A run's averaged weights as a pipeline: those that it left, or those of its newest checkpoint while it goes on."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mdm_models.config import UNetConfig
from mdm_models.pipeline import Pipeline, PipelineConfig, model_directory
from mdm_models.pretrained import fitting_model
from mdm_models.text import PrecomputedText, TextEncoder, TransformerTextEncoder
from mdm_models.training.checkpoint.checkpoints import list_steps, load_averages
from mdm_models.training.config import TrainConfig, plan
from mdm_models.training.denoiser import encoder_trained_along, open_encoder, part_of
from mdm_models.training.ema.snapshots import reconstruct
from mdm_models.training.settings import read_settings
from mdm_models.unet import empty_model


def pipeline_of(
    config: TrainConfig, architecture: UNetConfig, encoder: TextEncoder, weights: Mapping[str, Tensor]
) -> Pipeline:
    """Make the pipeline of a run. weights: those of the whole model, by name, on the CPU."""
    unet = empty_model(architecture)
    unet.load_state_dict(part_of(weights, "unet"), assign=True)
    if isinstance(encoder, TransformerTextEncoder):  # its own tensors may be spread over processes
        encoder = encoder_trained_along(config.model, config.system.seed)
        encoder.load_state_dict(part_of(weights, "text"))
    return Pipeline(unet, encoder, pipeline_config(config, encoder))


def pipeline_config(config: TrainConfig, encoder: TextEncoder) -> PipelineConfig:
    """Give what a run's pipeline is to know of its settings; the path of a text encoder is made absolute."""
    named = config.model.text_encoder
    if isinstance(encoder, PrecomputedText):
        named = encoder.identity.name  # what the features came from, which takes any prompt
    elif named and Path(named).exists():
        named = str(Path(named).resolve())
    return PipelineConfig(
        size=config.data.size,
        text_encoder=named,
        max_tokens=encoder.max_tokens,
        shift_power=config.objective.shift_power,
        unshifted_size=config.objective.unshifted_size,
        prediction=config.objective.prediction,
        loss_target=config.objective.loss_target,
        guidance_scale=config.output.guidance_scale,
        sampler=config.output.sampler,
        num_inference_steps=config.output.sample_steps,
        frame_rate=config.data.frame_rate,
    )


def open_pipeline(given: Path) -> Pipeline:
    """Open a pipeline in float32 on the CPU: a saved model, by directory or name, or that of a run, its newest
    checkpoint's if it has left none yet. Raises FileNotFoundError, ValueError, TypeError or TrainingError in one
    line."""
    if (given / "model").exists() or not list_steps(given) or (config := read_settings(given)) is None:
        return Pipeline.from_pretrained(model_directory(given), dtype=torch.float32)
    encoder = open_encoder(config.model, config.system.seed, torch.device("cpu"))
    return pipeline_of(config, plan(config, None, encoder.width).architecture, encoder, load_averages(given))


def take_average(pipeline: Pipeline, run: Path, std: float, with_text: bool = True) -> None:
    """Put the average of width `std` at the run's last snapshot in the place of the weights of a pipeline.

    with_text: also of its text encoder, if this was trained along. Raises CheckpointError if the run has no snapshots,
    ValueError if they are of another model or no average has that width.
    """
    weights, _ = reconstruct(run, std)
    unet = part_of(weights, "unet")
    fitting_model(pipeline.model.config, unet, run / "averages")
    pipeline.model.load_state_dict(unet)
    if with_text and isinstance(pipeline.text_encoder, TransformerTextEncoder):
        pipeline.text_encoder.load_state_dict(part_of(weights, "text"))
