import json

import pytest
import torch

from benchmarks import group_norm_tiles, shapes
from mdm_kernels import backend, tune
from mdm_kernels.library import ops

BY_TILES = {"whole": 0, "BLOCK_C": 64, "BLOCK_S": 64, "num_warps": 4}
WHOLE = {"whole": 1, "BLOCK_C": 8, "BLOCK_S": 512, "num_warps": 8}


def launched(tile, *shape: int) -> dict[str, tuple[int, int, int]]:
    """{kernel: its tile and warps} of forward."""
    found = {}
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    with group_norm_tiles.chosen(tile, x), backend.recording(lambda k, given: found.setdefault(k.fn.__name__, given)):
        ops.group_norm_silu_forward(x, None, 32, None, None, None, None, 1e-5, True)
    return {
        kernel: (given["BLOCK_C"], given["BLOCK_S"], given["num_warps"])
        for kernel, given in found.items()
        if "BLOCK_S" in given
    }


@pytest.mark.parametrize("batch", [1, 64])
def test_each_choice_is_launched_at_any_size(batch):
    shape = (batch, 256, 64, 64)
    assert launched(BY_TILES, *shape) == dict.fromkeys(("tile_statistics", "apply_forward"), (64, 64, 4))
    assert launched(WHOLE, *shape) == {"group_forward": (8, 512, 8)}


def test_the_rule_holds_again_after_a_choice():
    before = launched(None, 2, 256, 64, 64)
    launched(BY_TILES, 2, 256, 64, 64)
    assert launched(None, 2, 256, 64, 64) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="would time a GPU")
def test_every_choice_at_every_size_is_written(tmp_path, monkeypatch):
    tiles = [BY_TILES | {"BLOCK_C": 4, "BLOCK_S": 4}, WHOLE | {"BLOCK_C": 2, "BLOCK_S": 4}]
    monkeypatch.setattr(shapes, "GROUP_NORMS", {(2, 2): 1})
    monkeypatch.setattr(group_norm_tiles, "GROUPS", 1)
    monkeypatch.setattr(tune, "group_norm_candidates", lambda *_: tiles)
    monkeypatch.setattr(group_norm_tiles, "CACHE_BYTES", {"cpu": 0})
    monkeypatch.setattr(group_norm_tiles, "DTYPE", torch.float32)
    group_norm_tiles.main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path / "tiles.json")])
    rows = json.loads((tmp_path / "tiles.json").read_text())
    assert [(*row["shape"], row["tile"]) for row in rows] == [
        (batch, 2, 2, tile) for batch in (1, 2) for tile in (None, *tiles)
    ]
    assert all(row["forward µs"] > 0 and row["backward µs"] > 0 for row in rows)
