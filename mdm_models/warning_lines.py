"""Warnings as a command shows them."""

import warnings
from pathlib import Path

_PACKAGE = Path(__file__).parent
_standard = warnings.formatwarning


def warn_in_one_line() -> None:
    """Show this package's warnings as "warning: …" from here on, without the line of code; others stay as they are.

    For commands alone: in a user's own program the place of a warning is worth its second line.
    """
    warnings.formatwarning = _formatted


def _formatted(message, category, filename, lineno, line=None) -> str:
    if Path(filename).is_relative_to(_PACKAGE):
        return f"warning: {message}\n"
    return _standard(message, category, filename, lineno, line)
