"""Turn a data set into the WebDataset shards that training reads.

  mdm prepare folder PICTURES --out SHARDS           your own pictures or clips, captioned in any of the usual ways
  mdm prepare captions cc12m.tsv --out CC12M         an index of captioned URLs (CC12M, WebVid, …): downloads them
  mdm prepare imagenet ILSVRC2012/train --out DIR    ImageNet, or any folder with a folder of images for each class
  mdm prepare emoji --out DIR                        drawings of things in eight styles, for a CPU
  mdm prepare fluent-emoji --out DIR                 3D emoji: a small data set of captioned images and clips

The same command again goes on where it was stopped, at any instant: shards that are done are left alone. What cannot be
used is skipped; DIR/report.json counts why, DIR/reports names each. `mdm prepare SOURCE --help` tells more.
"""

import argparse
import warnings

from PIL import Image

from mdm_models.commands.line import checked, exit_code
from mdm_models.data.prepare import captioned_folder, captions, emoji, fluent_emoji, imagenet

SOURCES = {
    "folder": captioned_folder,
    "captions": captions,
    "imagenet": imagenet,
    "emoji": emoji,
    "fluent-emoji": fluent_emoji,
}
MAY_BE_0 = ("retries", "held_out")


def main(arguments: list[str] | None = None) -> int:
    return exit_code("mdm prepare", lambda: prepare(checked(parse_arguments(arguments))))


def prepare(options: argparse.Namespace) -> None:
    """Raises OSError or ValueError in one line."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are skipped by their size
    folders = SOURCES[options.source].prepare(options)
    for folder in folders:
        print(folder.summary())
    if not any(folder.written for folder in folders):
        raise ValueError(f"nothing was written to {folders[0].out}; {folders[0].reports} says why of each sample")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="mdm prepare", description=__doc__, formatter_class=form)
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", required=True, help=", ".join(SOURCES))
    for name, source in SOURCES.items():
        source.add_arguments(sources.add_parser(name, description=source.__doc__, formatter_class=form))
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, int) and value < (least := 0 if name in MAY_BE_0 else 1):
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        if isinstance(value, float) and value <= 0 and not (value == 0 and name in MAY_BE_0):
            parser.error(f"--{name.replace('_', '-')} {value:g}: must be above 0")
    return options
