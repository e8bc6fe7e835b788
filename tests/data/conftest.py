"""The shards that are made for a test."""

from tests.made_data import bucket, clip, pictures_of, shard_of  # noqa: F401 (fixtures)
