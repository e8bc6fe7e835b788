"""What the page shows, without a browser."""

import re
import threading

import pytest

from mdm_models import cli, shipped
from mdm_models.commands.web import default_model
from mdm_models.web import checked, denoise, page
from tests.models.small_pipelines import IMAGE_MODEL, save_as_shipped, small_pipeline

HOW = {"count": 1, "steps": 3, "guidance_scale": 2.0, "seed": 0}


def test_each_step_shows_every_level_and_the_last_one_is_the_pipelines(capsys):
    pipeline = small_pipeline()
    steps = list(denoise(pipeline, "red apple", **HOW))
    assert [shown.steps_done for shown in steps] == [1, 2, 3]
    assert [[picture.size for picture in level] for level in steps[0].levels] == [[(16, 16)], [(8, 8)]]
    final = pipeline("red apple", num_inference_steps=3, guidance_scale=2.0, seed=0, progress=False)
    assert steps[-1].levels[0][0].tobytes() == final[0].tobytes()


def test_who_leaves_ends_the_sampling():
    pipeline = small_pipeline()
    steps = denoise(pipeline, "red apple", **HOW | {"steps": 1000})
    next(steps)
    [thread] = [thread for thread in threading.enumerate() if thread.name == "denoise"]
    steps.close()
    thread.join(timeout=20)
    assert not thread.is_alive()


def test_what_the_pipeline_refuses_reaches_the_page():
    with pytest.raises(ValueError, match="num_inference_steps"):
        list(denoise(small_pipeline(), "red apple", **HOW | {"steps": 0}))


def test_a_prompt_cannot_write_into_the_page():
    [*_, shown] = denoise(small_pipeline(), "red apple", **HOW)
    html = page(shown, '"><script>alert(1)</script>', 0)
    assert "<script" not in html
    assert re.search(r'download="script-alert-1-script-0-0\.png"', html)


@pytest.mark.parametrize(
    ("prompt", "style", "seed", "expected"),
    [
        (" red apple ", "3d", "7", ("red apple, 3d style", 7)),
        ("red apple, flat style", "as written", " 0 ", ("red apple, flat style", 0)),
    ],
)
def test_a_style_is_added_to_the_prompt(prompt, style, seed, expected):
    assert checked(prompt, style, seed, takes_text=True) == expected


def test_without_a_seed_one_is_drawn():
    assert len({checked("red apple", "3d", "", True)[1] for _ in range(4)}) > 1


@pytest.mark.parametrize(("prompt", "seed"), [("", ""), ("a", "1.5"), ("a", "-1"), ("a", str(2**32)), ("a", "²")])
def test_wrong_inputs_are_refused(prompt, seed):
    with pytest.raises(ValueError, match=r"Write what|The seed is"):
        checked(prompt, "3d", seed, takes_text=True)


def test_without_a_name_the_shipped_model_of_the_largest_pictures_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    save_as_shipped(tmp_path, "mdm_b", size=32)
    save_as_shipped(tmp_path, "mdm_a", IMAGE_MODEL, size=16)
    assert str(default_model()) == "mdm_b"


def test_without_any_shipped_model_one_must_be_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    assert cli.main(["web"]) == 2
    assert "name a run or a saved model" in capsys.readouterr().err
    assert cli.main(["web", str(tmp_path / "nothing")]) == 2
