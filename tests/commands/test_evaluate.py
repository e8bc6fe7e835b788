import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mdm_models import cli
from mdm_models.commands.evaluate import main
from mdm_models.evaluation.clip_score import ClipScore
from mdm_models.pipeline import Pipeline, PipelineConfig
from mdm_models.storage import fingerprint
from mdm_models.text import TransformerTextEncoder
from mdm_models.unet import build_model
from tests import forked
from tests.evaluation.conftest import MeanColour, Motion, distance, save_scripted
from tests.made_data import encode_clip, encode_image, write_shard
from tests.text.directories import save_open_clip
from tests.training.models import CLIP_MODEL, NESTED_MODEL

SAMPLES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """model (images of 16²), data.tar, clip and colours.pt."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("evaluate")
    save_pipeline(folder / "model", NESTED_MODEL)
    draw = np.random.default_rng(0)
    pictures = {f"p{i}": draw.integers(256, size=(16, 16, 3), dtype=np.uint8) for i in range(SAMPLES)}
    write_shard(
        folder / "data.tar",
        {key: {"png": encode_image(picture), "txt": f"a {key}".encode()} for key, picture in pictures.items()},
    )
    (folder / "clip").mkdir()
    save_open_clip(folder / "clip")
    save_scripted(MeanColour(), folder / "colours.pt")
    return folder


def save_pipeline(path: Path, architecture) -> None:
    model = build_model(architecture)
    with torch.no_grad():
        for parameter in model.parameters():  # its output layers begin at 0
            parameter.normal_(std=0.05)
    Pipeline(model, TransformerTextEncoder(32, 1, max_tokens=8), PipelineConfig(size=16)).save_pretrained(path)


def arguments(folder: Path, *more: str) -> list[str]:
    networks = ["--feature-extractor", f"{folder}/colours.pt", "--clip-model", f"{folder}/clip"]
    speed = ["--steps", "2", "--batch-size", "2", "--workers", "0", "--device", "cpu"]
    return [f"{folder}/model", "--data", f"{folder}/data.tar", "--all", *networks, *speed, *more]


@pytest.fixture(scope="module")
def results(folder) -> dict[str, float]:
    assert main(arguments(folder, "--json", f"{folder}/results.json", "--save-samples", f"{folder}/samples")) == 0
    return json.loads((folder / "results.json").read_text())["results"]


def test_everything_that_is_asked_for_is_measured(results):
    levels = ["validation_loss", "validation_loss_0", "validation_loss_1"]
    assert list(results) == ["evaluated_samples", *levels, "frechet_colours", "clip_score"]
    assert results["evaluated_samples"] == SAMPLES
    assert results["validation_loss"] == pytest.approx(results["validation_loss_0"] + results["validation_loss_1"])


def test_the_numbers_are_those_of_the_samples_that_are_kept(results, folder):
    def colours(paths: list[Path]) -> np.ndarray:
        return np.stack([np.asarray(Image.open(path)).mean(axis=(0, 1)) / 255 for path in paths])

    kept = sorted((folder / "samples").glob("*.png"))
    with tarfile.open(folder / "data.tar") as tar:
        real = [tar.extractfile(name) for name in tar.getnames() if name.endswith(".png")]
        expected = distance(colours(real), colours(kept))
    assert results["frechet_colours"] == pytest.approx(expected, rel=1e-4)
    score = ClipScore(str(folder / "clip"), torch.device("cpu"))
    pixels = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in kept]
    score.add(torch.stack(pixels), [path.with_suffix(".txt").read_text().strip() for path in kept])
    assert results["clip_score"] == pytest.approx(score.compute(), rel=1e-5)


def test_the_same_command_gives_the_same_numbers(results, folder, tmp_path):
    assert main(arguments(folder, "--json", f"{tmp_path}/again.json")) == 0
    assert json.loads((tmp_path / "again.json").read_text())["results"] == results


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """The prompts of what is drawn from now on."""
    asked = []

    def call(self, prompts, *given, call=Pipeline.__call__, **how):
        asked.extend(prompts)
        return call(self, prompts, *given, **how)

    monkeypatch.setattr(Pipeline, "__call__", call)
    return asked


def test_an_evaluation_that_was_stopped_draws_only_what_is_missing_and_has_the_same_numbers(
    results, folder, tmp_path, drawn
):
    kept, found = tmp_path / "kept", tmp_path / "found.json"
    shutil.copytree(folder / "samples", kept)
    (kept / "000004.png").unlink()
    assert main(arguments(folder, "--save-samples", str(kept), "--json", str(found))) == 0
    assert len(drawn) == 1  # of batches of 2, 2 and 1
    assert json.loads(found.read_text())["results"] == results
    assert (kept / "000004.png").read_bytes() == (folder / "samples" / "000004.png").read_bytes()


def test_samples_of_other_settings_are_not_taken(results, folder, drawn, capsys):
    assert main(arguments(folder, "--save-samples", f"{folder}/samples", "--seed", "5")) == 2
    assert "was begun with seed 0, not 5" in capsys.readouterr().err
    assert not drawn


def test_several_guidances_and_steps_make_a_table(results, folder, tmp_path, capsys):
    found = tmp_path / "found.json"
    given = arguments(folder, "--guidance-scale", "1", "3", "--json", str(found))
    given.insert(given.index("--steps") + 2, "1")  # --steps 2 1
    assert main(given) == 0
    table = json.loads(found.read_text())["table"]
    assert [(row["guidance_scale"], row["num_inference_steps"]) for row in table] == [(1, 2), (1, 1), (3, 2), (3, 1)]
    assert len({row["results"]["frechet_colours"] for row in table}) == 4
    header, *rows, protocol = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["guidance", "steps", "validation_loss"]
    assert [row.split()[:2] for row in rows] == [["1", "2"], ["1", "1"], ["3", "2"], ["3", "1"]]
    assert protocol.startswith("protocol: 5 samples of 16×16, seed 0; ddim, guidance 1 in 2 steps, ")


def test_the_report_says_what_must_be_equal(results, folder):
    protocol = json.loads((folder / "results.json").read_text())["protocol"]
    for part in ("5 samples of 16×16", "seed 0", "ddim", "in 2 steps", "features of colours.pt", "CLIP clip"):
        assert part in protocol


def test_two_processes_give_the_numbers_of_one(results, folder, tmp_path):
    """Of 5 samples: one of the two has a row that does not count."""
    with_kernel = arguments(folder, "--kernel-distance")
    command, said = ["evaluate", *with_kernel, "--json", f"{tmp_path}/two.json"], [tmp_path / "0", tmp_path / "1"]
    ended = forked.run_together(forked.mdm, *((command, *each) for each in zip(forked.world(2), said, strict=True)))
    assert ended == [0, 0], [path.read_text() for path in said]
    found = json.loads((tmp_path / "two.json").read_text())["results"]
    assert main([*with_kernel, "--json", f"{tmp_path}/one.json"]) == 0
    kernel = json.loads((tmp_path / "one.json").read_text())["results"]["kid_colours"]
    assert found.pop("kid_colours") == pytest.approx(kernel, rel=1e-4, abs=1e-6)
    assert found == pytest.approx(results, rel=1e-5)  # float32: batches are composed in another way
    assert "".join(path.read_text() for path in said).count("clip_score") == 1


def test_a_reference_is_written_once_and_read_from_then_on(results, folder, tmp_path):
    reference, found, kernel = tmp_path / "real.npz", tmp_path / "found.json", {}
    for _ in range(2):
        given = arguments(folder, "--kernel-distance", "--reference", str(reference), "--json", str(found))
        assert main(given) == 0
        measured = json.loads(found.read_text())["results"]
        kernel.setdefault("kid_colours", measured["kid_colours"])
        assert measured == pytest.approx(results | kernel, rel=1e-9)
    np.savez(reference, mu=np.full(3, 9.0), sigma=np.eye(3))
    assert main(arguments(folder, "--reference", str(reference), "--json", str(found))) == 0
    assert json.loads(found.read_text())["results"]["frechet_colours"] > 100


def test_a_runs_directory_stands_for_the_model_that_it_left(folder, capsys):
    data = ["--data", f"{folder}/data.tar", "--all", "--device", "cpu", "--workers", "0"]
    assert cli.main(["evaluate", str(folder), *data]) == 0
    assert "validation_loss" in capsys.readouterr().out


def test_clips_have_a_distance_of_their_own(folder, tmp_path):
    save_pipeline(tmp_path / "model", CLIP_MODEL)
    write_shard(tmp_path / "data.tar", {f"c{i}": {"mp4": encode_clip(48), "txt": b"a clip"} for i in range(2)})
    write = ["--json", f"{tmp_path}/clips.json", "--save-samples", f"{tmp_path}/samples"]
    given = [f"{tmp_path}/model", "--data", f"{tmp_path}/data.tar", "--all", "--steps", "1", "--workers", "0"]
    assert main([*given, "--feature-extractor", f"{folder}/colours.pt", "--device", "cpu", *write]) == 0
    assert "frechet_video_colours" in json.loads((tmp_path / "clips.json").read_text())["results"]
    assert sorted(path.name for path in (tmp_path / "samples").glob("*.mp4")) == ["000000.mp4", "000001.mp4"]


def test_the_distance_of_a_network_of_clips_has_a_protocol(tmp_path):
    save_pipeline(tmp_path / "model", CLIP_MODEL)
    write_shard(tmp_path / "data.tar", {f"c{i}": {"mp4": encode_clip(48), "txt": b"a clip"} for i in range(2)})
    motion, found = save_scripted(Motion(), tmp_path / "motion.pt"), tmp_path / "clips.json"
    given = [f"{tmp_path}/model", "--data", f"{tmp_path}/data.tar", "--all", "--steps", "1", "--workers", "0"]
    assert main([*given, "--feature-extractor", str(motion), "--device", "cpu", "--json", str(found)]) == 0
    report = json.loads(found.read_text())
    assert report["results"]["fvd_motion"] > 0
    protocol = report["protocol"]
    assert protocol.startswith("2 clips of 4 frames of 16×16, 8 a second, clip start random, seed 0; ddim, guidance")
    assert protocol.endswith(f"; features of motion.pt ({fingerprint(motion)}), resized by itself")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--feature-extractor": "nowhere.pth"}, "feature extractor nowhere.pth: there is no such file"),
        ({"--clip-model": "./nowhere"}, "CLIP model ./nowhere"),
        ({"--data": "nowhere.tar"}, "nowhere.tar"),
        ({"--steps": "0"}, "num_inference_steps is 0"),
    ],
)
def test_what_the_user_can_mend_is_one_line(folder, capsys, change, message):
    given = arguments(folder)
    for option, value in change.items():
        given[given.index(option) + 1] = value
    assert main(given) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("mdm evaluate: error: ")
    assert message in error


def test_why_no_sample_can_be_used_is_told_of_one(folder, tmp_path, capsys):
    write_shard(tmp_path / "data.tar", {"p0": {"png": b"no picture", "txt": b"a penguin"}})
    given = [f"{folder}/model", "--data", f"{tmp_path}/data.tar", "--all", "--workers", "0", "--device", "cpu"]
    assert main(given) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert f"at least 1 are needed: undecodable (p0 in {tmp_path}/data.tar: " in error


@pytest.mark.parametrize("option", ["--json", "--reference"])
def test_a_file_that_cannot_be_written_is_named_before_anything_is_measured(folder, tmp_path, capsys, option):
    assert main(arguments(folder, option, str(tmp_path))) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error == f"mdm evaluate: error: {option} {tmp_path} is a folder; name a file"
    (tmp_path / "file").touch()
    assert main(arguments(folder, option, f"{tmp_path}/file/found")) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/file" in error


def test_a_share_that_holds_nothing_out_is_refused(folder, capsys):
    given = [argument for argument in arguments(folder) if argument != "--all"]
    assert main(given) == 2
    assert "--holdout 0.001: none of 5 samples is held out" in capsys.readouterr().err


def test_a_run_without_a_model_is_refused(folder, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert main([str(tmp_path), "--data", f"{folder}/data.tar"]) == 2
    assert "has left no model yet" in capsys.readouterr().err
