"""The network that is trained: a UNet and, unless its text encoder is a frozen one, the text encoder with it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mdm_models.config import UNetConfig
from mdm_models.errors import CheckpointError, TrainingError, one_line
from mdm_models.pipeline import PIPELINE_FILE, Pipeline
from mdm_models.shipped import shipped_or
from mdm_models.text import TextEncoder, TransformerTextEncoder, load_text_encoder
from mdm_models.training.checkpoint import checkpoints
from mdm_models.training.config import ModelConfig
from mdm_models.unet import NestedUNet, UNet, build_model


def open_encoder(config: ModelConfig, seed: int, device: torch.device, in_bf16: bool = False) -> TextEncoder:
    """Open the text encoder that the settings name; one that is trained along begins random by `seed`. in_bf16: hold
    and compute a frozen one in bfloat16, half the memory and no cast of its weights at each step.

    Raises TrainingError.
    """
    torch.manual_seed(seed)
    try:
        if not config.text_encoder:
            return encoder_trained_along(config, seed)
        dtype = torch.bfloat16 if in_bf16 else torch.float32
        return load_text_encoder(config.text_encoder, max_tokens=config.text_tokens, dtype=dtype, device=str(device))
    except ValueError as error:
        raise TrainingError(f"text_encoder: {error}") from None


def encoder_trained_along(config: ModelConfig, seed: int) -> TransformerTextEncoder:
    """Make a text encoder to be trained, random by `seed`, on the CPU. Raises ValueError for sizes that it cannot
    have."""
    torch.manual_seed(seed)
    return TransformerTextEncoder(config.text_width, config.text_layers, max_tokens=config.text_tokens)


class CaptionedDenoiser(nn.Module):
    """A UNet that reads captions: x_t of each level, time (B,), captions of `CaptionReader.read` → predictions, one a
    level.

    A text encoder that is trained along is the submodule `text`; of a frozen one only the features come in.
    """

    def __init__(self, unet: UNet, encoder: TextEncoder | None):
        super().__init__()
        self.text = encoder if isinstance(encoder, TransformerTextEncoder) else None
        self.unet = unet

    def forward(self, x: list[Tensor], time: Tensor, captions: tuple[Tensor, ...]) -> list[Tensor]:
        return self.unet(x, time, *self.features(captions))

    def features(self, captions: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Give features (B, S, width) and mask (B, S) of captions as `CaptionReader.read` gives them."""
        features, mask = captions if self.text is None else self.text(*captions)
        return features, mask


def part_of(weights: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The weights of a part of a `CaptionedDenoiser`, "unet" or "text", by the names that they have in it."""
    return {name.removeprefix(f"{part}."): w for name, w in weights.items() if name.startswith(f"{part}.")}


class CaptionReader:
    """Turns captions into what `CaptionedDenoiser` takes: tokens (B, S) for a text encoder that is trained along,
    features (B, S, width) and their mask (B, S) from a frozen one."""

    def __init__(self, encoder: TextEncoder, device: torch.device):
        self.encoder = encoder
        self.device = device

    def read(self, captions: list[str]) -> tuple[Tensor, ...]:
        """Read B captions. Raises TrainingError for one that the encoder cannot read, such as a class that does not
        exist."""
        try:
            if isinstance(self.encoder, TransformerTextEncoder):
                return (self.encoder.tokenize(captions).to(self.device, non_blocking=True),)
            with torch.autocast(self.device.type, enabled=False):  # which would cast all its weights at each step
                features, mask = self.encoder(captions)
        except ValueError as error:
            raise TrainingError(f"captions: {error}") from None
        return features.to(self.device), mask.to(self.device)


def initial_model(
    architecture: UNetConfig, encoder: TextEncoder, seed: int, init_from: str, device: torch.device
) -> CaptionedDenoiser:
    """Make the model as a run begins: random by `seed`, and filled as far as it goes from `init_from`, unless that is
    "": the run directory of the stage before, or a saved model to go on from, by directory or name."""
    torch.manual_seed(seed)
    model = CaptionedDenoiser(build_model(architecture), encoder)
    if init_from and is_saved_model(init_from):
        _fill_from_saved(model, init_from)
    elif init_from:
        _fill(model, checkpoints.load_averages(Path(init_from)), f"init_from {init_from}")
    return model.to(device)


def is_saved_model(init_from: str) -> bool:
    """Whether `init_from` is a saved model, by directory or name, rather than a run."""
    return (shipped_or(init_from) / PIPELINE_FILE).is_file()


def _fill_from_saved(model: CaptionedDenoiser, init_from: str) -> None:
    """Fill the UNet, or one nested in it, and the text encoder that is trained along, with a saved pipeline's."""
    try:
        saved = Pipeline.from_pretrained(init_from, dtype=torch.float32)
        if model.text is not None and isinstance(saved.text_encoder, TransformerTextEncoder):
            model.text.take_over(saved.text_encoder)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"init_from {init_from}: {one_line(error)}") from None
    fitting = [unet for unet in (model.unet, *_nested_in(model.unet)) if unet.config == saved.model.config]
    if not fitting:
        raise CheckpointError(f"init_from {init_from}: it is neither this model nor one nested in this one")
    fitting[0].load_state_dict(saved.model.state_dict())


def _nested_in(unet: UNet) -> Iterator[UNet]:
    """The UNets inside this one, outermost first."""
    while isinstance(unet, NestedUNet):
        unet = unet.inner
        yield unet


def _fill(model: CaptionedDenoiser, averages: Mapping[str, Tensor], origin: str) -> None:
    """Fill a nested UNet, the outermost that fits, and the text encoder that is trained along, every weight of both."""
    nested = list(_nested_in(model.unet))
    if not nested:
        raise CheckpointError(f"{origin}: this model has no nested UNet to fill")
    filling = part_of(averages, "unet")
    modules: dict[str, nn.Module] = {"unet": next((unet for unet in nested if not _misfit(filling, unet)), nested[0])}
    if model.text is not None:
        modules["text"] = model.text
    for part, module in modules.items():
        own = part_of(averages, part)
        if misfit := _misfit(own, module):
            raise CheckpointError(
                f"{origin}: its {part} does not fit: {misfit}; give the run of a model that is nested in this one, "
                "trained with the same text encoder"
            )
        module.load_state_dict(own)


def _misfit(own: Mapping[str, Tensor], module: nn.Module) -> str:
    """The first weight that only one of both has, or of another shape; "" if there is none."""
    needed = module.state_dict()
    for name in sorted(own.keys() | needed.keys()):
        there, here = (list(some[name].shape) if name in some else "missing" for some in (own, needed))
        if there != here:
            return f"{name} is {there} there, {here} here"
    return ""
