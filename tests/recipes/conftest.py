"""Recipes, imported as `mdm train` does."""

import importlib
from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def recipe() -> Callable[[str], ModuleType]:
    """recipe("t2v_webvid") → the module."""
    return lambda name: importlib.import_module(f"mdm_models.recipes.{name}")
