import dataclasses
from math import inf, nan

import pytest

from mdm_models import private_torch
from mdm_models.data.config import DataConfig
from mdm_models.errors import TrainingError
from mdm_models.training.config import (
    OptimizerConfig,
    SystemConfig,
    TrainConfig,
    changed,
    chunks_of,
    images_in,
    level_rows,
    level_shares,
    plan,
)
from tests.training.models import CLIP_MODEL, NESTED_MODEL


@pytest.fixture
def config() -> TrainConfig:
    return changed(TrainConfig("run", DataConfig(("a.tar",), size=16, frames=4)), model="small", text_width=32)


def test_a_field_is_replaced_wherever_it_belongs(config):
    other = changed(config, lr=0.5, size=32, model="mdm_t2i_tiny", out="elsewhere")
    assert (other.optimizer.lr, other.data.size, other.model.model, other.out) == (0.5, 32, "mdm_t2i_tiny", "elsewhere")
    assert other.data.shards == config.data.shards


def test_a_field_that_does_not_exist_is_refused(config):
    with pytest.raises(TypeError, match="learning_rate"):
        changed(config, learning_rate=0.5)


def test_every_field_has_a_name_of_its_own():
    parts = [f.default_factory for f in dataclasses.fields(TrainConfig) if f.default_factory is not dataclasses.MISSING]
    names = [field.name for part in [DataConfig, *parts] for field in dataclasses.fields(part)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("has_units", [True, False])
def test_auto_is_bf16_where_there_are_units_for_it(monkeypatch, has_units):
    monkeypatch.setattr(private_torch, "cpu_multiplies_bf16", lambda: has_units)
    assert SystemConfig().uses_bf16("cpu") == has_units
    assert SystemConfig().uses_bf16("cuda")
    assert SystemConfig(precision="bf16").uses_bf16("cpu")
    assert not SystemConfig(precision="float32").uses_bf16("cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 8}, "frames is 8; small works on 4"),
        ({"size": 17}, "size is 17; this model needs a multiple of 2"),
        ({"level_weights": (1.0,)}, "2 levels"),
        ({"level_shares": (0.2, 0.5, 1.0)}, "2 levels"),
        ({"image_share": 0.25}, "images and image_share: give both"),
        ({"images": ("a.tar",)}, "images and image_share: give both"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(config, change, message):
    with pytest.raises(TrainingError, match=message):
        plan(changed(config, **change), CLIP_MODEL)


def test_pictures_beside_pictures_are_refused(config):
    with pytest.raises(TrainingError, match=r"image_share is 0.25; small has no clips, give pictures as data"):
        plan(changed(config, images=("a.tar",), image_share=0.25, frames=1), NESTED_MODEL)


def test_pictures_train_the_levels_of_one_frame_alone(config):
    mixed = changed(config, images=("a.tar",), image_share=0.25)
    assert level_rows(mixed, CLIP_MODEL, 8) == [6, 8]
    assert level_shares(mixed, CLIP_MODEL) == [0.75, 1]
    assert level_rows(changed(mixed, level_shares=(0.5, 1.0)), CLIP_MODEL, 8) == [3, 8]
    wide = dataclasses.replace(NESTED_MODEL, kind="space", inner=CLIP_MODEL)
    assert level_rows(mixed, wide, 8) == [6, 6, 8]
    assert level_rows(config, wide, 8) == [8, 8, 8]


@pytest.mark.parametrize(("share", "chunk"), [(0.25, 1), (0.25, 2), (0.9, 4)])
def test_a_share_that_gives_no_picture_or_no_clip_is_refused(config, share, chunk):
    mixed = changed(config, images=("a.tar",), image_share=share)
    with pytest.raises(TrainingError, match=f"image_share is {share}, {round(share * chunk)} of the {chunk} samples"):
        images_in(mixed.data, chunk)


def test_a_model_that_does_not_exist_is_refused(config):
    with pytest.raises(TrainingError, match="mdm_t2v_tiny"):
        plan(changed(config, model="mdm_t2v_tyny"))


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 0},
        {"lr": -1.0},
        {"caption_dropout": 1.5},
        {"workers": -1},
        {"holdout": 1.0},
        {"image_share": 1.0},
        {"max_bad_share": 2.0},
        {"level_shares": (0.5, 0.9)},
        {"level_shares": (1.0, 0.5, 1.0)},
        {"ema_stds": (0.5,)},
        {"evaluate_every": -1},
        {"seed": -1},
        *({name: nan} for name in ("lr", "eps", "clip", "shift_power", "times_mean", "guidance_scale", "patience")),
        *({name: inf} for name in ("lr", "eps", "shift_power", "times_deviation", "guidance_scale", "frame_rate")),
        {"eps": -1e-8},
        {"level_weights": (1.0, nan)},
    ],
)
def test_settings_out_of_range_are_refused_by_name(config, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        changed(config, **change)


def test_no_limit_is_a_limit_without_end(config):
    assert changed(config, clip=inf, cache_gb=inf).optimizer.clip == inf


@pytest.mark.parametrize(
    ("batch", "micro", "world_size", "expected"),
    [(8, 0, 1, (8, 1)), (8, 0, 2, (4, 1)), (8, 2, 2, (2, 2)), (2048, 32, 8, (32, 8))],
)
def test_the_batch_is_shared_by_processes_and_chunks(batch, micro, world_size, expected):
    assert chunks_of(OptimizerConfig(batch_size=batch, micro_batch=micro), world_size) == expected


@pytest.mark.parametrize(
    ("batch", "micro", "world_size", "rule"),
    [
        (8, 3, 1, "multiple of micro_batch 3 × 1"),
        (8, 0, 3, "multiple of 3 processes"),
        (2, 0, 4, "multiple of 4 processes"),
    ],
)
def test_a_batch_that_cannot_be_shared_evenly_is_refused(batch, micro, world_size, rule):
    with pytest.raises(TrainingError, match=f"batch_size is {batch}; it must be a {rule}"):
        chunks_of(OptimizerConfig(batch_size=batch, micro_batch=micro), world_size)
