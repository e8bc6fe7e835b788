"""Microsoft's Fluent Emoji in 3D → shards of captioned images and clips.

  mdm prepare fluent-emoji --out EMOJI             downloads 750 MB of npm packages to EMOJI/tarballs
  mdm prepare fluent-emoji --out EMOJI *.tgz       takes these packages, downloaded before

fluent-image-NNNNN.tar have every emoji in 256×256 as KEY.webp with transparency; fluent-video-NNNNN.tar have the
animated ones as KEY.mp4 on white, without those that differ in skin tone only. KEY is the emoji's code points, KEY.txt
its English name. The art is under the MIT licence, which is written to DIR/LICENSE.
"""

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from mdm_models.data.config import check_above_0
from mdm_models.data.media import BadSample
from mdm_models.data.prepare.clips import CRF
from mdm_models.data.prepare.folder import Files, ShardFolder
from mdm_models.data.prepare.images import checked_image
from mdm_models.data.prepare.npm import Package, download, members, name_of
from mdm_models.mp4 import evenly, write_mp4
from mdm_models.pictures import on_white
from mdm_models.storage import write_whole

PACKAGES = (
    Package("lobehub", "fluent-emoji-3d", "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="),
    Package("lobehub", "fluent-emoji-anim-1", "1.0.0",
        "/4m31vAuZEQ4aUJ5pxcOU5PVkuJya55GRxUZL7+zgLlxZXpzzE8jPqpDyhZICE3n47nS/Y9M5/vLdizi8201QA=="),
    Package("lobehub", "fluent-emoji-anim-2", "1.0.0",
        "S6yzf0RZXrQbXdxCWuHA9BAoLdBRk2flX+ne4TPGEH/qApwisCAKHoAAGjKSlTY3OVeZ9b7t/NEbmpjawnQYJA=="),
    Package("lobehub", "fluent-emoji-anim-3", "1.0.0",
        "UzRSUDMjdfdt9vER5bhjHkPqgc3EEgfGtYs6ndvizOTvQOxYQ57ow2RTkWSDZxwW30X4EYBi2eWTS7CXDDoFsg=="),
    Package("lobehub", "fluent-emoji-anim-4", "1.0.0",
        "IIkl5ztSd1HrzvIDt/uGsFoC1WODXRdYq5uROrnkyqi9DbToEcJ1nlY86PnoUXeFS9nBCnHfiYk3ouSEGThFmA=="),
)  # fmt: skip
IMAGES, CLIPS = "@lobehub/fluent-emoji-3d", "@lobehub/fluent-emoji-anim-"  # how the packages' names begin
FRAME_RATE = 24  # of the clips; the packages show each frame for 42 ms, a whole number nearest to 1/24 s
IMAGES_PER_SHARD = 1200
ANIMATIONS_PER_SHARD = 1000  # of which one in five becomes a clip
SKIN_TONES = {f"{tone:x}" for tone in range(0x1F3FB, 0x1F400)}
LICENCE = """\
Fluent Emoji: the images and clips in this directory

MIT License

Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""
Art = tuple[str, bytes]  # key, the file's content


@dataclass(frozen=True)
class Options:
    tarballs: tuple[Path, ...]
    """npm tarballs to take in place of downloading them"""
    out: Path
    """folder for the shards"""
    threads: int = os.cpu_count() or 1
    """how many work at a time; default: as many as processors"""

    def __post_init__(self):
        check_above_0(self, "threads")


def prepare(options: Options) -> list[ShardFolder]:
    """Make shards of Fluent emoji, still and animated. Raises ValueError or OSError in one line."""
    tarballs = options.tarballs or [download(package, options.out / "tarballs") for package in PACKAGES]
    named = sorted((name_of(path), path) for path in tarballs)
    for name, path in named:
        if not name.startswith((IMAGES, CLIPS)):
            raise ValueError(f"{path} is the package {name}; expected are {IMAGES} and {CLIPS}1 to -4")
    folder = ShardFolder(options.out, {"packages": [name for name, _ in named]})
    write_whole(options.out / "LICENSE", lambda path: path.write_text(LICENCE))
    images = [path for name, path in named if name.startswith(IMAGES)]
    clips = [path for name, path in named if name.startswith(CLIPS)]
    if images:
        _write(folder, images, "image", image_sample, IMAGES_PER_SHARD, options.threads)
    if clips:
        _write(folder, clips, "video", clip_sample, ANIMATIONS_PER_SHARD, options.threads)
    return [folder]


def _write(
    folder: ShardFolder, tarballs: list[Path], kind: str, make: Callable[[Art], Files], per_shard: int, threads: int
) -> None:
    items = ((art[0], art) for art in arts(tarballs))
    count = sum(1 for _ in arts(tarballs))
    prefix = f"fluent-{kind}-"
    folder.write(items, make, per_shard=per_shard, workers=threads, total=count, unit=f"{kind}s", prefix=prefix)


def arts(tarballs: list[Path]) -> Iterator[Art]:
    """The emoji of the packages, in their order."""
    for tarball in tarballs:
        for name, data in members(tarball):
            path = Path(name)
            if path.suffix == ".webp":
                yield path.stem, data


def image_sample(art: Art) -> Files:
    """Make the files of a still emoji's sample. Raises BadSample."""
    key, data = art
    caption = caption_of(key)
    image = checked_image(data)
    facts = {"caption": caption, "width": image.width, "height": image.height}
    return {image.suffix: image.data, "txt": caption.encode(), "json": json.dumps(facts).encode()}


def clip_sample(art: Art) -> Files:
    """Make the files of an animated emoji's sample. Raises BadSample, also for one that does not move."""
    key, data = art
    caption = caption_of(key)
    if SKIN_TONES & set(key.split("-")):
        raise BadSample("moves as another emoji does", "differs from it in skin tone")
    try:
        with Image.open(io.BytesIO(data)) as animation:
            frames = [frame for shown in ImageSequence.Iterator(animation) for frame in _at_frame_rate(shown)]
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise BadSample("undecodable", f"{type(error).__name__}: {error}") from None
    if len(frames) == 1:
        raise BadSample("does not move")
    width, height = frames[0].size
    mp4 = io.BytesIO()
    write_mp4(mp4, evenly(map(np.asarray, frames), Fraction(FRAME_RATE)), (width, height), Fraction(FRAME_RATE), CRF)
    facts = {"caption": caption, "frames": len(frames), "fps": FRAME_RATE, "width": width, "height": height}
    return {"mp4": mp4.getvalue(), "txt": caption.encode(), "json": json.dumps(facts).encode()}


def _at_frame_rate(shown: Image.Image) -> list[Image.Image]:
    """A frame of an animation, as often as it is shown at FRAME_RATE."""
    return [on_white(shown)] * max(1, round(shown.info.get("duration", 0) / 1000 * FRAME_RATE))


def caption_of(key: str) -> str:
    """Name an emoji in English by its code points: "1f427" → "penguin". Raises BadSample."""
    import emoji

    try:
        names = emoji.EMOJI_DATA["".join(chr(int(point, 16)) for point in key.split("-"))]
    except (KeyError, ValueError, OverflowError):
        raise BadSample("no name", "the file's name is not the code points of an emoji") from None
    return names["en"].strip(":").replace("_", " ")
