"""Measure how good the samples of a saved model are, beside real ones.

  mdm evaluate RUN --data SHARDS --feature-extractor pt_inception-2015-12-05-6726825d.pth --clip-model CLIP_DIR
  torchrun --nproc-per-node=8 -m mdm_models.cli evaluate MODEL_DIR --data SHARDS --samples 30000 --save-samples DIR ...
  mdm evaluate RUN --guidance-scale 1 2 4 --steps 25 50 --ema-stds 0.05 0.1 ...       a table of all combinations

For the captions of samples that were held out of training it draws images or clips, and prints
  validation_loss     the training loss on the real ones, at fixed times and noise; validation_loss_0, _1, ... are the
                      levels', highest resolution first
  fid                 Fréchet inception distance, if the feature extractor is InceptionV3 with the weights of 2015
  frechet_NAME        the same distance with the features of another network: no FID, comparable with nothing but itself
  fd_dinov2           the same with the features of DINOv2, ViT-L/14, from its directory
  kid, kid_NAME       kernel inception distance, if asked for by --kernel-distance: unbiased, of any network's features
  cmmd, cmmd_NAME     1000 · MMD² of CLIP's image embeddings, in place of it; cmmd if it is ViT-L/14 at 336²
  fvd                 Fréchet video distance, of clips, if the feature extractor is I3D, its i3d_torchscript.pt
  fvd_NAME            the same distance with the features of another network that takes clips
  frechet_video_NAME  of clips, from the features of their frames, their mean and their mean change: no FVD
  clip_score          100 · cosine of image and caption, the mean over samples (of clips, over frames as well)
Distances shrink as samples grow in number: compare results of equally many, 10 000 or more where it counts. The real
images have the model's size when the extractor sees them. A sample depends on the seed and its number alone. The line
`protocol` says what must be equal for numbers to be compared.

Of a run, what is not given is as in the run's own evaluation: the shards and what is held out of them, the number of
samples, how they are read and drawn, the networks.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import Positional, arg

from mdm_models.commands.evaluate_report import Row, protocol_line, report
from mdm_models.commands.line import Dtype, check_steps, command, dtype_of
from mdm_models.data.config import DataConfig, check_above_0
from mdm_models.data.held_out import HeldOut
from mdm_models.data.prepare.captioned_folder import shards_for
from mdm_models.data.reader import SampleReader, prompt_check, prompts_for
from mdm_models.data.shards import ShardedSamples, open_shards
from mdm_models.data.stream import split
from mdm_models.errors import TrainingError
from mdm_models.evaluation.comparison import Comparison
from mdm_models.evaluation.kept import KeptSamples
from mdm_models.evaluation.measure import Sampling, measure
from mdm_models.pipeline import Pipeline, model_directory
from mdm_models.processes import Processes, init_process_group
from mdm_models.storage import WEIGHTS_FILE, check_file_to_be, fingerprint
from mdm_models.text.precomputed import UNCONDITIONAL
from mdm_models.training.config import EvaluationConfig, OutputConfig, SystemConfig, TrainConfig
from mdm_models.training.ema.power_functions import exponent
from mdm_models.training.ema.snapshots import list_snapshots
from mdm_models.training.fetched import on_this_machine
from mdm_models.training.saved import take_average
from mdm_models.training.settings import read_settings

ClipStart = Literal["random", "first", "middle"]
Sampler = Literal["ddim", "ddpm", "dpmpp_2m", "heun"]


@dataclass(frozen=True)
class Options:
    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """a saved model, or the directory of a run that left one, or its URL (s3://bucket/run)"""
    data: tuple[str, ...] = ()
    """shards, or a folder of pictures, as for training; default: those of the run"""
    holdout: float | None = None
    """share of them held out, as in training; default: that of the run, or 0.001"""
    all: bool = False
    """evaluate on all of the data, not on the share held out"""
    samples: int | None = None
    """at most so many; default: as many as in the run's evaluation, or 1000"""
    clip_start: ClipStart | None = None
    """where in its clip a sample begins, "random" at its first frame; default: as in the run"""
    loss_target: Literal["eps", "v", "x0"] | None = None
    """the space of the loss; default: that which the model was trained in"""
    feature_extractor: str | None = None
    """for a Fréchet distance: the path of FID's InceptionV3 weights (.pth) or NVIDIA's inception-2015-12-05.pt; of a
    TorchScript file or a .pt2 of torch.export that takes images (N, 3, H, W) in 0…1 and gives features (N, D), whose
    code will run; of I3D, or of such a program that takes clips (N, 3, T, H, W); a directory of DINOv2 or CLIP as
    transformers saves it; or efficientnet-lite0, from PyPI; default: the run's, if it had one"""
    kernel_distance: bool = False
    """also the kernel distance of these features: KID, or CMMD if they are CLIP's"""
    reference: Path | None = None
    """an .npz file with mu and sigma of the real images' features, and these themselves if there is a kernel distance:
    read if it is there, else written; without it they are those of the samples evaluated"""
    clip_model: str | None = None
    """for a CLIP score: directory or hub id of an open_clip model; default: the run's, if it had one"""
    steps: tuple[int, ...] = ()
    """sampling steps; default: as many as in the run, or 50; several, of these, guidance or averages, make a table"""
    guidance_scale: tuple[float, ...] = ()
    """classifier-free guidance; 1 is none; default: the model's"""
    ema_stds: tuple[float, ...] = ()
    """widths of averages, as shares of the run, made from the snapshots of a run that was trained with --ema-stds;
    default: the average that is the model"""
    sampler: Sampler | None = None
    """how samples are drawn; default: as in the run, or ddim"""
    seed: int | None = None
    """a sample depends on it and on the sample's number; default: that of the run, or 0"""
    cache: str | None = None
    """folder for copies of shards that are not on a local disk; default: that of the run, or of training"""
    cache_gb: float | None = None
    """largest size of those copies, in 10⁹ bytes"""
    text_encoder: str | None = None
    """use this text encoder in place of the one that the model names"""
    batch_size: int = 16
    """samples at once in each process"""
    workers: int = 2
    """processes that decode, for each process"""
    json: Path | None = None
    """write settings and results to this file"""
    save_samples: Path | None = None
    """a folder to keep NUMBER.png or NUMBER.mp4 in, and NUMBER.txt, the caption; the same command again draws only
    what is missing there (clips all)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one"""
    dtype: Dtype | None = None
    """to compute in; default: as in the run; else as for `mdm sample`"""

    def __post_init__(self):
        check_above_0(self, *(name for name in ("samples", "batch_size") if getattr(self, name) is not None))


@dataclass(frozen=True)
class Completed(Options):
    """The options with nothing left open that measuring needs."""

    holdout: float = DataConfig.holdout
    samples: int = EvaluationConfig.evaluate_samples
    clip_start: ClipStart = DataConfig.clip_start
    feature_extractor: str = EvaluationConfig.feature_extractor
    clip_model: str = EvaluationConfig.clip_model
    sampler: Sampler = OutputConfig.sampler
    seed: int = SystemConfig.seed
    cache: str = DataConfig.cache
    cache_gb: float = DataConfig.cache_gb
    max_bad_share: float = DataConfig.max_bad_share


def evaluate(options: Options) -> None:
    """Measure a model and print the numbers. Raises TrainingError, OSError, ValueError or TypeError in one line."""
    for steps in options.steps:
        check_steps(steps)
    for std in options.ema_stds:
        exponent(std)  # which no average has if this raises
    with init_process_group(options.device) as processes:
        _evaluate(options, processes)


def _evaluate(options: Options, processes: Processes) -> None:
    processes.agree(lambda: _check_files(options) if processes.is_main else None)
    model = on_this_machine(options.model, averages=bool(options.ema_stds))
    told = _told(model)
    options = _completed(dataclasses.replace(options, model=model), told)
    if not options.data:
        raise ValueError(f"--data is missing: {options.model} is no run whose shards are known")
    if options.reference and not options.feature_extractor:
        raise ValueError("--reference needs --feature-extractor")
    if options.kernel_distance and not options.feature_extractor:
        raise ValueError("--kernel-distance needs --feature-extractor")
    autocast = told is not None and options.dtype is None and told.system.uses_bf16(processes.device.type)
    dtype = torch.float32 if autocast else dtype_of(options.dtype, processes.device)
    directory = model_directory(options.model)
    pipeline = Pipeline.from_pretrained(
        directory, text_encoder=options.text_encoder, dtype=dtype, device=processes.device
    )
    pipeline.diffusion.loss_target = options.loss_target or pipeline.config.loss_target
    shape = pipeline.shapes[0]
    comparison = Comparison.of(
        options.feature_extractor,
        options.clip_model,
        shape[-1],
        shape[1] if len(shape) == 4 else 1,
        processes.device,
        options.kernel_distance,
    )
    held_out = _held_out(options, pipeline, processes)
    reference = options.reference
    has_reference = reference is not None and reference.is_file()
    if reference is not None and has_reference:
        comparison.load_reference(reference, processes.is_main)
    guidance = options.guidance_scale or (pipeline.config.guidance_scale,)
    samplings = [Sampling(options.seed, steps, options.sampler, g) for g in guidance for steps in options.steps]
    stds = options.ema_stds or (None,)
    several = len(stds) * len(samplings) > 1
    rows = []
    for std in stds:
        if std is not None:
            take_average(pipeline, _run(options.model), std, with_text=not options.text_encoder)
        for sampling in samplings:
            kept = None
            if folder := options.save_samples:
                kept, *_ = processes.agree(partial(_kept, options, folder, sampling, std, pipeline, several))
            with torch.autocast(processes.device.type, torch.bfloat16, enabled=autocast):  # ends before weights change
                found = measure(pipeline, held_out, comparison, processes, options.workers, sampling, kept)
            rows.append(Row(std, sampling, found))
    if reference and not has_reference:
        comparison.save_reference(reference, processes.is_main)
    if processes.is_main:
        protocol = protocol_line(rows, _drawn(options, pipeline), _networks(options, comparison))
        report(rows, protocol, vars(options), options.json)


def _check_files(options: Options) -> None:
    """Raises at once what writing the results would raise after all that measuring."""
    if options.json:
        check_file_to_be(options.json, "--json")
    if options.reference and not options.reference.is_file():
        check_file_to_be(options.reference, "--reference")


def _told(model: Path) -> TrainConfig | None:
    """What the run was told that this is the directory of, or that left this model in its own."""
    return read_settings(model) or read_settings(_run(model))


def _run(model: Path) -> Path:
    """The directory of the run, given it or that of the model in it."""
    return model.parent if model.name == "model" and not (model / "model").is_dir() else model


def _completed(options: Options, told: TrainConfig | None) -> Completed:
    """The options with what is not given taken from the run, if there is one, or from the defaults of training."""
    data, evaluation, output, system = (
        (told.data, told.evaluation, told.output, told.system)
        if told
        else (DataConfig(()), EvaluationConfig(), OutputConfig(), SystemConfig())
    )
    given = {name: value for name, value in vars(options).items() if value not in (None, ())}
    theirs = {
        "data": data.shards,
        "holdout": data.holdout,
        "clip_start": data.clip_start,
        "cache": data.cache,
        "cache_gb": data.cache_gb,
        "max_bad_share": data.max_bad_share,
        "samples": evaluation.evaluate_samples,
        "feature_extractor": evaluation.feature_extractor,
        "clip_model": evaluation.clip_model,
        "steps": (output.sample_steps,),
        "sampler": output.sampler,
        "seed": system.seed,
    }
    if told:
        theirs |= {"loss_target": told.objective.loss_target, "guidance_scale": (output.guidance_scale,)}
        if Path(told.model.text_encoder or "/", UNCONDITIONAL).is_file():  # features, which the run was shown
            theirs["text_encoder"] = told.model.text_encoder
    return Completed(**vars(options) | theirs | given)


def _held_out(options: Completed, pipeline: Pipeline, processes: Processes) -> HeldOut:
    shape = pipeline.shapes[0]
    config = DataConfig(
        shards=shards_for(options.data, pipeline.config.size, options.cache),
        size=pipeline.config.size,
        frames=shape[1] if len(shape) == 4 else 1,
        frame_rate=pipeline.config.frame_rate,
        clip_start=options.clip_start,
        holdout=options.holdout,
        cache=options.cache,
        cache_gb=options.cache_gb,
        max_bad_share=options.max_bad_share,
    )
    samples = ShardedSamples(open_shards(config, processes))
    encoder = pipeline.text_encoder
    reader = SampleReader(samples, config, prompts_for(encoder), prompt_check(encoder))
    training, validation = split(samples, 0 if options.all else options.holdout)
    indices = training if options.all else validation
    if not len(indices):
        raise TrainingError(
            f"--holdout {options.holdout:g}: none of {len(samples)} samples is held out; give the share that training "
            "held out, or --all"
        )
    return HeldOut(reader, indices, options.samples, options.batch_size, processes, keep=False)


def _kept(
    options: Completed, folder: Path, sampling: Sampling, ema_std: float | None, pipeline: Pipeline, several: bool
) -> KeptSamples:
    """Where the samples drawn in this way are."""
    average = {}
    name = f"guidance-{sampling.guidance_scale:g}-steps-{sampling.num_inference_steps}"
    if ema_std is not None:
        average = {"ema_std": ema_std, "updates": list_snapshots(_run(options.model))[-1].updates}
        name = f"std-{ema_std:g}-{name}"
    if several:
        folder = folder / name
    directory = model_directory(options.model)
    followed = ("data", "holdout", "all", "samples", "clip_start", "text_encoder", "dtype")
    settings: dict[str, object] = {name: str(getattr(options, name)) for name in followed}
    settings |= {name: str(value) for name, value in (vars(sampling) | average).items()}
    return KeptSamples(folder, pipeline.config.frame_rate, settings | {"weights": fingerprint(directory)})


def _drawn(options: Options, pipeline: Pipeline) -> str:
    """What a sample is, for the protocol."""
    *frames, height, width = pipeline.shapes[0][1:]
    size = f"{height}×{width}"
    if not frames:
        return f"samples of {size}"
    begun = f"clip start {options.clip_start}"
    return f"clips of {frames[0]} frames of {size}, {pipeline.config.frame_rate:g} a second, {begun}"


def _networks(options: Options, comparison: Comparison) -> list[str]:
    """What judged the samples, for the protocol."""
    found = []
    if options.feature_extractor and comparison.frechet is not None:
        path = Path(options.feature_extractor)
        weights = path / WEIGHTS_FILE if path.is_dir() else path
        of_file = f" ({fingerprint(weights)})" if weights.is_file() else ""
        found.append(f"features of {path.name}{of_file}, {comparison.frechet.resizing}")
    if options.reference:
        found.append(f"reference {options.reference.name}")
    if options.clip_model:
        found.append(f"CLIP {Path(options.clip_model).name}")
    return found


main = command("evaluate", __doc__, Options, evaluate, urls=["model"])
