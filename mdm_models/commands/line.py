"""What the commands have in common: options that a dataclass declares, errors in one line, and exit codes.

0: it is done. 2: something that the user can mend, which one line says. 1: a defect of ours, with its traceback.
130: stopped by Ctrl-C. 75: training was asked to stop, or lost one of its processes; the same command goes on.
"""

import contextlib
import dataclasses
import io
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, OmitSubcommandPrefixes

from mdm_models.commands.refusal import refusal
from mdm_models.errors import TrainingError, one_line, warn_in_one_line
from mdm_models.memory import keep_freed_memory
from mdm_models.storage import check_local

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Dtype = Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
DONE, REFUSED, STOPPED = 0, 2, 130
MISTAKEN = {
    FileExistsError: "there is a file where a folder is needed; give the path of a folder",
    NotADirectoryError: "a file stands where one of its folders should be; give another path",
    IsADirectoryError: "there is a folder where a file is needed; give the path of a file",
}
MARKERS = (OmitArgPrefixes, OmitSubcommandPrefixes, FlagCreatePairsOff)

Options = TypeVar("Options")
Fields = TypeVar("Fields", bound="DataclassInstance")
Main = Callable[[list[str] | None], int]


def command(
    name: str,
    description: str | None,
    options: type[Options],
    act: Callable[[Options], int | None],
    urls: Sequence[str] = (),
) -> Main:
    """Make the main function of `mdm NAME`: arguments, those of the process if None → exit code.

    description: its help text. options: a dataclass whose fields' docstrings are the rest of it. urls:
    names of the paths that may be URLs.
    """

    def main(arguments: list[str] | None = None) -> int:
        arguments = sys.argv[1:] if arguments is None else arguments
        program = f"mdm {name}"
        return exit_code(program, lambda: act(checked(parse(program, description, options, arguments), urls)))

    return main


def parse(
    program: str, description: str | None, options: type[Options], arguments: list[str], config=MARKERS, **more
) -> Options:
    """Read the options that a command line gives, as `tyro.cli` reads it; --help ends the process. "~/" that the shell
    left, as in --out=~/pictures, is the user's home. Raises ValueError in one line for a wrong option."""
    home = os.path.expanduser("~/")
    arguments = [re.sub(r"^(--[\w-]+=)?~/", lambda begin: (begin[1] or "") + home, argument) for argument in arguments]

    def read(arguments: list[str]) -> Options:
        shown = paragraphs(description)
        return tyro.cli(options, prog=program, description=shown, args=arguments, config=config, **more)

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = read(arguments)
    except SystemExit as end:
        if end.code in (None, DONE):
            raise
        raise ValueError(refusal(read, program, arguments)) from None
    sys.stderr.write(said.getvalue())
    return found


def paragraphs(description: str | None) -> str | None:
    """A help text as tyro shows it right: a paragraph in one line, and an empty line after a block that is indented.

    tyro itself breaks a paragraph before a line that begins with no letter, and joins one that follows a block to it.
    """
    joined = re.sub(r"(?m)^(\S.*)\n(?=\S)", r"\1 ", description or "")
    return re.sub(r"(?m)^( .*)\n(?=\S)", r"\1\n\n", joined) or None


def checked(options: Options, urls: Sequence[str] = ()) -> Options:
    """Return the options themselves. Raises ValueError for a URL where a path on a local disk is meant, as in all but
    `urls`."""
    hints = typing.get_type_hints(type(options), include_extras=True)
    for name, value in vars(options).items():
        told = [getattr(part, "name", None) for part in getattr(hints.get(name), "__metadata__", ())]  # arg(name=…)
        shown = next(filter(None, told), name)
        for path in value if isinstance(value, list | tuple) else [value]:
            if isinstance(path, Path) and name not in urls:
                check_local(path, f"--{shown.replace('_', '-')}")
    return options


def exit_code(program: str, act: Callable[[], int | None]) -> int:
    """Run a command, which may give an exit code itself; what the user can mend is said in one line."""
    warn_in_one_line()
    keep_freed_memory()
    try:
        return act() or DONE
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "mdm_models", "mdm_kernels"):
            raise
        extra = "web" if package == "gradio" else "train"
        print(f"{program}: error: {package} is not installed: pip install 'mdm-kernels[{extra}]'", file=sys.stderr)
        return REFUSED
    except (TrainingError, OSError, ValueError, TypeError) as error:
        print(f"{program}: error: {_said(error)}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"{program}: stopped; the same command goes on", file=sys.stderr)
        return STOPPED


def _said(error: Exception) -> str:
    """An error in one line; where a file is in the place of a folder, or the reverse, with what to do about it."""
    if isinstance(error, OSError) and error.filename is not None and type(error) in MISTAKEN:
        return f"{error.filename}: {MISTAKEN[type(error)]}"
    return one_line(error)


def check_steps(steps: int | None) -> None:
    """Raise ValueError for fewer than 1 sampling step; None leaves the number to the model."""
    if steps is not None and steps < 1:
        raise ValueError(f"--steps {steps}: num_inference_steps is {steps}; it must be at least 1")


def like(kind: type[Fields], values: object) -> Fields:
    """Make a dataclass of type `kind` from the fields of the same names that `values` has."""
    return kind(**{field.name: getattr(values, field.name) for field in dataclasses.fields(kind)})


def device_of(name: str) -> torch.device:
    """The device of that name; of "auto", a GPU if there is one. Raises ValueError if there is none of that name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter by a PyTorch that was built for CPUs alone
        raise ValueError(f"--device {name}: {one_line(error)}") from None
    return device


def dtype_of(name: Dtype | None, device: torch.device) -> torch.dtype | None:
    """The dtype of that name; of None, bfloat16 on a GPU and elsewhere None, for which `Pipeline.from_pretrained` knows
    what the device has units for."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else None
    return DTYPES[name]
