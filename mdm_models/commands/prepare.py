"""Turn a data set into the WebDataset shards that training reads.

  mdm prepare folder PICTURES --out SHARDS           your own pictures or clips, captioned in any of the usual ways
  mdm prepare captions cc12m.tsv --out CC12M         a list of captioned URLs (CC12M, WebVid, …): downloads them
  mdm prepare imagenet ILSVRC2012/train --out DIR    ImageNet, or any folder with a folder of images for each class
  mdm prepare emoji --out DIR                        drawings of things in eight styles, for a CPU
  mdm prepare fluent-emoji --out DIR                 3D emoji: a small data set of captioned images and clips

The same command again goes on where it was stopped, at any instant: shards that are done are left alone. What cannot be
used is skipped; DIR/report.json counts why, DIR/reports names each. `mdm prepare SOURCE --help` tells more.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from tyro.conf import Positional, arg, subcommand

from mdm_models.commands.line import command, paragraphs
from mdm_models.data.prepare import captioned_folder, captions, emoji, fluent_emoji, imagenet
from mdm_models.data.prepare.folder import ShardFolder


@dataclass(frozen=True)
class Folder(captioned_folder.Options):
    source = captioned_folder
    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]


@dataclass(frozen=True)
class Captions(captions.Options):
    source = captions
    url_list: Annotated[Positional[Path], arg(metavar="LIST")]


@dataclass(frozen=True)
class ImageNet(imagenet.Options):
    source = imagenet
    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]


@dataclass(frozen=True)
class Emoji(emoji.Options):
    source = emoji
    tarballs: Annotated[Positional[tuple[Path, ...]], arg(metavar="TARBALL")]


@dataclass(frozen=True)
class FluentEmoji(fluent_emoji.Options):
    source = fluent_emoji
    tarballs: Annotated[Positional[tuple[Path, ...]], arg(metavar="TARBALL")]


Options = (
    Annotated[Folder, subcommand("folder", description=paragraphs(captioned_folder.__doc__))]
    | Annotated[Captions, subcommand("captions", description=paragraphs(captions.__doc__))]
    | Annotated[ImageNet, subcommand("imagenet", description=paragraphs(imagenet.__doc__))]
    | Annotated[Emoji, subcommand("emoji", description=paragraphs(emoji.__doc__))]
    | Annotated[FluentEmoji, subcommand("fluent-emoji", description=paragraphs(fluent_emoji.__doc__))]
)


def prepare(options: Options) -> None:
    """Make shards and print what they hold. Raises OSError or ValueError in one line."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are skipped by their size
    source: Any = options.source  # whose options these are
    folders: list[ShardFolder] = source.prepare(options)
    for folder in folders:
        print(folder.summary())
    if not any(folder.written for folder in folders):
        raise ValueError(f"nothing was written to {folders[0].out}; {folders[0].reports} says why of each sample")


main = command("prepare", __doc__, Options, prepare)  # pyright: ignore[reportArgumentType]: a union, as tyro takes
