"""What the user of a command can mend, each error and warning in one line."""

import warnings
from pathlib import Path

COME_AGAIN = 75
"""exit code of a run that is not finished, which the same command continues; sysexits.h calls it EX_TEMPFAIL"""
_PACKAGE = Path(__file__).parent
_standard = warnings.formatwarning


class TrainingError(Exception):
    """The run cannot start or go on; the message is one line, says what is wrong and names the file it is about."""


class DataError(TrainingError):
    """The data cannot be trained on."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be written, read or used."""


def one_line(error: BaseException) -> str:
    """Give an error's message without line breaks; its type's name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def warn_in_one_line() -> None:
    """Show this package's warnings as "warning: …" from here on, without the line of code; others stay as they are.

    For commands alone: in a user's own program the place of a warning is worth its second line.
    """
    warnings.formatwarning = _formatted


def _formatted(message, category, filename, lineno, line=None) -> str:
    if Path(filename).is_relative_to(_PACKAGE):
        return f"warning: {message}\n"
    return _standard(message, category, filename, lineno, line)
