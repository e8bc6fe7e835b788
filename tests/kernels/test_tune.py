"""Tiles as data: what was measured is launched, and the tuner writes down what is worth it. No kernel runs here."""

import json

import pytest
import torch

from mdm_kernels import backend, tiles, tune
from mdm_kernels.attention import launch

META = torch.device("meta")
KEY = launch.tile_key("flash_forward", 2, 16, 8)
TILE = {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 2, "num_stages": 1}


@pytest.fixture
def launched():
    """The arguments of every launch."""
    arguments = []
    with backend.recording(lambda kernel, given: arguments.append((kernel.fn.__name__, given))):
        yield arguments


def flash_attention_forward():
    q = torch.empty(1, 1, 8, 16, dtype=torch.bfloat16, device=META)
    tune.ops.flash_attention_forward(q, q, q, None, 1.0)


def test_a_tile_that_is_tried_is_launched_and_then_the_rules_again(launched):
    with tiles.trying(KEY, TILE):
        flash_attention_forward()
    flash_attention_forward()
    (_, tried), (_, by_rule) = launched
    assert {name: tried[name] for name in TILE} == TILE
    assert tried["EVEN"] is False  # 64 keys a tile, of 8
    assert {name: by_rule[name] for name in TILE} == launch.forward_tiles(2, 8)


def test_a_file_that_is_named_comes_before_the_packages_own(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"tiles": {KEY: TILE}}))
    monkeypatch.setenv("MDM_KERNELS_TILES", str(path))
    tiles._measured.cache_clear()
    try:
        assert tiles.tuned(torch.device("cuda", 0), KEY) == TILE
        assert tiles.tuned(torch.device("cuda", 0), "another") is None
        assert tiles.tuned(torch.device("cpu"), KEY) is None
    finally:
        tiles._measured.cache_clear()


def test_a_device_has_a_file_of_its_name():
    assert tiles.file_of("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"


@pytest.fixture
def few_candidates(monkeypatch):
    monkeypatch.setattr(tune, "WIDTHS", (16,))
    monkeypatch.setattr(tune, "TOKENS", {"few": (1, 32)})
    monkeypatch.setattr(tune, "CANDIDATES", [TILE, TILE | {"BLOCK_M": 32}, TILE | {"BLOCK_M": 128}])


@pytest.mark.usefixtures("few_candidates")
def test_what_is_fastest_is_written_down_and_what_cannot_run_is_passed_over(launched, capsys):
    def seconds(call):
        """Less for a tile of 32 queries in a forward kernel; 128 do not fit."""
        launched.clear()
        call()
        if any(given["BLOCK_M"] == 128 for _, given in launched):
            raise MemoryError
        return sum(0.5 if name.endswith("forward") and given["BLOCK_M"] == 32 else 1.0 for name, given in launched)

    chosen = tune.tune(META, torch.bfloat16, seconds)
    best = TILE | {"BLOCK_M": 32}
    names = ("flash_forward", "self_cross_forward")
    assert chosen == {launch.tile_key(name, 2, 16, 8 * 32): best for name in names}
    assert capsys.readouterr().err.count("MemoryError") == 6


@pytest.mark.usefixtures("few_candidates")
def test_each_of_the_six_kernels_is_tried_by_itself(launched):
    for key, call in tune.calls(META, torch.bfloat16).items():
        launched.clear()
        with tiles.trying(key, TILE):
            call()
        tried = {name for name, given in launched if given["num_warps"] == TILE["num_warps"]}
        assert tried == {key.split(",")[0]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys):
    assert tune.main([]) == 1
    assert capsys.readouterr().err == "python -m mdm_kernels.tune measures on a GPU, and torch sees none\n"
