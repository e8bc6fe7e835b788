"""One sample of the shards → a picture or clip of the wanted size, and its caption."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor

from mdm_models.data.config import DataConfig
from mdm_models.data.layout import CAPTION_SUFFIXES, CLIP_SUFFIXES, IMAGE_SUFFIXES, NEIGHBOURS
from mdm_models.data.locations import UnreachableError
from mdm_models.data.media import BadSample, Cut, decode_clip, decode_image
from mdm_models.data.shard_index import Shard
from mdm_models.data.shards import ShardedSamples
from mdm_models.errors import one_line
from mdm_models.plain_text import decoded, stripped
from mdm_models.text import ClassLabels, PrecomputedText, TextEncoder
from mdm_models.text.precomputed import prompt_for

PASSING = ("shard unreachable", "shard unreadable")  # reasons to leave a sample out that may be gone the next time


@dataclass(frozen=True)
class Skip:
    """A sample that was left out, and why."""

    shard: str
    key: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.reason} ({self.key} in {self.shard}: {self.detail})"


def caption_of(sample: dict) -> str:
    """The caption of a sample: KEY.txt, "caption" or "text" in KEY.json, or the number of its class in KEY.cls; the
    first of them that can be read and is not blank. Raises BadSample."""
    if not any(suffix in sample for suffix in CAPTION_SUFFIXES):
        raise BadSample("caption missing", "none of " + ", ".join(f".{suffix}" for suffix in CAPTION_SUFFIXES))
    unreadable = None
    for suffix, read in (("txt", decoded), ("json", _caption_in), ("cls", decoded)):
        try:
            if caption := stripped(read(sample.get(suffix, b""))):
                return caption
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            unreadable = unreadable or BadSample("caption unreadable", f".{suffix}: {error}")
    raise unreadable or BadSample("caption empty")


def _caption_in(data: bytes) -> str:
    fields = json.loads(decoded(data) or "{}")
    caption = (fields.get("caption") or fields.get("text") or "") if isinstance(fields, dict) else None
    if not isinstance(caption, str):
        raise ValueError("the caption is not a string")
    return caption


def class_of(sample: dict) -> str:
    """The number in KEY.cls, or, without that file, the caption, which may name the class. Raises BadSample."""
    return caption_of({"cls": sample["cls"]} if "cls" in sample else sample)


Found = TypeVar("Found")

Prompts = Literal["caption", "class", "name"]
"""what stands for a sample's text: its caption, its class, or the name under which its features were precomputed"""


def prompts_for(encoder: TextEncoder | None) -> Prompts:
    """Say what a text encoder reads: captions, classes, or the names under which features were precomputed."""
    if isinstance(encoder, PrecomputedText):
        return "name"
    return "class" if isinstance(encoder, ClassLabels) else "caption"


def prompt_check(encoder: TextEncoder | None) -> Callable[..., object] | None:
    """What tells whether an encoder knows a prompt; None for one that reads anything."""
    return getattr(encoder, "check_prompt", None)


@dataclass(frozen=True)
class SampleReader:
    """Reads samples by their number, at the size that `config` asks for."""

    samples: ShardedSamples
    config: DataConfig
    prompts: Prompts = "caption"
    check_prompt: Callable[..., object] | None = None
    """raises ValueError for a prompt that the text encoder cannot read, and for a name whose features are not of the
    caption that it is given as well, see `prompt_check`"""

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
        return self._read(self.samples[index], self.samples.shard_of(index), start, cut)

    def _read(self, sample: dict, shard: Shard, start: float | None, cut: Cut | None) -> tuple[Tensor, str]:
        config = self.config
        prompt, captions = (class_of(sample) if self.prompts == "class" else caption_of(sample)), ()
        if self.prompts == "name":
            prompt, captions = prompt_for(shard.path, sample["__key__"]), (prompt,)
        if self.check_prompt:
            try:
                self.check_prompt(prompt, *captions)
            except ValueError as error:
                raise BadSample("caption unknown", one_line(error)) from None
        if start is None:
            start = 0.5 if config.clip_start == "middle" else 0.0
        for suffix in CLIP_SUFFIXES:
            if suffix in sample:
                clip = decode_clip(sample[suffix], config.frames, config.frame_rate, config.size, start, cut or Cut())
                return clip, prompt
        for suffix in IMAGE_SUFFIXES:
            if suffix in sample:
                if config.frames > 1:
                    raise BadSample("too short", f"an image, where clips of {config.frames} frames are wanted")
                return decode_image(sample[suffix], config.size, cut or Cut()), prompt
        found = ", ".join(f".{suffix}" for suffix in sample if not suffix.startswith("__"))
        raise BadSample("no clip or image", f"the sample holds {found or 'nothing'}")

    def caption(self, index: int) -> str:
        """What sample `index` shows, for people and CLIP: in words if it has any, not the number of its class or the
        name of its features, which the text encoder may read. For samples that `read` takes."""
        return _words_of(self.samples[index])

    def try_read(self, index: int, start: float | None = None, cut: Cut | None = None) -> tuple[Tensor, str] | Skip:
        """Do as `read` does, but give a Skip for a sample that cannot be used."""
        return self._try(index, lambda sample, shard: self._read(sample, shard, start, cut))

    def try_show(self, index: int) -> tuple[Tensor, str, str] | Skip:
        """Give what `read` and `caption` say of a sample: picture or clip, caption, prompt; or a Skip."""

        def shown(sample: dict, shard: Shard) -> tuple[Tensor, str, str]:
            picture, prompt = self._read(sample, shard, None, None)
            return picture, _words_of(sample), prompt

        return self._try(index, shown)

    def _try(self, index: int, use: Callable[[dict, Shard], Found]) -> Found | Skip:
        shard = self.samples.shard_of(index)
        key = f"sample {index}"
        try:
            sample = self.samples[index]
            key = sample["__key__"]
            return use(sample, shard)
        except BadSample as bad:
            apart = shard.apart and bad.reason in ("caption missing", "no clip or image")
            detail = f"{bad.detail}; {NEIGHBOURS}" if apart else bad.detail
            return Skip(shard.path, bad.key or key, bad.reason, detail)
        except UnreachableError as error:
            return Skip(shard.path, "all of it", "shard unreachable", str(error))
        except OSError as error:
            return Skip(shard.path, key, "shard unreadable", one_line(error))


def _words_of(sample: dict) -> str:
    try:
        return caption_of(sample)
    except BadSample:  # of a caption that only its class stands in for
        return class_of(sample)
