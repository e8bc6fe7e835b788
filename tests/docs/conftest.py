"""Recipes, for the commands that the documents show."""

from tests.recipes.conftest import recipe  # noqa: F401
