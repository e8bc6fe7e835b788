"""The ways in which group_norm_silu's kernels may go through a group, each of which tests can force at any size."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from mdm_kernels import plans
from mdm_kernels.group_norm import launch

ANY = 2**20
"""bytes or elements that no test's group has"""
LIMITS = {
    "held group": {"WHOLE_GROUP_BYTES": ANY, "HELD_GROUP": ANY},  # but contiguous ones of several tiles are walked
    "walked group": {"WHOLE_GROUP_BYTES": ANY, "HELD_GROUP": 0},
    "tiles": {"WHOLE_GROUP_BYTES": 0},
    "one pass": {"WHOLE_GROUP_BYTES": 0},
}
PATHS = tuple(LIMITS)


@contextlib.contextmanager
def along(path: str) -> Iterator[None]:
    """Inside the block, kernels go through groups along this path."""
    plans.forget()
    try:
        with mock.patch.multiple(launch, **LIMITS[path]), launch.one_pass("1" if path == "one pass" else "0"):
            yield
    finally:
        plans.forget()
