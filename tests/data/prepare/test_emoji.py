import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdm_models import cli
from mdm_models.data.media import decode_image
from mdm_models.data.prepare.emoji import Drawing, divided, slug
from tests.data.prepare.conftest import encode_image, package, samples_of

SQUARE = '<path fill="#f00" d="M0 0h16v8H0z"/>'  # the upper half of 16×16 red, the lower one transparent


def icons(
    path: Path, name: str, keys: list[str], categories: dict[str, list[str]] | None = None, body: str = SQUARE, **more
) -> Path:
    files = {
        "icons.json": {"width": 16, "height": 16, "icons": {key: {"body": body} for key in keys}} | more,
        "metadata.json": {"categories": categories} if categories else {},
    }
    return package(path, f"@iconify-json/{name}", {file: json.dumps(what).encode() for file, what in files.items()})


@pytest.fixture
def packages(tmp_path) -> list[Path]:
    categories = {
        "Food & Drink": ["red-apple"],
        "Travel & Places": ["fire-engine", "six-oclock"],
        "Activities": ["bullseye"],
        "Objects": ["womans-hat"],
        "Flags": ["flag-france"],
        "People & Body": ["ninja"],
    }
    aliases = {"direct-hit": {"parent": "bullseye"}}
    keys = [key for slugs in categories.values() for key in slugs]
    art = {"assets/1f34e.webp": encode_image("WEBP", 256, 256, mode="RGBA"), "assets/zzz.webp": b""}
    return [
        icons(tmp_path / "a.tgz", "noto", keys, categories, aliases=aliases),
        icons(tmp_path / "b.tgz", "fxemoji", ["redapple", "fireengine", "unheardof"]),
        package(tmp_path / "c.tgz", "@lobehub/fluent-emoji-3d", art | {"assets/1f452.webp": art["assets/1f34e.webp"]}),
    ]


def prepare(out: Path, *arguments: object) -> int:
    return cli.main(["prepare", "emoji", "--out", str(out), "--threads", "1", *map(str, arguments)])


def test_things_of_every_style_get_captions_and_people_flags_and_clocks_are_left_out(packages, tmp_path):
    assert prepare(tmp_path / "out", *packages) == 0
    samples = samples_of(tmp_path / "out")
    assert {key: sample["txt"].decode() for key, sample in samples.items()} == {
        "red-apple-noto": "red apple, noto style",
        "fire-engine-noto": "fire engine, noto style",
        "bullseye-noto": "bullseye, noto style",
        "womans-hat-noto": "womans hat, noto style",
        "red-apple-firefox": "red apple, firefox style",
        "fire-engine-firefox": "fire engine, firefox style",
        "red-apple-3d": "red apple, 3d style",
        "womans-hat-3d": "woman’s hat, 3d style",
    }
    facts = {"name": "fire engine", "style": "firefox", "group": "place"}
    assert json.loads(samples["fire-engine-firefox"]["json"]) == facts


def test_drawings_are_rendered_at_128_on_transparent_ground(packages, tmp_path):
    prepare(tmp_path / "out", *packages)
    samples = samples_of(tmp_path / "out")
    on_white = np.asarray(decode_image(samples["red-apple-noto"]["webp"], 128))[:, 0]  # (3, 128, 128)
    np.testing.assert_allclose(on_white[:, :60].mean(axis=(1, 2)), (255, 0, 0), atol=4)
    np.testing.assert_allclose(on_white[:, 68:], 255, atol=4)
    with Image.open(io.BytesIO(samples["red-apple-3d"]["webp"])) as picture:
        assert (picture.size, picture.mode) == ((128, 128), "RGBA")


