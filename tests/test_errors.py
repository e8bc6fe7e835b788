"""Warnings as a command shows them."""

import warnings

import pytest

from mdm_models import errors
from mdm_models.errors import warn_in_one_line


@pytest.fixture(autouse=True)
def only_here(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)


def test_ours_are_one_line_and_others_name_their_place():
    others = warnings.formatwarning("careful", UserWarning, "elsewhere.py", 3, "code()")
    warn_in_one_line()
    assert warnings.formatwarning("careful", UserWarning, errors.__file__, 3) == "warning: careful\n"
    assert warnings.formatwarning("careful", UserWarning, "elsewhere.py", 3, "code()") == others
    assert "elsewhere.py:3" in others
