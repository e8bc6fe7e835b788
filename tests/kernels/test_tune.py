"""Tiles as data: what was measured is launched, and the tuner writes down what is worth it. No kernel runs here."""

import json

import pytest
import torch

from mdm_kernels import backend, tiles, tune
from mdm_kernels.attention import launch
from mdm_kernels.group_norm import launch as group_norm_launch
from mdm_kernels.temporal import launch as temporal_launch

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
    monkeypatch.setattr(tune, "TOKENS", {16: 32})
    monkeypatch.setattr(tune, "BATCHES", {32: (1,)})
    monkeypatch.setattr(tune, "CANDIDATES", [TILE, TILE | {"BLOCK_M": 32}, TILE | {"BLOCK_M": 128}])
    monkeypatch.setattr(tune, "IMAGES", {})
    monkeypatch.setattr(tune, "CLIPS", ())


@pytest.mark.usefixtures("few_candidates")
def test_what_is_fastest_is_written_down_and_what_cannot_run_is_passed_over(launched, capsys):
    def seconds(call):
        """Less for a tile of 32 queries in a forward kernel; 128 do not fit."""
        launched.clear()
        call()
        if any(given.get("BLOCK_M") == 128 for _, given in launched):
            raise MemoryError
        return sum(0.5 if name.endswith("forward") and given.get("BLOCK_M") == 32 else 1.0 for name, given in launched)

    chosen = tune.tune(META, torch.bfloat16, seconds)
    best = TILE | {"BLOCK_M": 32}
    names = ("flash_forward", "self_cross_forward")
    assert chosen == {launch.tile_key(name, 2, 16, 8 * 32): best for name in names}
    assert capsys.readouterr().err.count("MemoryError") == 6


@pytest.mark.usefixtures("few_candidates")
def test_a_tile_that_is_fast_once_is_not_written_down(launched):
    times = iter([1.0, 0.5, 1.0, 1.0, 1.0, 1.0])  # by rule, three candidates; the fastest and the rule again
    (key, kernel), *_ = tune.kernels(META, torch.bfloat16, "flash_forward").items()
    assert tune.fastest(key, kernel, lambda call: next(times)) is None


@pytest.mark.usefixtures("few_candidates")
def test_processes_share_the_candidates(launched):
    alone, shared = [], []
    for processes, tried in ((1, alone), (2, shared)):
        for index in range(processes):
            launched.clear()
            tune.compile_share(index, processes, META, torch.bfloat16, "flash_forward")
            tried += [given["BLOCK_M"] for name, given in launched if given["num_warps"] == TILE["num_warps"]]
    assert sorted(alone) == sorted(shared) == [16, 32, 128]


@pytest.mark.usefixtures("few_candidates")
def test_each_of_attentions_six_kernels_is_tried_by_itself(launched):
    for key, kernel in tune.kernels(META, torch.bfloat16).items():
        launched.clear()
        with tiles.trying(key, TILE):
            kernel.call()
        tried = {name for name, given in launched if given["num_warps"] == TILE["num_warps"]}
        assert tried == {key.split(",")[0]}


def test_every_candidate_of_the_other_ops_is_launched_as_it_is(launched, monkeypatch):
    monkeypatch.setattr(tune, "TOKENS", {})
    monkeypatch.setattr(tune, "IMAGES", {(256, 64): 64, (32, 512): 16})
    seen = set()
    for key, kernel in tune.kernels(META, torch.bfloat16).items():
        op = key.split(",")[0]
        for candidate in kernel.candidates:
            launched.clear()
            with tiles.trying(key, candidate):
                kernel.call()
            constants = {name: value for name, value in candidate.items() if name != "whole"}
            names = {name for name, given in launched if constants.items() <= given.items()}
            by_tiles = {
                "group_norm_forward": {"tile_statistics", "apply_forward"},
                "group_norm_backward": {"tile_gradient_sums", "apply_backward"},
            }
            whole = {"group_norm_forward": {"group_forward"}, "group_norm_backward": {"group_backward"}}
            assert names >= (whole if candidate.get("whole") else by_tiles).get(op, {op})
            seen.add((op, candidate.get("whole")))
    assert seen == {(f"group_norm_{way}", whole) for way in ("forward", "backward") for whole in (0, 1)} | {
        (f"temporal_{way}", None) for way in ("forward", "backward")
    }


def test_group_norms_of_other_sizes_and_formats_have_keys_of_their_own():
    def key(*shape, channels_last=True, dtype=torch.bfloat16, groups=32):
        last = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.empty(shape, dtype=dtype, device=META).to(memory_format=last)
        return group_norm_launch.tile_key("forward", group_norm_launch.Problem.of(x, None, groups, *[None] * 4))

    size = "64 channels in 32 groups, 64 positions, channels last, few bytes"
    assert key(2, 64, 8, 8) == key(3, 64, 4, 16) == f"group_norm_forward, 16 bits, {size}"
    others = [
        key(2, 64, 8, 8, channels_last=False), key(2, 64, 8, 8, dtype=torch.float32), key(2, 64, 8, 8, groups=16),
        key(2, 64, 8, 9), key(2, 96, 8, 8), key(2048, 64, 8, 8),
    ]  # fmt: skip
    assert len({key(2, 64, 8, 8), *others}) == 7


def test_a_measured_group_a_program_is_left_aside_where_elements_pass_2_to_the_31(launched):
    x = torch.empty(2**11, 64, 128, 128, dtype=torch.bfloat16, device=META).to(memory_format=torch.channels_last)
    problem = group_norm_launch.Problem.of(x, None, 32, *[None] * 4)
    whole = {"whole": 1, "BLOCK_C": 2, "BLOCK_S": 1024, "num_warps": 4}
    with tiles.trying(group_norm_launch.tile_key("forward", problem), whole):
        tune.ops.group_norm_silu_forward(x, None, 32, None, None, None, None, 1e-5, True)
        tune.ops.group_norm_silu_forward(x[:64], None, 32, None, None, None, None, 1e-5, True)
    names = [name for name, _ in launched]
    assert names == ["tile_statistics", "combine_statistics", "apply_forward", "group_forward"]


def test_clips_of_other_lengths_have_keys_of_their_own():
    assert temporal_launch.tile_key("forward", 16, 32, 2) == "temporal_forward, 16 bits, 32 wide, 16 frames"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys):
    assert tune.main([]) == 1
    assert capsys.readouterr().err == "python -m mdm_kernels.tune measures on a GPU, and torch sees none\n"
