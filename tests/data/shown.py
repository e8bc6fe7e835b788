"""What the tests of how pictures and clips are shown have in common."""

from pathlib import Path

from torch import Tensor

FILES = Path(__file__).parents[1] / "files"


def contents(name: str) -> bytes:
    return (FILES / name).read_bytes()


def colour(image: Tensor) -> list[float]:
    """The mean of each channel of an image, (C, T, H, W)."""
    return image.float().mean(dim=(1, 2, 3)).tolist()
