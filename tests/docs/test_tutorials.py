"""The Python of the tutorials and of README.md, executed as it is written."""

import re
from pathlib import Path

import pytest

from mdm_models.diffusion.samplers import SAMPLERS

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"


def blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", ["own_unet", "accelerate_diffusers", "write_a_sampler", "add_a_level"])
def test_a_tutorial_runs_from_its_first_line_to_its_last(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SAMPLERS, "settling", None)  # which one of them adds
    names: dict = {"__name__": name}
    for block in blocks(TUTORIALS / f"{name}.md"):
        exec(compile(block, f"{name}.md", "exec"), names)


SNIPPETS = blocks(ROOT / "README.md")


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_of_the_readme_runs_as_it_is_pasted(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(SNIPPETS[number], f"README.md, snippet {number}", "exec"), {"__name__": "snippet"})
