"""One sample of the shards → a picture or clip of the wanted size, and its caption."""

import json
import tarfile
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mdm_models.data.config import DataConfig
from mdm_models.data.locations import UnreachableError
from mdm_models.data.media import BadSample, Cut, decode_clip, decode_image
from mdm_models.data.shard_index import CLIP_SUFFIXES, IMAGE_SUFFIXES
from mdm_models.data.shards import ShardedSamples
from mdm_models.text import ClassLabels, PrecomputedText, TextEncoder
from mdm_models.text.precomputed import prompt_for

CAPTION_SUFFIXES = ("txt", "json", "cls")
PASSING = ("shard unreachable", "shard unreadable")  # reasons to leave a sample out that may be gone the next time


@dataclass(frozen=True)
class Skip:
    """A sample that was left out, and why."""

    shard: str
    key: str
    reason: str
    detail: str


def caption_of(sample: dict) -> str:
    """The caption of a sample: KEY.txt, "caption" or "text" in KEY.json, or the number of its class in KEY.cls; the
    first of them that is not blank. Raises BadSample."""
    if not any(suffix in sample for suffix in CAPTION_SUFFIXES):
        raise BadSample("caption missing", "none of " + ", ".join(f".{suffix}" for suffix in CAPTION_SUFFIXES))
    try:
        if caption := sample.get("txt", b"").decode().strip():
            return caption
        fields = json.loads(sample.get("json", b"{}"))
        caption = (fields.get("caption") or fields.get("text") or "") if isinstance(fields, dict) else None
        if not isinstance(caption, str):
            raise BadSample("caption unreadable", "the caption in .json is not a string")
        caption = caption.strip() or sample.get("cls", b"").decode().strip()
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BadSample("caption unreadable", str(error)) from None
    if not caption:
        raise BadSample("caption empty")
    return caption


def class_of(sample: dict) -> str:
    """The number in KEY.cls, or, without that file, the caption, which may name the class. Raises BadSample."""
    return caption_of({"cls": sample["cls"]} if "cls" in sample else sample)


Prompts = Literal["caption", "class", "name"]
"""what stands for a sample's text: its caption, its class, or the name under which its features were precomputed"""


def prompts_for(encoder: TextEncoder | None) -> Prompts:
    """What a text encoder reads."""
    if isinstance(encoder, PrecomputedText):
        return "name"
    return "class" if isinstance(encoder, ClassLabels) else "caption"


@dataclass(frozen=True)
class SampleReader:
    """Reads samples by their number, at the size that `config` asks for."""

    samples: ShardedSamples
    config: DataConfig
    prompts: Prompts = "caption"

    def damaged(self) -> list[Skip]:
        """What is missing of the shards: those that break off or cannot be reached, and samples without a picture."""
        skips = []
        for shard in self.samples.shards:
            if shard.damage:
                reason = "shard damaged" if shard.reached else "shard unreachable"
                skips.append(Skip(shard.path, "the rest" if len(shard) else "all of it", reason, shard.damage))
            if shard.without_media:
                skips.append(Skip(shard.path, f"{shard.without_media} samples", "no clip or image", "left out"))
        return skips

    def read(self, index: int, start: float | None = None, cut: Cut | None = None) -> tuple[Tensor, str]:
        """Sample `index` → (3, frames, size, size) uint8 and its caption.

        start: where its clip begins, as in `decode_clip`; None: in the middle if `config.clip_start` is that, or else
        at its beginning. cut: which square of it; None: the middle. Raises BadSample, and what `ShardedSamples` raises.
        """
        config = self.config
        sample = self.samples[index]
        caption = class_of(sample) if self.prompts == "class" else caption_of(sample)
        if self.prompts == "name":
            caption = prompt_for(self.samples.shard_of(index).path, sample["__key__"])
        if start is None:
            start = 0.5 if config.clip_start == "middle" else 0.0
        for suffix in CLIP_SUFFIXES:
            if suffix in sample:
                clip = decode_clip(sample[suffix], config.frames, config.frame_rate, config.size, start, cut or Cut())
                return clip, caption
        for suffix in IMAGE_SUFFIXES:
            if suffix in sample:
                if config.frames > 1:
                    raise BadSample("too short", f"an image, where clips of {config.frames} frames are wanted")
                return decode_image(sample[suffix], config.size, cut or Cut()), caption
        found = ", ".join(f".{suffix}" for suffix in sample if not suffix.startswith("__"))
        raise BadSample("no clip or image", f"the sample holds {found or 'nothing'}")

    def caption(self, index: int) -> str:
        """What sample `index` shows, for people and CLIP: in words if it has any, not the number of its class or the
        name of its features, which the text encoder may read. For samples that `read` takes."""
        sample = self.samples[index]
        try:
            return caption_of(sample)
        except BadSample:  # of a caption that only its class stands in for
            return class_of(sample)

    def try_read(self, index: int, start: float | None = None, cut: Cut | None = None) -> tuple[Tensor, str] | Skip:
        """`read`, with a Skip for what went wrong."""
        shard = self.samples.shard_of(index).path
        try:
            return self.read(index, start, cut)
        except BadSample as bad:
            return Skip(shard, self.samples[index]["__key__"], bad.reason, bad.detail)
        except UnreachableError as error:
            return Skip(shard, "all of it", "shard unreachable", str(error))
        except (OSError, ValueError, tarfile.TarError) as error:
            return Skip(shard, f"sample {index}", "shard unreadable", str(error))
