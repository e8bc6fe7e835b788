"""What a training run is told: one frozen dataclass a subject, all of them in `TrainConfig`.

Every field has a name of its own, so that on the command line it is `--lr`, not `--optimizer.lr`. Defaults are those of
Gu et al., "Matryoshka Diffusion Models" (ICLR 2024, appendix) where the paper gives them.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from mdm_models import private_torch
from mdm_models.config import UNetConfig
from mdm_models.data.config import DataConfig, check, check_above_0, check_finite, check_not_negative, check_share
from mdm_models.errors import TrainingError
from mdm_models.zoo import model_config


@dataclass(frozen=True)
class ModelConfig:
    """The network and what reads the captions for it."""

    model: str = "mdm_t2v_tiny"
    """name of the model, see mdm_models.list_models()"""
    text_encoder: str = ""
    """a frozen text encoder: a directory or hub id (T5, CLIP, BERT, …), a file of class names or classes:1000, or a
    folder of features that `mdm precompute` wrote; empty: a small transformer that is trained along"""
    text_width: int = 64
    """width of the text encoder that is trained along"""
    text_layers: int = 2
    """its transformer layers"""
    text_tokens: int = 32
    """longest caption of any encoder, in tokens"""
    caption_dropout: float = 0.1
    """share of samples trained without their caption, for guidance"""
    init_from: str = ""
    """run directory of the stage before: its averaged weights fill the nested model; or a saved model, by directory or
    name, of this very architecture or the nested one: training goes on from it; or the URL of one of the two, of a run
    that has left its model"""

    def __post_init__(self):
        check_above_0(self, "text_width", "text_layers", "text_tokens")
        check_share(self, "caption_dropout")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The diffusion process and its loss."""

    shift_power: float = 1.0
    """a level of resolution ratio s to the innermost has its signal-to-noise ratio divided by s to this power"""
    unshifted_size: int = 0
    """the size in pixels to which these ratios are taken, whose noise schedule is as it stands; 0: the innermost
    level's"""
    level_weights: tuple[float, ...] = ()
    """weight of each level's loss, highest resolution first; empty: all 1"""
    level_shares: tuple[float, ...] = ()
    """share of each batch that is trained at each level, highest resolution first and rising to 1; empty: all 1"""
    times: Literal["discrete", "continuous", "logit_normal"] = "discrete"
    """how noise levels are drawn: the paper's 1000 whole times, real times, or real times of logit-normal density"""
    times_mean: float = 0.0
    """of logit_normal, the mean of the times' logit: above 0 for more noise, where small pictures are decided"""
    times_deviation: float = 1.0
    """of logit_normal, the standard deviation of the times' logit"""
    prediction: Literal["v", "eps", "x0"] = "v"
    """what the network predicts"""
    loss_target: Literal["eps", "v", "x0"] = "eps"
    """the space in which its error is measured"""

    def __post_init__(self):
        check_not_negative(self, "unshifted_size")
        check_above_0(self, "times_deviation")
        check_finite(self, "shift_power", "times_mean", "level_weights")
        shares = self.level_shares
        if shares and (shares[0] <= 0 or list(shares) != sorted(shares) or shares[-1] != 1):
            raise ValueError(f"level_shares is {shares}; they must be above 0 and rise to 1, the innermost level's")

    def level_rows(self, count: int, levels: int) -> list[int]:
        """How many of `count` samples are trained at each of the levels, always the first ones; at least one."""
        return [max(1, round(share * count)) for share in self.level_shares or [1.0] * levels]


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam, its schedule, and the averages of the weights."""

    batch_size: int = 8
    """samples in one optimizer step, over all processes"""
    micro_batch: int = 0
    """samples that go through a process at once; the rest of its share follows before the optimizer steps; 0: all of
    it"""
    steps: int = 1000
    """optimizer steps of the whole run"""
    lr: float = 1e-4
    """learning rate after the warm-up"""
    warmup: int = 30_000
    """steps over which the learning rate rises from 0"""
    cooldown: int = 0
    """last steps of the run over which the learning rate falls to 0; with 0 it stays to the end"""
    beta1: float = 0.9
    """Adam's β₁"""
    beta2: float = 0.99
    """Adam's β₂"""
    eps: float = 1e-8
    """Adam's ε"""
    clip: float = 2.0
    """largest norm of the whole gradient"""
    max_bad_steps: int = 20
    """steps in a row with a loss or gradient that is not finite before the run gives up"""
    ema_decay: float = 0.9999
    """decay of the averaged weights, which are what is sampled, evaluated and kept at the end"""
    ema_stds: tuple[float, ...] = ()
    """widths of power-function averages, as shares of the run, (0.05, 0.1) say, in place of the constant decay; from
    their snapshots `mdm ema` makes the averages of any other width afterwards"""
    ema_snapshot_every: int = 5_000
    """steps between two snapshots of power-function averages"""

    def __post_init__(self):
        check_above_0(self, "batch_size", "steps", "lr", "max_bad_steps", "ema_snapshot_every")
        check(self, ["clip"], lambda norm: norm > 0, "be above 0")
        check_not_negative(self, "micro_batch", "warmup", "cooldown", "eps")
        check_share(self, "beta1", "beta2", "ema_decay")
        if not all(0 < std < 0.28 for std in self.ema_stds):  # beyond 1/√12 no power function has that width
            raise ValueError(f"ema_stds is {self.ema_stds}; each must lie between 0 and 0.28")


