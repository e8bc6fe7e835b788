"""Which kernels and tiles group_norm_silu launches for which sizes, learnt from meta tensors. No kernel runs here."""

import pytest
import torch

from mdm_kernels import backend
from mdm_kernels.library import ops

HELD_GROUP = ["held_group_forward", "held_group_backward"]
WALKED_GROUP = ["group_forward", "group_backward"]
TILES = [
    *("tile_statistics", "combine_statistics", "apply_forward"),
    *("tile_gradient_sums", "combine_gradient_sums", "apply_backward"),
]


def launched(*shape: int, skip=0, channels_last=True, groups=32) -> dict[str, dict]:
    """{kernel: its arguments} of forward and backward in bfloat16."""

    def image(channels):
        x = torch.empty(shape[0], channels, *shape[2:], dtype=torch.bfloat16, device="meta")
        return x.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    found = {}
    x, second = image(shape[1]), image(skip) if skip else None
    with backend.recording(lambda kernel, arguments: found.setdefault(kernel.fn.__name__, arguments)):
        y, mean, rstd = ops.group_norm_silu_forward(x, second, groups, None, None, None, None, 1e-5, True)
        ops.group_norm_silu_backward(y, x, second, mean, rstd, groups, None, None, None, None, True)
    return found


@pytest.mark.parametrize(("rows", "kernels"), [(1, WALKED_GROUP), (2, TILES)], ids=["2 MB", "4 MB"])
def test_channels_last_calls_go_by_tiles_from_4_mb_on(rows, kernels):
    assert list(launched(rows, 256, 64, 64)) == kernels


@pytest.mark.parametrize(("rows", "kernels"), [(1, WALKED_GROUP), (2, TILES)], ids=["3 MB", "6 MB"])
def test_the_skip_counts_as_much_as_x(rows, kernels):
    assert list(launched(rows, 512, 32, 32, skip=1024)) == kernels


@pytest.mark.parametrize("rows", [2, 64])
def test_channels_last_groups_that_registers_hold_are_held_however_large_the_call(rows):
    assert list(launched(rows, 512, 32, 32)) == list(launched(rows, 768, 16, 16)) == HELD_GROUP


def test_contiguous_groups_that_fit_are_whole_however_large_the_call():
    assert list(launched(64, 512, 32, 32, channels_last=False)) == WALKED_GROUP


def test_contiguous_groups_of_one_tile_are_held():
    assert list(launched(2, 64, 8, 8, channels_last=False)) == HELD_GROUP


@pytest.mark.parametrize(
    ("channels", "block_c", "block_s"), [(256, 128, 32), (768, 128, 32), (320, 32, 128), (64, 32, 128), (16, 16, 256)]
)
def test_channels_last_tiles_have_4096_elements_in_4_warps(channels, block_c, block_s):
    found = launched(16, channels, 128, 128, groups=8)
    for kernel in ("tile_statistics", "apply_forward", "tile_gradient_sums", "apply_backward"):
        tile = {name: found[kernel][name] for name in ("BLOCK_C", "BLOCK_S", "num_warps")}
        assert tile == {"BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": 4}


def elements_a_thread(arguments: dict) -> float:
    return arguments["BLOCK_C"] * arguments["BLOCK_S"] / arguments["num_warps"] / 32


@pytest.mark.parametrize(("channels_last", "forward", "warps"), [(True, 16, 8), (False, 8, 16)])
def test_a_thread_of_a_walked_group_holds_more_where_it_reads_one_tensor(channels_last, forward, warps):
    found = launched(1, 1024, 32, 32, channels_last=channels_last)
    assert [found[kernel]["num_warps"] for kernel in WALKED_GROUP] == [warps] * 2
    assert [elements_a_thread(found[kernel]) for kernel in WALKED_GROUP] == [forward, 8]


@pytest.mark.parametrize(("channels", "size", "warps"), [(512, 32, (8, 16)), (768, 16, (8, 8)), (64, 16, (1, 1))])
def test_a_thread_of_a_held_group_has_32_elements_and_forward_twice_as_many_where_the_group_is_large(
    channels, size, warps
):
    found = launched(2, channels, size, size)
    assert tuple(found[kernel]["num_warps"] for kernel in HELD_GROUP) == warps
    assert all(given["BLOCK_S"] == size**2 for given in (found[kernel] for kernel in HELD_GROUP))
