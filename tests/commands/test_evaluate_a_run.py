"""`mdm evaluate RUN` is the run's own evaluation, whatever the run was told."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mdm_models.commands.ema import main as average
from mdm_models.commands.evaluate import main
from mdm_models.training.config import TrainConfig, changed
from mdm_models.training.settings import read_settings, write_settings
from mdm_models.training.trainer import train
from tests.evaluation.conftest import MeanColour, save_scripted
from tests.made_data import encode_clip, encode_image, write_shard
from tests.training.models import IMAGE_MODEL, LEAST_CLIP_MODEL, LEAST_NESTED_MODEL, settings


def pictures(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    noise = {f"p{i}": draw.integers(256, size=(16, 16, 3), dtype=np.uint8) for i in range(12)}
    return write_shard(
        folder / "data.tar", {key: {"png": encode_image(p), "txt": f"a {key}".encode()} for key, p in noise.items()}
    )


def clips(folder: Path) -> Path:
    """Grey at their beginning, white at their end."""
    return write_shard(
        folder / "data.tar", {f"c{i}": {"mp4": encode_clip(48), "txt": f"a c{i}".encode()} for i in range(6)}
    )


def last_evaluation(run: Path) -> dict:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (*_, last) = (record for record in records if record["kind"] == "evaluation")
    return {name: value for name, value in last.items() if name not in ("step", "kind")}


def trained(config: TrainConfig, architecture) -> Path:
    how = {"evaluate_every": 2, "steps": 2, "holdout": 0.5, "evaluate_samples": 4, "sample_steps": 3}
    return train(changed(config, **how, save_every=2, lr=0.05, warmup=0, ema_decay=0.0), architecture)


@pytest.mark.parametrize(
    ("make", "architecture", "told"),
    [
        (pictures, LEAST_NESTED_MODEL, {"loss_target": "v", "precision": "bf16"}),
        (pictures, LEAST_NESTED_MODEL, {"loss_target": "x0", "seed": 3, "sampler": "dpmpp_2m", "guidance_scale": 1.5}),
        (clips, LEAST_CLIP_MODEL, {"clip_start": "middle", "frames": 4, "shift_power": 2.0}),
    ],
)
def test_a_run_is_evaluated_as_it_evaluated_itself(make, architecture, told, tmp_path):
    colours = save_scripted(MeanColour(), tmp_path / "colours.pt")
    config = changed(settings(make(tmp_path), tmp_path / "run"), frames=1, feature_extractor=str(colours))
    run = trained(changed(config, **told), architecture)
    assert main([str(run), "--device", "cpu", "--workers", "0", "--json", f"{tmp_path}/found.json"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert found == pytest.approx(last_evaluation(run), rel=1e-4)


def test_what_is_given_goes_before_what_the_run_was_told(tmp_path):
    run = trained(changed(settings(pictures(tmp_path), tmp_path / "run"), frames=1), LEAST_NESTED_MODEL)
    losses = {}
    for target in ("eps", "v"):
        found = tmp_path / f"{target}.json"
        given = ["--loss-target", target, "--samples", "2", "--device", "cpu", "--workers", "0"]
        assert main([f"{run}/model", *given, "--json", str(found)]) == 0
        losses[target] = json.loads(found.read_text())["results"]["validation_loss"]
    assert losses["v"] > 1.01 * losses["eps"]  # v is eps over √ᾱ


@pytest.fixture(scope="module")
def averaged(tmp_path_factory) -> Path:
    """A run that kept averages, and computes in bfloat16, of whose weights autocast keeps copies."""
    folder = tmp_path_factory.mktemp("averaged")
    colours = save_scripted(MeanColour(), folder / "colours.pt")
    config = changed(settings(pictures(folder), folder / "run"), frames=1, feature_extractor=str(colours))
    return trained(changed(config, ema_stds=(0.05, 0.2), ema_snapshot_every=1, precision="bf16"), LEAST_NESTED_MODEL)


def evaluated(model: Path, found: Path, *more: str) -> dict:
    assert main([str(model), "--device", "cpu", "--workers", "0", "--json", str(found), *more]) == 0
    return json.loads(found.read_text())


@pytest.mark.parametrize("named", ["", "model"])
def test_several_averages_make_a_table_of_what_each_has_alone(averaged, named, tmp_path, capsys):
    widths = ["0.05", "0.15"]
    table = evaluated(averaged / named, tmp_path / "found.json", "--ema-stds", *widths, "--steps", "2", "3")["table"]
    header, *rows, protocol = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["ema_std", "guidance", "steps"]
    assert [row.split()[::2][:2] for row in rows] == [["0.05", "2"], ["0.05", "3"], ["0.15", "2"], ["0.15", "3"]]
    assert "in 3 steps; averages of width 0.05, 0.15; features" in protocol
    assert table[0]["results"]["validation_loss"] != table[2]["results"]["validation_loss"]
    for std, row in zip(widths, table[1::2], strict=True):
        assert average([str(averaged), "--std", std, "--out", str(averaged / f"out-{std}" / "model")]) == 0
        shutil.copy(averaged / "config.json", averaged / f"out-{std}")
        alone = evaluated(averaged / f"out-{std}" / "model", tmp_path / "alone.json", "--steps", "3")
        assert row["results"] == pytest.approx(alone["results"], rel=1e-6)


def test_the_samples_of_each_average_are_kept_apart(averaged, tmp_path):
    keep = ["--save-samples", str(tmp_path / "kept"), "--ema-stds", "0.05", "0.2"]
    first = evaluated(averaged, tmp_path / "found.json", *keep)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {
        f"std-{w}-guidance-3-steps-3" for w in ("0.05", "0.2")
    }
    assert evaluated(averaged, tmp_path / "found.json", *keep) == first


@pytest.mark.parametrize(
    ("std", "message"), [("0.3", "std is 0.3; it must lie between 0 and 0.289"), ("0.1", "are no averages in")]
)
def test_an_average_that_cannot_be_had_is_refused(tmp_path, capsys, std, message):
    run = trained(changed(settings(pictures(tmp_path), tmp_path / "run"), frames=1), LEAST_NESTED_MODEL)
    assert main([str(run), "--device", "cpu", "--workers", "0", "--ema-stds", std]) == 2
    assert message in capsys.readouterr().err


def test_a_cache_may_be_named(tmp_path):
    run = trained(changed(settings(pictures(tmp_path), tmp_path / "run"), frames=1), LEAST_NESTED_MODEL)
    elsewhere = ["--data", f"pipe:cat {tmp_path}/data.tar", "--cache", f"{tmp_path}/copies", "--cache-gb", "1"]
    assert main([str(run), *elsewhere, "--device", "cpu", "--workers", "0"]) == 0
    assert list((tmp_path / "copies").glob("*.tar"))


def test_a_model_outside_a_run_needs_its_data(tmp_path, capsys):
    assert main([str(tmp_path), "--device", "cpu"]) == 2
    assert "--data is missing" in capsys.readouterr().err


def test_settings_come_back_as_they_were_written(tmp_path):
    config = changed(settings(tmp_path, tmp_path), ema_stds=(0.05, 0.1), level_shares=(0.5, 1.0))
    write_settings(tmp_path, config)
    assert read_settings(tmp_path) == config
    values = dataclasses.asdict(config) | {"a setting of another version": 1}
    values["system"].pop("compile")
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_settings(tmp_path) == config
    assert read_settings(tmp_path / "elsewhere") is None


def test_a_run_that_may_lose_shards_is_evaluated_without_them(tmp_path, monkeypatch):
    monkeypatch.setattr("mdm_models.data.shards.WAITS_AT_START", ())
    config = changed(settings(pictures(tmp_path), tmp_path / "run"), frames=1, max_bad_share=0.6)
    shards = (*config.data.shards, "pipe:exit 1")
    run = trained(changed(config, shards=shards, cache=f"{tmp_path}/cache"), IMAGE_MODEL)
    assert main([str(run), "--device", "cpu", "--workers", "0", "--json", f"{tmp_path}/found.json"]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["results"]["evaluated_samples"] == 4