@dataclass(frozen=True)
class SystemConfig:
    """Where and how it is computed; but for the seed, none of it changes what is learned, rounding apart."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one"""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """auto: bf16 autocast on a GPU, and on a CPU with units for it, AMX or avx512_bf16, where products and convolutions
    run 2 to 8 times as fast as in float32; without them, where they run slower, float32"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """of several processes each holds all weights (ddp), or a part of them (fsdp), which saves memory"""
    checkpoint_activations: bool = False
    """compute residual and attention blocks again in the backward pass instead of keeping their insides"""
    compile: bool = False
    """torch.compile the UNet, for minutes as training starts; each of its blocks by itself with FSDP or
    checkpoint_activations"""
    cuda_graphs: bool = False
    """capture the network's passes once, as CUDA graphs, and replay them at each step: for a small network on one GPU,
    which otherwise waits for Python; with one process and the whole batch at once, and not on a CPU"""
    channels_last: bool = True
    """keep images with their channels innermost in memory"""
    deterministic: bool = False
    """refuse operations whose results vary from run to run, at a cost in speed on a GPU"""
    seed: int = 0
    """of everything random"""
    accept_changes: bool = False
    """go on from a checkpoint with other data or settings than those that led to it, which is refused otherwise"""
    patience: float = 300.0
    """seconds after which all processes of a run end because one of them is silent, killed or cut off; 0: they wait
    half an hour for it"""

    def __post_init__(self):
        check_not_negative(self, "seed", "patience")

    def uses_bf16(self, device: str) -> bool:
        """Whether a device of that type, "cpu" or "cuda", computes in bfloat16."""
        if self.precision == "auto":
            return device == "cuda" or private_torch.cpu_multiplies_bf16()
        return self.precision == "bf16"


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on the samples held out of training, with the averaged weights."""

    evaluate_every: int = 0
    """steps between two evaluations; one also takes place at the end; 0: none"""
    evaluate_samples: int = 1000
    """samples in an evaluation, at most as many as are held out"""
    feature_extractor: str = ""
    """network whose features the Fréchet distance compares: see `mdm evaluate --help`; empty: no Fréchet distance"""
    clip_model: str = ""
    """open_clip model of the CLIP score, a directory or hub id; empty: no CLIP score"""

    def __post_init__(self):
        check_not_negative(self, "evaluate_every")
        check_above_0(self, "evaluate_samples")