def test_a_share_of_the_pairs_whose_name_four_styles_draw_goes_to_a_folder_of_its_own(tmp_path):
    names = [f"thing-{i}" for i in range(50)]
    sets = ["noto", "twemoji", "fluent-emoji-flat", "emojione"]
    rare = [f"rare-{i}" for i in range(50)]
    tarballs = [
        icons(tmp_path / f"{name}.tgz", name, names + rare * (name == "noto"), {"Objects": names + rare})
        for name in sets
    ]
    assert prepare(tmp_path / "out", "--held-out", 0.2, *tarballs) == 0
    held_out, rest = samples_of(tmp_path / "out" / "held-out"), samples_of(tmp_path / "out")
    assert 20 < len(held_out) < 60  # of 200, at 0.2; three standard deviations are 17
    assert not any(key.startswith("rare") for key in held_out)
    assert len(held_out) + len(rest) == 250
    assert not held_out.keys() & rest.keys()


def test_what_is_held_out_does_not_depend_on_what_else_is_there():
    styles = ("noto", "twemoji", "flat", "blob")
    every = [Drawing(f"thing {i}", style, "object", "") for i in range(100) for style in styles]
    held_out = {drawing.key for drawing in divided(every, 0.1)[1]}
    assert {drawing.key for drawing in divided(every[:200], 0.1)[1]} == {d.key for d in every[:200]} & held_out
    assert held_out < {drawing.key for drawing in divided(every, 0.2)[1]}
    assert divided(every, 0.0) == (every, [])


def test_a_name_that_has_gone_out_of_use_is_taken_where_three_sets_still_draw_it(tmp_path):
    aliases = {"direct-hit": {"parent": "bullseye"}, "panda-face": {"parent": "panda"}}
    known = {"Activities": ["bullseye"], "Animals & Nature": ["panda"]}
    tarballs = [
        icons(tmp_path / "a.tgz", "noto", ["bullseye", "panda"], known, aliases=aliases),
        icons(tmp_path / "b.tgz", "noto-v1", ["direct-hit", "panda-face"]),
        icons(tmp_path / "c.tgz", "emojione", ["direct-hit", "panda-face"]),
        icons(tmp_path / "d.tgz", "fxemoji", ["directhit"]),
    ]
    assert prepare(tmp_path / "out", *tarballs) == 0
    samples = samples_of(tmp_path / "out")
    old = {f"direct-hit-{style}" for style in ("blob", "emojione", "firefox")}
    assert set(samples) == {"bullseye-noto", "panda-noto"} | old
    assert json.loads(samples["direct-hit-blob"]["json"])["group"] == "activity"


def test_what_cannot_be_drawn_is_skipped_and_counted(tmp_path):
    tarball = icons(tmp_path / "a.tgz", "noto", ["anchor"], {"Objects": ["anchor"]}, body="<path")
    assert prepare(tmp_path / "out", tarball) == 2  # nothing was written
    assert json.loads((tmp_path / "out" / "report.json").read_text())["skipped"] == {"undrawable": 1}


def test_the_licences_lie_beside_the_shards(packages, tmp_path):
    prepare(tmp_path / "out", *packages)
    notice = (tmp_path / "out" / "NOTICE").read_text()
    for owner in ("Microsoft", "Google", "Mozilla", "Twitter", "EmojiOne", "Apache License", "MIT", "CC BY 4.0"):
        assert owner in notice


def test_packages_that_do_not_fit_are_named(packages, tmp_path, capsys):
    assert prepare(tmp_path / "out", package(tmp_path / "x.tgz", "left-pad", {})) == 2
    assert "x.tgz is the package left-pad; expected are @iconify-json/noto" in capsys.readouterr().err
    assert prepare(tmp_path / "out", packages[1]) == 2
    assert "give one of @iconify-json/noto" in capsys.readouterr().err
    assert prepare(tmp_path / "out", package(tmp_path / "y.tgz", "@iconify-json/noto", {})) == 2
    assert "y.tgz has no package/icons.json" in capsys.readouterr().err
    assert prepare(tmp_path / "out", "--held-out", 1, packages[0]) == 2
    assert "held_out is 1.0; it must lie in [0, 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [("woman’s hat", "womans-hat"), ("T-Rex", "t-rex"), ("piñata", "pinata"), ("eight o’clock", "eight-oclock")],
)
def test_names_of_all_sets_meet_in_one_spelling(name, expected):
    assert slug(name) == expected
