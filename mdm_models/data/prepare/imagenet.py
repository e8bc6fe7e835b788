"""ImageNet, or any folder with a folder of images a class → shards with class numbers and names.

  mdm prepare imagenet ILSVRC2012/train --out IMAGENET --size 256
  mdm prepare imagenet FLOWERS --out SHARDS --names names.txt

A sample is KEY.jpg (.png, .webp), KEY.cls with its class's number, KEY.txt with its name. Classes are numbered in the
order of their folders' names, as in torchvision's ImageFolder. DIR/classes.txt has a class's name on each line: give it
to training as --text-encoder. Images are shuffled over the shards, in the same way in every run.
"""

import hashlib
import itertools
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mdm_models.data.config import check_above_0
from mdm_models.data.prepare.captioned_files import IMAGES, contents, walk
from mdm_models.data.prepare.folder import Files, ShardFolder
from mdm_models.data.prepare.images import checked_image
from mdm_models.plain_text import legible, read_lines, stripped
from mdm_models.storage import write_whole

SYNSET = re.compile(r"n\d{8}")
IMAGENET_CLASSES = 1000
Picture = tuple[Path, int]  # file, class number


@dataclass(frozen=True)
class Options:
    folder: Path
    """has a folder for each class, or a folder `train` that has"""
    out: Path
    """folder for the shards"""
    size: int | None = None
    """shrink what is larger to this shorter side, in pixels; default: keep it"""
    names: Path | None = None
    """a file with a line `FOLDER NAME` for each class, such as ImageNet's LOC_synset_mapping.txt; of several names with
    commas between them the first counts; default: ImageNet's own for its 1000 classes, else the folders' names"""
    images_per_shard: int = 2000
    """images in a shard"""
    threads: int = os.cpu_count() or 1
    """how many work at a time; default: as many as processors"""

    def __post_init__(self):
        check_above_0(self, "size", "images_per_shard", "threads")


def prepare(options: Options) -> list[ShardFolder]:
    """Make shards of pictures that lie in a folder for each class. Raises ValueError or OSError in one line."""
    root = options.folder
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; give one that has a folder of images for each class")
    classes = _subfolders(root)
    if "train" in classes and _subfolders(root / "train"):
        root, classes = root / "train", _subfolders(root / "train")
    if not classes:
        raise ValueError(f"{root} has no folders; there must be one for each class, with its images")
    names = class_names(classes, options.names)
    items = keyed(pictures(root, classes), root)
    if not items:
        raise ValueError(f"the folders of {root} have no images ({', '.join(IMAGES)})")
    listed = "\n".join([*names, *(key for key, _ in items)])
    settings = {
        "images": f"{len(items)} {hashlib.sha256(listed.encode()).hexdigest()[:16]}",
        "size": options.size,
        "images-per-shard": options.images_per_shard,
    }
    folder = ShardFolder(options.out, settings)
    write_whole(options.out / "classes.txt", lambda path: path.write_text("".join(f"{name}\n" for name in names)))

    def make(picture: Picture) -> Files:
        file, number = picture
        image = checked_image(contents(file), options.size)
        return {image.suffix: image.data, "cls": str(number).encode(), "txt": names[number].encode()}

    order = np.random.default_rng(0).permutation(len(items))
    folder.write(
        (items[i] for i in order), make,
        per_shard=options.images_per_shard, workers=options.threads, total=len(items), unit="images",
    )  # fmt: skip
    return [folder]


def pictures(root: Path, classes: list[str]) -> list[Picture]:
    """The image files in the folders of the classes, at any depth, in the order of their names.

    As in ImageFolder linked folders are entered, each once; what is hidden, as notebooks keep it, is left alone.
    """
    return [
        (path, number)
        for number, name in enumerate(classes)
        for path in walk(root / name)
        if path.suffix.lower() in IMAGES
    ]


def keyed(files: list[Picture], root: Path) -> list[tuple[str, Picture]]:
    """Pair each picture with a key of its own, made of its path: it stays the same when other files come or go.

    ImageNet's n01440764/n01440764_10026.JPEG has the key n01440764_10026. A key has no dot: the suffix begins there.
    """
    items: dict[str, Picture] = {}
    for path, number in files:
        folder, *parts = path.relative_to(root).with_suffix("").parts
        stem = "_".join(parts)
        stem = stem if stem.startswith(folder) else f"{folder}_{stem}"
        key = free = re.sub(r"[.\s]", "_", legible(stem))
        for twin in itertools.count(2):  # a.png beside a.jpg
            if free not in items:
                break
            free = f"{key}-{twin}"
        items[free] = path, number
    return list(items.items())


def class_names(classes: list[str], file: Path | None) -> list[str]:
    """Name each class, all differently: from `file`, ImageNet's, or the folder's. Raises ValueError."""
    if file is not None:
        names = _names_of(file, classes)
    elif len(classes) == IMAGENET_CLASSES and all(SYNSET.fullmatch(name) for name in classes):
        from open_clip import IMAGENET_CLASSNAMES as names  # in the order of the folders' names, as ImageNet's numbers
    else:
        names = [legible(name).replace("_", " ") for name in classes]
    uses = Counter(name.lower() for name in names)
    return [
        f"{name} ({legible(folder)})" if uses[name.lower()] > 1 else name
        for name, folder in zip(names, classes, strict=True)
    ]


def _names_of(file: Path, classes: list[str]) -> list[str]:
    lines = (line.split(None, 1) for line in map(stripped, read_lines(file)) if line)
    named = {first: rest[0].split(",")[0].strip() for first, *rest in lines if rest}
    classes = [legible(name) for name in classes]
    missing = [name for name in classes if not named.get(name)]
    if missing:
        raise ValueError(f"{file} has no line `{missing[0]} NAME`; it lacks {len(missing)} of {len(classes)} classes")
    return [named[name] for name in classes]


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
