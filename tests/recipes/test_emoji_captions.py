"""What captions are worth at each noise, of a run of one step."""

import numpy as np
import pytest
import torch

from mdm_models.training.config import changed
from mdm_models.training.trainer import train
from tests.made_data import encode_image, write_shard
from tests.models.small_pipelines import small_pipeline
from tests.training.models import NESTED_MODEL, settings


def test_a_perfect_prediction_has_no_error_at_any_noise_and_one_of_grey_the_images_variance(recipe):
    captions = recipe("emoji_captions")
    pipeline = small_pipeline()
    pipeline.diffusion.prediction = "x0"
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    small = torch.nn.functional.avg_pool2d(images, 2)
    for time in (100, 990):
        pipeline.model = lambda x, *_: [images, small]
        assert captions.error(pipeline, images, ["a"] * 3, time, 0) < 1e-10
        pipeline.model = lambda x, *_: [images, torch.zeros_like(small)]
        assert captions.error(pipeline, images, ["a"] * 3, time, 0) == pytest.approx(small.square().mean().item())


def test_the_table_tells_the_share_of_times_beyond_that_the_run_draws(recipe, tmp_path, capsys):
    picture = encode_image(np.zeros((16, 16, 3), np.uint8))
    shard = write_shard(tmp_path / "a.tar", {str(i): {"png": picture, "txt": b"a cat"} for i in range(8)})
    config = changed(settings(shard, tmp_path / "run"), frames=1, steps=1, holdout=0.5)
    run = train(config, NESTED_MODEL)
    module = recipe("emoji_captions")
    assert module.main([str(run), "--data", str(shard), "--times", "250", "900"]) == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split()[0] for row in rows] == ["250", "900"]
    assert [row.split()[-1] for row in rows] == ["0.750", "0.100"]  # whole times, uniform
