"""The comparison of three stages with a plain UNet: its arms, and what it makes of their logs."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mdm_models import cli
from mdm_models.training.config import plan


@pytest.fixture
def fluent(recipe):
    return recipe("fluent")


@pytest.fixture
def comparison(fluent, tmp_path):
    return fluent.Comparison(data=("a.tar",), out=str(tmp_path), seeds=(0, 1))


def write_logs(fluent, comparison, seconds: dict[str, float]) -> None:
    """Logs of all stages, as training would leave them; seconds a step by stage."""
    for stages in fluent.arms("cpu").values():
        for stage in stages:
            levels = len(stage.architecture.levels)
            training = [
                {"step": step, "kind": "training", "step_seconds": seconds[stage.name], "level_losses": [0.1] * levels}
                for step in (stage.steps // 2, stage.steps)
            ]
            numbers = {"frechet_efficientnet_lite0": 200.0, "validation_loss_0": 0.05}
            evaluations = [{"step": stage.steps, "kind": "evaluation"} | numbers] if stage.evaluate_every else []
            for seed in comparison.seeds:
                path = fluent.folder(comparison, stage, seed) / "log.jsonl"
                path.parent.mkdir(parents=True)
                path.write_text("".join(json.dumps(record) + "\n" for record in training + evaluations))
                grid = path.parent / "samples" / f"step-{stage.steps:08d}.webp"
                grid.parent.mkdir()
                Image.new("RGB", (8, 8)).save(grid)


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_the_arms_are_of_one_size(fluent, scale):
    arms = fluent.arms(scale)
    nested, plain = (fluent._parameters(arms[arm][-1]) for arm in ("nested", "plain"))
    assert nested < plain < 1.03 * nested
    assert arms["nested"][-1].size == arms["plain"][-1].size


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_every_stage_fits_its_settings_and_holds_the_one_before(fluent, tmp_path, scale):
    for stages in fluent.arms(scale).values():
        for stage in stages:
            plan(fluent.settings(scale, stage, ("a.tar",), str(tmp_path)), stage.architecture)
        for inner, outer in itertools.pairwise(stages):
            assert outer.architecture.inner == inner.architecture
            assert outer.size == 4 * inner.size


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_both_arms_see_the_same_noise_at_the_highest_level_and_weigh_it_alike(fluent, tmp_path, scale):
    nested, plain = (
        (stage.architecture.noise_scales(stage.size, objective.unshifted_size), objective.level_weights)
        for stage in (stages[-1] for stages in fluent.arms(scale).values())
        for objective in [fluent.settings(scale, stage, ("a.tar",), str(tmp_path)).objective]
    )
    assert nested == ([4, 1, 1 / 4], (16, 4, 1))  # as in the paper's model of 1024², 256² and 64²
    assert plain == ([4], (16,))


def test_the_other_objective_is_that_of_the_drawings(fluent, recipe, tmp_path):
    emoji = recipe("emoji")
    stages = fluent.arms("cpu")
    nested, plain = (
        [fluent.settings("cpu", stage, ("a.tar",), str(tmp_path), "x0").objective for stage in stages[arm]]
        for arm in ("nested", "plain")
    )
    for ours, drawings in ((nested[0], emoji.stage_16), (nested[-1], emoji.stage_64), (plain[0], emoji.stage_64)):
        theirs = drawings(("a.tar",), str(tmp_path)).objective
        assert (ours.prediction, ours.loss_target, ours.times) == (theirs.prediction, theirs.loss_target, theirs.times)
        assert (ours.times_mean, ours.times_deviation) == (theirs.times_mean, theirs.times_deviation)
    scales = [
        stages[arm][-1].architecture.noise_scales(128, objective[-1].unshifted_size)
        for arm, objective in (("nested", nested), ("plain", plain))
    ]
    assert scales == [[8, 2, 0.5], [8]]


def test_the_time_of_all_stages_counts(fluent, comparison):
    write_logs(fluent, comparison, {"1": 0.5, "2": 1.0, "3": 2.0, "plain": 3.0})
    fluent.report(comparison)
    out = Path(comparison.out)
    result = json.loads((out / "comparison.json").read_text())
    steps = [stage.steps for stage in fluent.arms("cpu")["nested"]]
    last = {arm: result[arm]["evaluations"]["1"][-1]["seconds"] for arm in result}
    assert last["nested"] == 0.5 * steps[0] + 1.0 * steps[1] + 2.0 * steps[2]
    assert last["plain"] == 3.0 * fluent.arms("cpu")["plain"][0].steps
    for name in ("comparison", "stages", "samples"):
        assert Image.open(out / f"{name}.png").width > 500


def test_an_arm_still_in_training_can_be_reported(fluent, comparison):
    write_logs(fluent, comparison, {"1": 0.5, "2": 1.0, "3": 2.0, "plain": 3.0})
    for seed in comparison.seeds:
        shutil.rmtree(fluent.folder(comparison, fluent.arms("cpu")["plain"][0], seed) / "samples")
    fluent.report(comparison)
    assert (Path(comparison.out) / "samples.png").exists()


def test_one_arm_alone_can_be_reported(fluent, comparison):
    write_logs(fluent, comparison, {"1": 0.5, "2": 1.0, "3": 2.0, "plain": 3.0})
    for seed in comparison.seeds:
        (fluent.folder(comparison, fluent.arms("cpu")["plain"][0], seed) / "log.jsonl").unlink()
    fluent.report(comparison)
    result = json.loads((Path(comparison.out) / "comparison.json").read_text())
    assert result["plain"]["evaluations"] == {}


@pytest.mark.parametrize("preset", ["8", "plain_256"])
def test_each_run_of_the_comparison_is_a_preset_of_mdm_train(capsys, tmp_path, preset):
    assert (
        cli.main(["train", "fluent", "--preset", preset, "--data", "a.tar", "--out", str(tmp_path), "--dry-run"]) == 0
    )
    assert f"fluent_{preset}" in capsys.readouterr().out


def test_the_file_with_a_preset_is_the_same_recipe(fluent, capsys, tmp_path):
    assert fluent.main(["--preset=8", "--data", "a.tar", "--out", str(tmp_path), "--dry-run", "--steps", "7"]) == 0
    assert "fluent_8" in capsys.readouterr().out
