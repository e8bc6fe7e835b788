"""Prompts → pictures: a model, its text encoder and its diffusion process in one object, saved and loaded together."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from mdm_models import private_torch
from mdm_models.diffusion import MatryoshkaDiffusion, sample
from mdm_models.engine import RowByRow, Windowed, check_engine, engine_for
from mdm_models.errors import one_line
from mdm_models.pictures import Clip, from_pictures, to_pictures, to_pixels
from mdm_models.pretrained import directory_of, from_pretrained, is_repository
from mdm_models.shipped import shipped_names, shipped_or
from mdm_models.storage import check_local, together, write_whole
from mdm_models.text import TextEncoder, TransformerTextEncoder, load_text_encoder
from mdm_models.unet import UNet
from mdm_models.zoo import how_to_get, list_models

PIPELINE_FILE, TEXT_FOLDER = "pipeline.json", "text_encoder"
FORMAT_VERSION = 1  # of pipeline.json
OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass(frozen=True)
class PipelineConfig:
    """What sampling needs to know and the weights do not tell; the contents of pipeline.json."""

    size: int
    """height and width of the highest resolution, in pixels"""
    text_encoder: str = ""
    """where the text encoder is: "text_encoder" for the folder of that name beside this file, or what
    `mdm_models.text.load_text_encoder` takes; "" for a model without text"""
    max_tokens: int = 128
    """longest prompt, in tokens"""
    shift_power: float = 1.0
    """a level of resolution ratio s has its signal-to-noise ratio divided by s to this power"""
    unshifted_size: int = 0
    """the size to which these ratios are taken, in pixels; 0: the innermost level's"""
    schedule: str = "deepfloyd"
    """the noise schedule"""
    num_steps: int = 1000
    """times of the diffusion process"""
    prediction: str = "v"
    """what the network predicts: v, eps or x0"""
    loss_target: str = "eps"
    """the space in which its error was measured in training: eps, v or x0"""
    guidance_scale: float = 5.0
    """guidance unless a call says otherwise"""
    sampler: str = "ddim"
    """how steps are taken unless a call says otherwise"""
    num_inference_steps: int = 50
    """steps unless a call says otherwise"""
    frame_rate: float = 8.0
    """frames of a clip shown a second"""

    def __post_init__(self):
        for name in ("size", "max_tokens", "num_steps", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.frame_rate < math.inf:
            raise ValueError(f"frame_rate is {self.frame_rate}; it must be above 0")
        if not math.isfinite(self.shift_power):
            raise ValueError(f"shift_power is {self.shift_power}; it must be finite")

    def save(self, directory: Path) -> None:
        """Write pipeline.json in a directory: all of it, or nothing. Raises OSError."""
        values = {"format_version": FORMAT_VERSION} | dataclasses.asdict(self)
        write_whole(directory / PIPELINE_FILE, lambda path: path.write_text(json.dumps(values, indent=1) + "\n"))

    @classmethod
    def load(cls, directory: Path) -> "PipelineConfig":
        """Read the pipeline.json of a directory. Raises FileNotFoundError, or ValueError that names the file and the
        key."""
        path = directory / PIPELINE_FILE
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            remedy = "convert the model again, or build a Pipeline(model, text_encoder, config) and save it"
            raise FileNotFoundError(f"{path}: no such file; {remedy}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {one_line(error)}") from None
        if not isinstance(values, dict) or values.pop("format_version", None) != FORMAT_VERSION:
            raise ValueError(f"{path} is not a pipeline's config of format_version {FORMAT_VERSION}")
        types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
        if strays := sorted(values.keys() - types.keys()):  # one that is missing takes its default
            raise ValueError(f"{path} must have no keys but {', '.join(types)}: see {', '.join(strays)}")
        if "size" not in values:
            raise ValueError(f"{path} has no size, which it must have")
        for key, value in values.items():
            right = (int, float) if types[key] is float else types[key]
            if not isinstance(value, right) or isinstance(value, bool):
                raise ValueError(f"{path}: {key} is {value!r}; it must be of type {types[key].__name__}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {one_line(error)}") from None


class Pipeline:
    """Turns prompts into images or clips.

        pipeline = Pipeline.from_pretrained("mdm_t2i_256", device="cuda", dtype=torch.bfloat16)
        pipeline("a penguin", num_inference_steps=50, seed=0)[0].save("penguin.png")

    model: a UNet or nested UNet; text_encoder: a `TextEncoder` as wide as the model's context_dim, or None for a model
    without text. engine: how the steps are run, "auto" (CUDA graphs on a GPU), "eager", "graph" or "compile": see
    `engine.engine_for`.
    """

    def __init__(
        self, model: UNet, text_encoder: TextEncoder | None, config: PipelineConfig, *, engine: str = "auto"
    ):
        check_engine(engine)
        wanted = model.config.innermost.context_dim
        width = text_encoder.width if text_encoder is not None else 0
        if width != wanted:
            found = f"is {width} wide" if width else "is missing"
            raise ValueError(f"text_encoder {found}; the model reads text features {wanted} wide")
        self.model = model.eval()
        self.text_encoder = text_encoder
        self.config = config
        self.engine = engine
        self._running = None  # what `engine_for` made, once there is something to sample
        self.shapes = model.config.sample_shapes(config.size)
        self.diffusion = MatryoshkaDiffusion(
            model.config.noise_scales(config.size, config.unshifted_size),
            config.shift_power,
            config.schedule,
            config.num_steps,
            config.prediction,
            config.loss_target,
        ).to(self.device)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        text_encoder: TextEncoder | str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        engine: str = "auto",
    ) -> "Pipeline":
        """Load what `save_pretrained` or `mdm convert` wrote.

        source: the directory, or that of a training run; a name of `list_models(pretrained=True)`; or "owner/name", a
        repository of the Hugging Face Hub with the same files. text_encoder: one to use in place of what
        the directory names: an encoder, or what `load_text_encoder` takes. dtype: of the model's weights; None for that
        of the file or, where this is half precision and `device` a CPU without units for it, float32, which is tens of
        times as fast there. The text encoder's features are float32. device: where the model and the text encoder run.
        engine: as for the class.

        Raises FileNotFoundError, ValueError or TypeError in one line that names the file.
        """
        directory = model_directory(source)
        config = PipelineConfig.load(directory)
        model = from_pretrained(directory, dtype=dtype, device=device)
        if dtype is None:
            model.to(_computed_in(model.conv_in.weight))
        if text_encoder is None and config.text_encoder:
            text_encoder = directory / TEXT_FOLDER if config.text_encoder == TEXT_FOLDER else config.text_encoder
        if isinstance(text_encoder, str | Path):
            text_encoder = load_text_encoder(text_encoder, max_tokens=config.max_tokens, device=device)
        return cls(model, text_encoder, config, engine=engine)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json, model.safetensors and pipeline.json; and the text encoder, if it was trained with the
        model. Another encoder stays where it is, and pipeline.json keeps its name. All is written, or nothing."""
        directory, config = Path(directory), self.config
        with together():
            self.model.save_pretrained(directory)
            if isinstance(self.text_encoder, TransformerTextEncoder):
                self.text_encoder.save(directory / TEXT_FOLDER)
                config = dataclasses.replace(config, text_encoder=TEXT_FOLDER)
            config.save(directory)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_running": None}  # graphs and compiled code stay with this process

    @property
    def device(self) -> torch.device:
        return self.model.conv_in.weight.device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Pipeline":
        """Move everything to a device, and the model to a dtype; returns the pipeline."""
        self._running = None  # captured graphs hold the memory in which the weights are now
        self.model.to(device=device, dtype=dtype)
        self.diffusion.to(self.device)
        if move := getattr(self.text_encoder, "to", None):
            move(self.device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        sampler: str | None = None,
        eta: float = 0.0,
        threshold: str = "clip",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        image: Image.Image | Sequence[Image.Image] | Tensor | None = None,
        strength: float = 0.8,
        frames: int | None = None,
        micro: dict[str, float] | None = None,
        output_type: str = "pil",
        return_levels: bool = False,
        low_memory: bool = False,
        callback: Callable[[int, float, list[Tensor]], object] | None = None,
        progress: bool = True,
    ) -> list[Image.Image] | list[Clip] | Tensor:
        """Sample images or clips, `num_images_per_prompt` for each prompt in turn.

        prompt: one or several. negative_prompt: what to steer away from, one for all or one a prompt; "" by default.
        num_inference_steps, guidance_scale, guidance_interval, sampler, eta, threshold, generator, seed, callback: as
            for `mdm_models.diffusion.sample`; steps, guidance and sampler are the pipeline's own where they are None.
            With a seed, an image is the same whatever batch it is in; a model that looks at the padding of shorter
            prompts (`masked_context` off, as the official ones) sees by it how long the batch's longest one is.
        image, strength: begin from a picture, one for all or one a prompt, or from a tensor (B, 3, H, W) or
            (B, 3, T, H, W) in −1…1, with the noise of time strength · num_steps: near 0 it hardly changes, at 1 little
            of it is left.
        frames: of each clip; if more than the model's, windows of the model's length that overlap by half slide over it
            at every step, and what they predict for a frame is averaged: one motion goes on, no story. Its work and
            memory are those of a clip of the model's for each window, one after another.
        micro: micro-conditions by name, for all images.
        output_type: "pil" for pictures, or `Clip`s, which can be saved; "np" for uint8 arrays (B, [T,] H, W, 3);
            "pt" for a float32 tensor (B, 3, [T,] H, W) in −1…1.
        return_levels: a list with one of these for each resolution, highest first; with `frames`, levels of fewer
            frames than the highest have theirs for each window.
        low_memory: run the network on one row of the batch at a time, which gives the same images in the memory of one.
            The resolutions cannot be sampled one after another: at every step each of them reads the features of the
            others.
        progress: show a progress bar.

        Raises ValueError or TypeError for an argument that is not one of these.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}; it must be at least 1")
        prompts = _texts("prompt", prompt)
        if not prompts:
            raise ValueError("prompt is an empty list; give one prompt or several")
        count = len(prompts) * num_images_per_prompt
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        interval: dict[str, Any] = {} if guidance_interval is None else {"guidance_interval": guidance_interval}
        if self._running is None:  # not `or`: a compiled model has no truth value
            self._running = engine_for(self.model, self.engine)
        model = RowByRow(self._running) if low_memory else self._running
        shapes = self.shapes
        if frames is not None and (longer := self._longer(model, frames, image)):
            model = longer
            shapes = [(shape[0], total, *shape[2:]) for shape, total in zip(shapes, longer.counts, strict=True)]
        with tqdm(total=steps, desc="sampling", unit="step", delay=0.5, disable=not progress) as bar:

            def after_step(i: int, t: float, x_0: list[Tensor]) -> None:
                bar.update()
                if callback is not None:
                    callback(i, t, x_0)

            levels = sample(
                model,
                self.diffusion,
                [(count, *shape) for shape in shapes],
                **self._text(prompts, negative_prompt, num_images_per_prompt),
                micro=self._micro(micro or {}, count),
                guidance_scale=guidance_scale if self.text_encoder is not None else 1.0,
                num_inference_steps=steps,
                sampler=sampler or self.config.sampler,
                eta=eta,
                threshold=threshold,
                generator=generator,
                seed=seed,
                start=None if image is None else self._start(image, strength, num_images_per_prompt, count),
                callback=after_step,
                return_levels=True,
                **interval,
            )
        shown: Any = [self._shown(level, output_type) for level in levels]
        return shown if return_levels else shown[0]

    def _text(self, prompts: list[str], negative: str | Sequence[str] | None, repeats: int) -> dict[str, Tensor]:
        """The prompts and what guidance pushes away from, encoded together so that they have one length."""
        if self.text_encoder is None:
            if any(prompts) or negative:
                raise ValueError("prompt is given; this model has no text encoder and takes only \"\"")
            return {}
        negatives = _texts("negative_prompt", "" if negative is None else negative)
        if negative is None or isinstance(negative, str):
            negatives *= len(prompts)
        if len(negatives) != len(prompts):
            raise ValueError(f"negative_prompt has {len(negatives)} entries; there are {len(prompts)} prompts")
        features, mask = self.text_encoder(prompts + negatives)
        rows = [part.repeat_interleave(repeats, dim=0) for part in (*features.chunk(2), *mask.chunk(2))]
        return dict(zip(("context", "negative_context", "context_mask", "negative_context_mask"), rows, strict=True))

    def _longer(self, model: Callable[..., list[Tensor]], frames: int, image: object) -> Windowed | None:
        """What samples clips of so many frames; None if it is the model itself."""
        if not self.model.config.is_video:
            raise ValueError(f"frames is {frames}; this model makes pictures, and takes none")
        own = [shape[1] for shape in self.shapes]
        if frames < own[0]:
            raise ValueError(f"frames is {frames}; this model makes clips of {own[0]} frames, or longer ones")
        if frames == own[0]:
            return None
        if image is not None:
            raise ValueError(f"image is given; a clip of {frames} frames, not {own[0]}, begins from noise: omit frames")
        return Windowed(model, own, frames)

    def _micro(self, micro: dict[str, float], count: int) -> dict[str, Tensor]:
        exact = {"dtype": torch.float32, "device": self.device}
        return {name: torch.full((count,), float(value), **exact) for name, value in micro.items()}

    def _start(
        self, image: Image.Image | Sequence[Image.Image] | Tensor, strength: float, repeats: int, count: int
    ) -> tuple[Tensor, float]:
        if not 0 < strength <= 1:
            raise ValueError(f"strength is {strength}; it must be above 0 and at most 1")
        shape = (count, *self.shapes[0])
        if not isinstance(image, Tensor):
            pictures = [image] if isinstance(image, Image.Image) else image
            if not isinstance(pictures, list | tuple) or not all(isinstance(one, Image.Image) for one in pictures):
                raise TypeError(f"image is {image!r}; it must be a picture of PIL, a list of them, or a tensor")
            image = from_pictures(pictures, self.config.size)
            if len(shape) == 5:  # a still clip
                image = image[:, :, None].expand(-1, -1, shape[2], -1, -1)
        if image.shape[0] == 1:
            image = image.expand(count, *image.shape[1:])
        elif image.shape[0] * repeats == count:
            image = image.repeat_interleave(repeats, dim=0)
        if tuple(image.shape) != shape:
            raise ValueError(f"image has shape {tuple(image.shape)}; it must be one, or one a prompt: {shape}")
        return image.float().to(self.device), strength * self.config.num_steps

    def _shown(self, images: Tensor, output_type: str):
        if output_type == "pt":
            return images
        return to_pixels(images) if output_type == "np" else to_pictures(images, self.config.frame_rate)


def _texts(name: str, given: str | Sequence[str]) -> list[str]:
    texts = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} is {given!r}; it must be a string or a list of strings")
    return texts


def _computed_in(weight: Tensor) -> torch.dtype:
    """The dtype of a weight or, on a CPU that has no units for it, float32."""
    in_units = weight.dtype == torch.bfloat16 and private_torch.cpu_multiplies_bf16()
    return weight.dtype if weight.device.type != "cpu" or weight.itemsize > 2 or in_units else torch.float32


def model_directory(source: str | Path) -> Path:
    """Find the directory of a saved pipeline, as `pretrained.directory_of` does. Raises FileNotFoundError; for a named
    model whose weights do not come along, saying how to get them."""
    if not (shipped_or(source).exists() or is_repository(source)):
        check_local(source)
        along = f"models that come along: {', '.join(shipped_names()) or 'none'}"
        raise FileNotFoundError(
            f"{source}: no such directory; {how_to_get(str(source)) if str(source) in list_models() else along}"
        )
    return directory_of(source, PIPELINE_FILE, f"{TEXT_FOLDER}/*")
