"""The command `mdm`: one file a command in `mdm_models.commands`, which is imported when it is called."""

import difflib
import importlib
import sys

from mdm_models.commands.line import DONE, REFUSED, exit_code

COMMANDS = {
    "train": "a recipe and captioned data → a model",
    "sample": "prompts → pictures or clips",
    "web": "a page in the browser to draw with a model",
    "prepare": "a folder of pictures, CC12M, WebVid, ImageNet, emoji → shards for training",
    "index": "where the samples of shards lie → a small file beside each",
    "precompute": "captions of shards → text features on disk",
    "convert": "an official checkpoint, or the diffusers port → a model directory",
    "evaluate": "a saved model → FID, CLIP score and loss on samples held out of training",
    "ema": "a run's snapshots → its weights averaged over another width",
    "models": "the names of the models",
    "ship": "a run → a model that comes with this package",
}


def main(arguments: list[str] | None = None) -> int:
    """Run `mdm COMMAND …` with these arguments, or with those of the process; → exit code, see
    `mdm_models.commands.line`."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return DONE
    if name == "--version":
        print(_version())
        return DONE
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(COMMANDS)}"
        print(f"mdm: error: no command is named {name!r}; {hint}", file=sys.stderr)
        return REFUSED
    return exit_code(f"mdm {name}", lambda: importlib.import_module(f"mdm_models.commands.{name}").main(rest))


def _help() -> str:
    lines = [f"  mdm {name:12}{purpose}" for name, purpose in COMMANDS.items()]
    codes = (
        "Exit codes: 0 done; 2 something to mend, which one line says; 1 a defect of mdm; 130 stopped by Ctrl-C;\n"
        "75 training stopped before its end: the same command goes on."
    )
    title = "usage: mdm COMMAND [OPTIONS]\n\nMatryoshka Diffusion models."
    return "\n".join([title, "", *lines, "  mdm --version", "", "`mdm COMMAND --help` tells more.", codes])


def _version() -> str:
    import torch

    from mdm_models import __version__

    return f"mdm {__version__}, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
