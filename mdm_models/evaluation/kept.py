"""Samples that an evaluation keeps as files, so that it can be stopped and gone on with, and looked at."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mdm_models.data.stream import to_unit_range
from mdm_models.pictures import Clip, to_pictures
from mdm_models.storage import begin, write_whole


class KeptSamples:
    """Keeps samples in a folder as NUMBER.png or .mp4, with the caption in NUMBER.txt.

    settings: all that samples follow from, as JSON knows it. Raises ValueError if the folder has samples of others.
    All processes may make one of the same folder.
    """

    def __init__(self, folder: Path, frame_rate: float, settings: dict[str, object]):
        begin(folder, settings)
        self.folder, self.frame_rate = folder, frame_rate

    def load(self, numbers: list[int]) -> Tensor | None:
        """Load samples (N, 3, H, W) in −1…1, which count as the samples that were kept do, to the last bit; None if any
        is missing. Clips, whose files are not what was drawn, are always missing."""
        paths = [self._path(number).with_suffix(".png") for number in numbers]
        if not paths or not all(path.is_file() for path in paths):
            return None
        pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
        return to_unit_range(torch.from_numpy(pixels).movedim(-1, 1).contiguous())  # in memory as they were drawn

    def save(self, numbers: list[int], sampled: Tensor, captions: list[str]) -> None:
        """Write samples (N, 3, [T,] H, W) in −1…1 and their captions under their numbers."""
        for number, picture, caption in zip(numbers, to_pictures(sampled, self.frame_rate), captions, strict=True):
            path = self._path(number)
            path.with_suffix(".txt").write_text(caption + "\n")
            if isinstance(picture, Clip):
                picture.save(path.with_suffix(".mp4"))
            else:  # written last: where it is, all is
                write_whole(path.with_suffix(".png"), lambda partial, shown=picture: shown.save(partial, format="PNG"))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}"
