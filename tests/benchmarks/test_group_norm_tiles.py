import json

import pytest
import torch

from benchmarks import group_norm_tiles, shapes
from benchmarks.group_norm_tiles import Rule, Tiles, WholeGroup
from mdm_kernels import backend
from mdm_kernels.library import ops


def launched(choice, *shape: int) -> dict[str, tuple[int, int, int]]:
    """{kernel: its tile and warps} of forward."""
    found = {}
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    with choice.used(), backend.recording(lambda kernel, given: found.setdefault(kernel.fn.__name__, given)):
        ops.group_norm_silu_forward(x, None, 32, None, None, None, None, 1e-5, True)
    return {
        kernel: (given["BLOCK_C"], given["BLOCK_S"], given["num_warps"])
        for kernel, given in found.items()
        if "BLOCK_S" in given
    }


@pytest.mark.parametrize("batch", [1, 64])
def test_each_choice_is_launched_at_any_size(batch):
    shape = (batch, 256, 64, 64)
    assert launched(Tiles(64, 4096, 4), *shape) == dict.fromkeys(("tile_statistics", "apply_forward"), (64, 64, 4))
    assert launched(WholeGroup(16, 8), *shape) == {"group_forward": (8, 512, 8)}


def test_the_rule_holds_again_after_a_choice():
    before = launched(Rule(), 2, 256, 64, 64)
    launched(Tiles(64, 4096, 4), 2, 256, 64, 64)
    assert launched(Rule(), 2, 256, 64, 64) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="would time a GPU")
def test_every_choice_at_every_size_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "GROUP_NORMS", {(2, 2): 1})
    monkeypatch.setattr(group_norm_tiles, "GROUPS", 1)
    monkeypatch.setattr(group_norm_tiles, "CHOICES", (Rule(), Tiles(4, 16, 4), WholeGroup(8, 8)))
    monkeypatch.setattr(group_norm_tiles, "CACHE_BYTES", {"cpu": 0})
    monkeypatch.setattr(group_norm_tiles, "DTYPE", torch.float32)
    group_norm_tiles.main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path / "tiles.json")])
    rows = json.loads((tmp_path / "tiles.json").read_text())
    assert [(*row["shape"], row["choice"]) for row in rows] == [
        (batch, 2, 2, choice) for batch in (1, 2) for choice in ("Rule", "Tiles", "WholeGroup")
    ]
    assert all(row["forward µs"] > 0 and row["backward µs"] > 0 for row in rows)
