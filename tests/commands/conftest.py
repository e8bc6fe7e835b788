"""The shards, checkpoints and recipes of a test."""

from tests.made_data import bucket, clip, pictures_of, shard_of  # noqa: F401 (fixtures)
from tests.models.conftest import official_checkpoint  # noqa: F401
from tests.recipes.conftest import recipe  # noqa: F401
