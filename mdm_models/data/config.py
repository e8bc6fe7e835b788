"""What the data layer is told, and the checks of such settings."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """The captioned images or clips, and how they are cut to the model's size."""

    shards: tuple[str, ...]
    """WebDataset shards: .tar files, folders of them, patterns a-{000..099}.tar, URLs that fsspec opens (s3://…),
    commands that write one (pipe:…); recipes also take plain folders of captioned pictures"""
    images: tuple[str, ...] = ()
    """shards of single pictures to be trained on beside the clips: see image_share"""
    image_share: float = 0.0
    """share of each batch that are single pictures, of `images`, which train the levels of one frame; 0: none"""
    size: int = 32
    """height and width in pixels"""
    frames: int = 1
    """frames of a clip; 1 for an image model"""
    frame_rate: float = 8.0
    """frames per second at which clips are sampled"""
    clip_start: Literal["random", "first", "middle"] = "random"
    """where in its clip a sample begins"""
    crop: Literal["centre", "random"] = "centre"
    """which square of a picture is kept"""
    flip: bool = False
    """mirror half of the samples left to right; wrong where captions speak of left, right or writing"""
    holdout: float = 0.001
    """share of the samples held out of training for validation, chosen by a hash of their keys; 0: none"""
    max_bad_share: float = 0.1
    """the run stops when more than this share of the samples it tried could not be used, beyond chance"""
    split_shards: Literal["auto", "yes", "no"] = "auto"
    """yes: each data process reads shards of its own; no: samples are shuffled over all shards; auto: yes for shards
    that are not on a local disk"""
    cache: str = ""
    """folder for copies of what is not on a local disk, shards and the run; empty: in the user's cache directory"""
    cache_gb: float = 50.0
    """largest size of those copies, in 10⁹ bytes"""
    workers: int = 4
    """processes that decode, per training process; 0: decode in the training process"""

    def __post_init__(self):
        check_above_0(self, "size", "frames", "frame_rate")
        check(self, ["cache_gb"], lambda value: value > 0, "be above 0")
        check_not_negative(self, "workers")
        check_share(self, "holdout", "image_share")
        check(self, ["max_bad_share"], lambda value: 0 <= value <= 1, "lie in [0, 1]")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a sample: channels, frames, height and width."""
        return 3, self.frames, self.size, self.size


def check(config, names: Iterable[str], holds, rule: str) -> None:
    """Raise ValueError with the `rule` for the first of these fields of `config` for which `holds` is false."""
    for name in names:
        if not holds(getattr(config, name)):
            raise ValueError(f"{name} is {getattr(config, name)}; it must {rule}")


def check_above_0(config, *names: str) -> None:
    """Raise ValueError unless these fields of `config` are above 0 and finite, or None."""
    check(config, names, lambda value: value is None or 0 < value < math.inf, "be above 0 and finite")


def check_not_negative(config, *names: str) -> None:
    """Raise ValueError unless these fields of `config` are 0 or more and finite."""
    check(config, names, lambda value: 0 <= value < math.inf, "be 0 or more and finite")


def check_finite(config, *names: str) -> None:
    """Raise ValueError unless these fields of `config` are finite numbers, or tuples of such."""

    def holds(value: float | tuple[float, ...]) -> bool:
        return all(map(math.isfinite, value if isinstance(value, tuple) else (value,)))

    check(config, names, holds, "be finite")


def check_share(config, *names: str) -> None:
    """Raise ValueError unless these fields of `config` lie in [0, 1)."""
    check(config, names, lambda value: 0 <= value < 1, "lie in [0, 1)")
