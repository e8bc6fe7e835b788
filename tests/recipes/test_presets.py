"""The full-size presets: the paper's settings, and a step of each with the widths scaled down."""

import dataclasses

import pytest
import torch

from mdm_models.config import UNetConfig
from mdm_models.data.stream import Batch
from mdm_models.processes import Processes
from mdm_models.text import ClassLabels
from mdm_models.training.config import TrainConfig, changed, chunks_of, plan
from mdm_models.training.denoiser import open_encoder
from mdm_models.training.dry_run.estimate import estimate_memory
from mdm_models.training.learner import Learner

PRESETS = [  # recipe, preset, model, frames, size, batch, steps
    ("imagenet_256", "64", "mdm_c2i_64", 1, 64, 512, 300_000),
    ("imagenet_256", "256", "mdm_c2i_256", 1, 256, 256, 500_000),
    ("t2i_cc12m", "64", "mdm_t2i_64", 1, 64, 2048, 500_000),
    ("t2i_cc12m", "256", "mdm_t2i_256", 1, 256, 1024, 500_000),
    ("t2i_cc12m", "1024", "mdm_t2i_1024", 1, 1024, 768, 100_000),
    ("t2v_webvid", "64", "mdm_t2i_64", 1, 64, 2048, 500_000),
    ("t2v_webvid", "16x64", "mdm_t2v_64", 16, 64, 512, 500_000),
    ("t2v_webvid", "16x256", "mdm_t2v_256", 16, 256, 128, 300_000),
]
FULL_SIZE = [(name, which) for name, which, *_ in PRESETS]
PAPERS_GPUS = {"imagenet_256": 8, "t2i_cc12m": 32, "t2v_webvid": 32}


def preset(recipe, name: str, which: str) -> TrainConfig:
    return recipe(name).PRESETS[which](("shards.tar",), "run")


def narrow(config: UNetConfig, context_dim: int) -> UNetConfig:
    """The same architecture at an eighth of the width, at least 32: GroupNorm has 32 groups."""
    return dataclasses.replace(
        config,
        channels=tuple(max(32, width // 8) for width in config.channels),
        embed_dim=128,
        context_dim=context_dim if config.context_dim else 0,
        context_proj_dim=min(64, config.context_proj_dim),
        inner=narrow(config.inner, context_dim) if config.inner else None,
    )


@pytest.mark.parametrize(("name", "which", "model", "frames", "size", "batch", "steps"), PRESETS)
def test_the_full_size_presets_are_the_papers(recipe, name, which, model, frames, size, batch, steps):
    config = preset(recipe, name, which)
    assert (config.model.model, config.data.frames, config.data.size) == (model, frames, size)
    adam = config.optimizer
    assert (adam.batch_size, adam.steps, adam.lr, adam.warmup) == (batch, steps, 1e-4, 30_000)
    assert (adam.beta1, adam.beta2, adam.eps, adam.clip, adam.ema_decay) == (0.9, 0.99, 1e-8, 2.0, 0.9999)
    assert (config.data.holdout, config.model.caption_dropout) == (0.001, 0.1)
    assert config.objective.times == "discrete"


@pytest.mark.parametrize(("name", "which"), FULL_SIZE)
def test_the_batch_can_be_shared_by_the_papers_processes_and_by_one(recipe, name, which):
    adam = preset(recipe, name, which).optimizer
    for world_size in (1, 8, PAPERS_GPUS[name]):
        size, rounds = chunks_of(adam, world_size)
        assert size * rounds * world_size == adam.batch_size


@pytest.mark.parametrize(("name", "which"), FULL_SIZE)
def test_a_preset_for_40_gb_differs_in_its_micro_batch_alone(recipe, name, which):
    large, small = preset(recipe, name, which), preset(recipe, name, f"{which}-40gb")
    assert changed(small, micro_batch=large.optimizer.micro_batch) == large
    for world_size in (1, 8, PAPERS_GPUS[name]):
        chunks_of(small.optimizer, world_size)


@pytest.mark.parametrize(
    ("name", "which", "gigabytes"),
    [
        ("t2i_cc12m", "64-40gb", 40),
        *(pytest.param(name, which, 80, marks=pytest.mark.slow) for name, which in FULL_SIZE),
        *(pytest.param(name, f"{which}-40gb", 40, marks=pytest.mark.slow) for name, which in FULL_SIZE),
    ],
)
def test_a_preset_fits_the_memory_that_it_is_meant_for(recipe, name, which, gigabytes):
    """With flan-t5-xl's encoder in bfloat16, and a tenth left to libraries and to what lies between tensors."""
    config = preset(recipe, name, which)
    encoder = 0 if name == "imagenet_256" else 2 * 1.22e9
    memory = estimate_memory(config, plan(config, context_dim=2048 if encoder else 1000), 1, "cuda")
    assert memory.total + encoder < 0.9 * gigabytes * 1e9


def test_stage_two_of_text_to_image_trains_two_thirds_of_a_batch_at_256(recipe):
    assert preset(recipe, "t2i_cc12m", "256").objective.level_shares == (2 / 3, 1.0)


def test_stage_three_of_text_to_image_weighs_its_levels_and_shifts_its_noise_more(recipe):
    objective = preset(recipe, "t2i_cc12m", "1024").objective
    assert (objective.level_weights, objective.shift_power) == ((16.0, 4.0, 1.0), 2.0)


@pytest.mark.parametrize(
    ("name", "which", "size"),
    [
        ("imagenet_256", "256", 64),
        ("t2i_cc12m", "256", 64),
        ("t2i_cc12m", "1024", 64),
        ("t2v_webvid", "16x64", 64),
        ("t2v_webvid", "16x256", 64),
        pytest.param("t2v_webvid", "16x256", 256, marks=pytest.mark.slow),
        pytest.param("t2i_cc12m", "1024", 1024, marks=pytest.mark.slow),
    ],
)
def test_one_step_of_a_full_size_preset_with_its_widths_scaled_down(recipe, name, which, size):
    config = preset(recipe, name, which)
    small = {"text_encoder": "", "text_width": 64, "text_layers": 1, "text_tokens": 16}
    config = changed(config, size=size, batch_size=1, micro_batch=0, warmup=0, **small)
    processes = Processes(0, 1, torch.device("cpu"))
    encoder = ClassLabels(1000) if name == "imagenet_256" else open_encoder(config.model, 0, processes.device)
    architecture = narrow(plan(config, context_dim=encoder.width).architecture, encoder.width)
    learner = Learner(config, architecture, encoder, processes)
    before = learner.model.unet.conv_out.weight.detach().clone()
    shape = (1, 3, config.data.frames, size, size)
    assert learner.learn([Batch(torch.randint(256, shape, dtype=torch.uint8), ["207"], [])]).finite
    assert not torch.equal(learner.model.unet.conv_out.weight, before)
    unused = [name for name, parameter in learner.model.named_parameters() if parameter.grad is None]
    assert unused == []  # DistributedDataParallel would wait for them
