"""What a training run is told."""

from dataclasses import dataclass
from typing import Literal

from mdm_models.config import UNetConfig
from mdm_models.training.errors import TrainingError
from mdm_models.zoo import model_config


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Running with the same `out` again continues it.

    Order of samples, noise, times and dropout depend on `seed`, the step and the rank alone. Defaults are those of
    Gu et al., "Matryoshka Diffusion Models" (ICLR 2024, appendix) where the paper gives them.
    """

    data: tuple[str, ...]  # shards of captioned clips or images: .tar files, folders of them, patterns a-{000..099}.tar
    out: str  # run directory: checkpoints, log.jsonl, TensorBoard events, sampled clips

    model: str = "mdm_t2v_tiny"  # name of the model, see mdm_models.list_models()
    frames: int = 8  # frames of a clip; 1 for an image model
    size: int = 32  # height and width in pixels; clips are cropped to their central square
    frame_rate: float = 8.0  # frames per second at which clips are sampled
    text_width: int = 64  # width of the text encoder, which is trained along
    text_layers: int = 2  # transformer layers of the text encoder
    text_tokens: int = 32  # longest caption, in tokens with start and end

    batch_size: int = 8  # samples per process and step
    steps: int = 1000  # optimizer steps of the whole run
    lr: float = 1e-4  # Adam's learning rate after the warm-up
    warmup: int = 30_000  # steps over which the learning rate rises from 0
    beta1: float = 0.9  # Adam's β₁
    beta2: float = 0.99  # Adam's β₂
    eps: float = 1e-8  # Adam's ε
    clip: float = 2.0  # largest norm of the whole gradient
    ema_decay: float = 0.9999  # decay of the averaged weights that clips are sampled with
    caption_dropout: float = 0.1  # share of samples trained without their caption, for guidance
    shift_power: float = 1.0  # a level of resolution ratio s has its signal-to-noise ratio divided by s to this power
    level_weights: tuple[float, ...] = ()  # weight of each level's loss, highest resolution first; empty: all 1
    precision: Literal["auto", "bf16", "float32"] = "auto"  # auto: bf16 autocast on a GPU, float32 on a CPU
    init_from: str = ""  # run directory of the stage before: its averaged weights fill the nested model

    holdout: int = 1000  # one sample in so many is held out of training, for validation; 0: none
    log_every: int = 10  # steps between two records in the log
    save_every: int = 1000  # steps between two checkpoints; one is also saved at the end
    keep: int = 3  # checkpoints that are kept
    sample_every: int = 1000  # steps between two grids of sampled clips; one is also drawn at the end; 0: none
    sample_count: int = 4  # clips in a grid
    sample_steps: int = 50  # DDIM steps for a grid
    guidance_scale: float = 3.0  # classifier-free guidance for a grid
    max_bad_steps: int = 20  # steps in a row with a loss that is not finite before the run gives up

    seed: int = 0  # of everything random
    workers: int = 4  # processes that decode, per training process; 0: decode in the training process
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one

    def __post_init__(self):
        for name in ("frames", "size", "frame_rate", "text_layers", "batch_size", "steps", "lr", "clip", "log_every",
                     "save_every", "keep", "sample_count", "sample_steps", "max_bad_steps"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("warmup", "holdout", "sample_every", "workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("beta1", "beta2", "ema_decay", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")


@dataclass(frozen=True)
class Plan:
    """The model of a run, and the shape of one sample at each of its levels, highest resolution first:
    (C, H, W) of an image, (C, T, H, W) of a clip."""

    architecture: UNetConfig
    shapes: list[tuple[int, ...]]


def plan(config: TrainConfig, architecture: UNetConfig | None = None) -> Plan:
    """Check that the settings fit the model, `architecture` or else the one that `config.model` names.

    Raises TrainingError where they do not.
    """
    try:
        model = architecture or model_config(config.model, context_dim=config.text_width)
    except ValueError as error:
        raise TrainingError(f"model: {error}") from None
    time, _ = model.strides[-1]
    if config.frames != time:  # the innermost UNet sees one frame
        raise TrainingError(f"frames is {config.frames}; {config.model} works on {time}")
    if len(config.level_weights) not in (0, len(model.levels)):
        raise TrainingError(f"level_weights is {config.level_weights}; {config.model} has {len(model.levels)} levels")
    try:
        return Plan(model, model.sample_shapes(config.size))
    except ValueError as error:
        raise TrainingError(f"{error} ({config.model})") from None
