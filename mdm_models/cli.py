"""The command `mdm`: everything but training, for which there are recipes."""

import argparse
import importlib
import sys
from collections.abc import Callable

from mdm_models.errors import warn_in_one_line

COMMANDS = {
    "sample": "prompts → pictures or clips",
    "convert": "an official checkpoint, or the diffusers port → a model directory",
    "prepare": "CC12M, WebVid, ImageNet, emoji → shards for training",
    "index": "where the samples of shards lie → a small file beside each",
    "precompute": "captions of shards → text features on disk",
    "ema": "a run's snapshots → its weights averaged over another width",
    "evaluate": "a saved model → FID, CLIP score and loss on samples held out of training",
    "models": "the names of the models",
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="mdm",
        description="Matryoshka Diffusion models.",
        epilog="\n".join(f"  mdm {name:12}{purpose}" for name, purpose in COMMANDS.items())
        + "\n\n`mdm COMMAND --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    warn_in_one_line()
    return _command(parser.parse_args(arguments[:1]).command)(arguments[1:])


def _command(name: str) -> Callable[[list[str]], int]:
    """The main function of a command, and no other's imports."""
    return importlib.import_module(f"mdm_models.commands.{name}").main


if __name__ == "__main__":
    sys.exit(main())
