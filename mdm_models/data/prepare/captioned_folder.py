"""A folder of your own pictures or clips → shards.

  mdm prepare folder PICTURES --out SHARDS
  mdm prepare folder PICTURES --out SHARDS --size 512 --caption "a photo of my cat"

FOLDER is searched at any depth (its folder `train` alone, if it has one). What a picture shows is said, in this order,
by
  metadata.jsonl, metadata.csv   in any folder, as Hugging Face's imagefolder: file_name, and caption, text or name
  a.txt, a.caption, a.json       beside a.jpg, or a.jpg.txt; of a .json "caption" or "text"
  the folder that it lies in     red_apple/1.jpg shows "red apple"
  --caption                      else
If folders say it of every picture, KEY.cls has the folder's number and DIR/classes.txt their names, for --text-encoder.
A folder with .parquet or .arrow files, a data set of Hugging Face's `datasets`, is read row by row. Pictures are
shuffled over the shards, in the same way in every run.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from mdm_models.data.cache import ShardCache
from mdm_models.data.config import DataConfig, check_above_0
from mdm_models.data.media import BadSample
from mdm_models.data.prepare.captioned_files import (
    Captioned,
    captioned_files,
    fingerprint,
    holds_pictures,
    is_media,
    tables,
    walk,
)
from mdm_models.data.prepare.clips import checked_clip, clip_suffix
from mdm_models.data.prepare.folder import REPORT, Files, ShardFolder
from mdm_models.data.prepare.hugging_face import HuggingFaceRows
from mdm_models.data.prepare.images import checked_image
from mdm_models.data.shards import open_shards
from mdm_models.storage import write_whole

PER_SHARD = 1000
LEAST_SIZE = 512  # pixels that a picture keeps in the cache, enough for every stage of a small model


@dataclass(frozen=True)
class Options:
    folder: Path
    """has pictures or clips, at any depth"""
    out: Path
    """folder for the shards"""
    size: int | None = None
    """shrink what is larger to this shorter side, in pixels; default: keep it"""
    caption: str = ""
    """of pictures that have none; empty: they are skipped"""
    per_shard: int = PER_SHARD
    """pictures in a shard"""
    threads: int = os.cpu_count() or 1
    """how many work at a time; default: as many as processors"""

    def __post_init__(self):
        check_above_0(self, "size", "per_shard", "threads")


def prepare(options: Options) -> list[ShardFolder]:
    """Make shards of a folder of pictures or clips. Raises ValueError or OSError in one line."""
    given = (options.folder, options.out, options.size, options.caption, options.per_shard, options.threads)
    return [shards_of_folder(*given)]


def shards_of_folder(
    root: Path,
    out: Path,
    size: int | None,
    caption: str = "",
    per_shard: int = PER_SHARD,
    threads: int = os.cpu_count() or 1,
) -> ShardFolder:
    """Make shards in the folder `out` of the pictures and clips under `root`.

    size: the shorter side in pixels to which larger pictures are shrunk; caption: of pictures that have none.

    Raises ValueError or OSError in one line.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; give one of pictures or clips")
    if out.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"--out {out} lies in {root}, where shards would be searched for pictures; choose another")
    root = _training(root)
    settings = {"files": fingerprint(root), "size": size, "caption": caption, "per-shard": per_shard}
    if files := tables(root):
        rows = HuggingFaceRows(files)
        items, total, classes = rows, len(rows), rows.classes
    else:
        found, classes = captioned_files(root, caption)
        items, total = _shuffled(found), len(found)
    folder = ShardFolder(out, settings)
    if classes:
        write_whole(out / "classes.txt", lambda path: path.write_text("".join(f"{name}\n" for name in classes)))

    def make(item: Captioned) -> Files:
        return sample_of(item, size, caption)

    folder.write(items, make, per_shard=per_shard, workers=threads, total=total, unit="pictures")
    return folder


def shards_for(names: Sequence[str], size: int, cache: str = "") -> tuple[str, ...]:
    """Give the names with a folder of shards in place of each folder of pictures, made in the cache folder if it is not
    there: once, whatever the processes of this machine and the runs that ask for it.

    size: of training, in pixels; larger pictures are shrunk to LEAST_SIZE or this. cache: "" for the user's cache
    directory. Raises ValueError or OSError in one line.
    """
    return tuple(_shards_for(Path(name), max(size, LEAST_SIZE), cache) if _is_plain(name) else name for name in names)


def count_samples(names: Sequence[str]) -> int:
    """How many samples there are in shards and in folders of pictures. Raises DataError or ValueError in one line."""
    plain = [Path(name) for name in names if _is_plain(name)]
    shards = tuple(name for name in names if not _is_plain(name))
    pictures = sum(_count(_training(root)) for root in plain)
    return pictures + sum(map(len, open_shards(DataConfig(shards)) if shards else ()))


def _count(root: Path) -> int:
    files = tables(root)
    return len(HuggingFaceRows(files)) if files else sum(map(is_media, walk(root)))


def _is_plain(name: str) -> bool:
    """Whether that is a folder of pictures and not of shards."""
    return os.path.isdir(name) and not any(Path(name).glob("*.tar")) and holds_pictures(Path(name))


def _shards_for(root: Path, size: int, cache: str) -> str:
    count, digest = fingerprint(_training(root)).split()
    name = re.sub(r"[^\w-]+", "_", root.resolve().name)
    out = ShardCache.of(cache, 0).folder / "folders" / f"{name}-{count}-{digest}-{size}"
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / ".preparing"):
        if not (out / REPORT).exists():
            print(f"{root} is a folder of pictures; shards of it are made once, in {out}")
            print(shards_of_folder(root, out, size).summary())
    if not any(out.glob("*.tar")):
        raise ValueError(f"none of the pictures of {root} can be used; {out / 'reports'} says why of each")
    return str(out)


def _training(root: Path) -> Path:
    """The folder of the part that is for training, if there is one."""
    return root / "train" if (root / "train").is_dir() else root


def _shuffled(items: list[tuple[str, Captioned]]) -> Iterable[tuple[str, Captioned]]:
    return (items[i] for i in np.random.default_rng(0).permutation(len(items)))


def sample_of(item: Captioned, size: int | None, caption: str) -> Files:
    """Make the files of one sample. caption: that of an item that has none. Raises BadSample."""
    text = item.read_caption() or caption
    if not text:
        raise BadSample("caption missing", "no line of metadata, no .txt, .caption or .json beside it")
    data = item.read()
    facts: dict[str, object] = {"file": item.name, "caption": text}
    if clip_suffix(data):
        media = checked_clip(data, size)
        facts |= {"frames": media.frames, "fps": media.fps}
    else:
        media = checked_image(data, size)
    facts |= {"width": media.width, "height": media.height}
    files = {media.suffix: media.data, "txt": text.encode(), "json": json.dumps(facts, ensure_ascii=False).encode()}
    return files if item.label is None else files | {"cls": str(item.label).encode()}