@dataclass(frozen=True)
class OutputConfig:
    """What a run writes down, and when."""

    log_every: int = 10
    """steps between two records in the log"""
    save_every: int = 1000
    """steps between two checkpoints; one is also saved at the end"""
    keep: int = 3
    """checkpoints that are kept"""
    sample_every: int = 1000
    """steps between two grids of samples; one is also drawn at the end; 0: none"""
    sample_count: int = 4
    """samples in a grid"""
    sampler: Literal["ddim", "ddpm", "dpmpp_2m", "heun"] = "ddim"
    """how samples are drawn, in grids and evaluations"""
    sample_steps: int = 50
    """steps of a sample, in grids and evaluations"""
    guidance_scale: float = 3.0
    """classifier-free guidance of a sample, in grids and evaluations"""
    wandb: str = ""
    """project of Weights & Biases to log to as well; empty: none"""
    prometheus: str = ""
    """file *.prom in which to keep step, loss and speed for Prometheus, by node_exporter's textfile collector; empty:
    none, RUN/heartbeat.json has the same"""
    profile: bool = False
    """write a trace of steps 6 to 8 of this run to RUN/profile, for chrome://tracing or Perfetto"""

    def __post_init__(self):
        check_above_0(self, "log_every", "save_every", "keep", "sample_count", "sample_steps")
        check_not_negative(self, "sample_every", "guidance_scale")


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Running with the same `out` again continues it.

    Order of samples and times depend on the seed and on the sample's place in the run alone; noise and dropout also on
    how many samples go through a process at once: to change the number of processes, and nothing else, set micro_batch.
    """

    out: str
    """run directory: checkpoints, log.jsonl, TensorBoard events, samples, the finished model; or its URL in an object
    store (s3://bucket/run, gs://…, hf://…), to which it is copied from the folder `runs` in --cache"""
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    system: SystemConfig = field(default_factory=SystemConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


def changed(config: TrainConfig, **values) -> TrainConfig:
    """Give the same settings with some fields replaced, whichever part they belong to: changed(config, lr=1e-3,
    size=64)."""
    parts = {}
    for part in dataclasses.fields(config):
        inside = getattr(config, part.name)
        if dataclasses.is_dataclass(inside) and not isinstance(inside, type):
            mine = {f.name: values.pop(f.name) for f in dataclasses.fields(inside) if f.name in values}
            parts[part.name] = dataclasses.replace(inside, **mine)
    return dataclasses.replace(config, **(parts | values))


def chunks_of(config: OptimizerConfig, world_size: int) -> tuple[int, int]:
    """Say how all processes share the batch of a step: (samples in a chunk, chunks a process has one after another).

    Raises TrainingError where it cannot be shared evenly.
    """
    size = config.micro_batch or config.batch_size // world_size
    if size < 1 or config.batch_size % (size * world_size):
        by = f"micro_batch {config.micro_batch} × {world_size}" if config.micro_batch else f"{world_size}"
        raise TrainingError(f"batch_size is {config.batch_size}; it must be a multiple of {by} processes")
    return size, config.batch_size // (size * world_size)


def images_in(data: DataConfig, chunk_size: int) -> int:
    """How many samples of a chunk are single pictures: its last ones, behind the clips.

    Raises TrainingError where the share of them cannot be had.
    """
    count = round(data.image_share * chunk_size)
    if data.image_share and count in (0, chunk_size):
        raise TrainingError(
            f"image_share is {data.image_share:g}, {count} of the {chunk_size} samples that go through a process at "
            "once; choose a share that gives a picture and a clip, or a larger micro_batch"
        )
    return count


def level_rows(config: TrainConfig, architecture: UNetConfig, chunk_size: int) -> list[int]:
    """How many samples of a chunk are trained at each level, always the first ones: of single pictures none at levels
    of several frames."""
    levels = len(architecture.levels)
    rows = config.objective.level_rows(chunk_size, levels)
    of_clips = config.objective.level_rows(chunk_size - images_in(config.data, chunk_size), levels)
    return [few if moving else all_ for few, all_, moving in zip(of_clips, rows, _moving(architecture), strict=True)]


def level_shares(config: TrainConfig, architecture: UNetConfig) -> list[float]:
    """The share of all samples that is trained at each level."""
    shares = config.objective.level_shares or (1.0,) * len(architecture.levels)
    clips = 1 - config.data.image_share
    return [share * clips if moving else share for share, moving in zip(shares, _moving(architecture), strict=True)]


def _moving(architecture: UNetConfig) -> list[bool]:
    """Whether each level sees several frames."""
    frames, _ = architecture.strides[-1]
    return [time < frames for time, _ in architecture.strides]


@dataclass(frozen=True)
class Plan:
    """The model of a run, and the shape of one sample at each of its levels, highest resolution first:
    (C, H, W) of an image, (C, T, H, W) of a clip."""

    architecture: UNetConfig
    shapes: list[tuple[int, ...]]


def plan(config: TrainConfig, architecture: UNetConfig | None = None, context_dim: int | None = None) -> Plan:
    """Check that the settings fit the model, `architecture` or else the one that `config.model.model` names, for a text
    encoder of that width (None: the one that is trained along).

    Raises TrainingError where they do not.
    """
    name, data = config.model.model, config.data
    try:
        model = architecture or model_config(name, context_dim=context_dim or config.model.text_width)
    except ValueError as error:
        raise TrainingError(f"model: {error}") from None
    time, _ = model.strides[-1]
    if data.frames != time:  # the innermost UNet sees one frame
        raise TrainingError(f"frames is {data.frames}; {name} works on {time}")
    if bool(data.images) != bool(data.image_share):
        raise TrainingError("images and image_share: give both, shards of pictures and their share, or neither")
    if data.images and not model.is_video:
        raise TrainingError(f"image_share is {data.image_share:g}; {name} has no clips, give pictures as data")
    for field_name in ("level_weights", "level_shares"):
        values = getattr(config.objective, field_name)
        if len(values) not in (0, len(model.levels)):
            raise TrainingError(f"{field_name} is {values}; {name} has {len(model.levels)} levels")
    try:
        return Plan(model, model.sample_shapes(data.size))
    except ValueError as error:
        raise TrainingError(f"{error} ({name})") from None
