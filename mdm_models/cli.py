"""The command `mdm`: everything but training, for which there are recipes."""

import argparse
import sys
from collections.abc import Callable

from mdm_models.warning_lines import warn_in_one_line

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
    if name == "sample":
        from mdm_models import sample_command

        return sample_command.main
    if name == "convert":
        from mdm_models import convert

        return convert.main
    if name == "prepare":
        from mdm_models.prepare import command

        return command.main
    if name == "index":
        from mdm_models import index_command

        return index_command.main
    if name == "precompute":
        from mdm_models import precompute

        return precompute.main
    if name == "ema":
        from mdm_models.training import ema_command

        return ema_command.main
    if name == "evaluate":
        from mdm_models import evaluate_command

        return evaluate_command.main
    return _print_models


def _print_models(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mdm models", description="The names of the models.")
    parser.add_argument("pattern", nargs="?", default="*", help="a shell wildcard, such as 'mdm_t2v_*'")
    options = parser.parse_args(arguments)
    from mdm_models.zoo import list_models

    names = list_models(options.pattern)
    if not names:
        print(f"error: no model matches {options.pattern!r}; known are {', '.join(list_models())}", file=sys.stderr)
        return 2
    print("\n".join(names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
