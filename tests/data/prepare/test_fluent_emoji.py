import base64
import hashlib
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from mdm_models import cli
from mdm_models.data.media import BadSample, decode_clip
from mdm_models.data.prepare.fluent_emoji import caption_of
from mdm_models.data.prepare.npm import Package, download
from tests.data.prepare.conftest import encode_image, package, samples_of


def animation(frames: int) -> bytes:
    """A webp whose transparent frames get darker, each shown for 42 ms."""
    pictures = [Image.new("RGBA", (32, 32), (0, 0, 0, 4 * t)) for t in range(frames)]
    file = io.BytesIO()
    pictures[0].save(file, format="WEBP", save_all=True, append_images=pictures[1:], duration=42, lossless=True)
    return file.getvalue()


def assets(arts: dict[str, bytes]) -> dict[str, bytes]:
    return {f"assets/{key}.webp": art for key, art in arts.items()}


@pytest.fixture
def packages(tmp_path) -> list[Path]:
    still = encode_image("WEBP", mode="RGBA")
    images = {"1f427": still, "1f472-1f3ff": still, "zzz": still}
    clips = {"1f427": animation(24), "1f472-1f3ff": animation(4), "1f600": animation(1)}
    return [
        package(tmp_path / "b.tgz", "@lobehub/fluent-emoji-3d", assets(images)),
        package(tmp_path / "a.tgz", "@lobehub/fluent-emoji-anim-1", assets(clips)),
    ]


def prepare(out: Path, *tarballs: Path) -> int:
    return cli.main(["prepare", "fluent-emoji", "--out", str(out), "--threads", "2", *map(str, tarballs)])


def test_images_keep_their_bytes_and_get_their_names(packages, tmp_path):
    assert prepare(tmp_path / "out", packages[0]) == 0
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["fluent-image-00000.tar"]
    samples = samples_of(tmp_path / "out")
    assert {key: sample["txt"] for key, sample in samples.items()} == {
        "1f427": b"penguin",
        "1f472-1f3ff": b"person with skullcap dark skin tone",
    }
    assert samples["1f427"]["webp"] == encode_image("WEBP", mode="RGBA")
    assert json.loads(samples["1f427"]["json"]) == {"caption": "penguin", "width": 24, "height": 16}


def test_animations_become_clips_on_white_at_24_frames_per_second(packages, tmp_path):
    assert prepare(tmp_path / "out", packages[1]) == 0
    samples = samples_of(tmp_path / "out")
    assert list(samples) == ["1f427"]
    facts = json.loads(samples["1f427"]["json"])
    assert facts == {"caption": "penguin", "frames": 24, "fps": 24, "width": 32, "height": 32}
    clip = decode_clip(samples["1f427"]["mp4"], 24, 24, 32).float().mean(dim=(0, 2, 3))
    for t in range(24):
        assert clip[t].item() == pytest.approx(255 - 4 * t, abs=4)


def test_what_does_not_move_or_differs_in_skin_tone_only_is_no_clip(packages, tmp_path):
    assert prepare(tmp_path / "out", *packages) == 0
    skipped = json.loads((tmp_path / "out" / "report.json").read_text())["skipped"]
    assert skipped == {"moves as another emoji does": 1, "does not move": 1, "no name": 1}


def test_the_licence_lies_beside_the_shards(packages, tmp_path):
    assert prepare(tmp_path / "out", packages[0]) == 0
    assert "Copyright (c) Microsoft Corporation" in (tmp_path / "out" / "LICENSE").read_text()


def test_a_file_that_is_no_such_package_is_named(tmp_path, capsys):
    (tmp_path / "x.tgz").write_bytes(b"nothing")
    assert prepare(tmp_path / "out", tmp_path / "x.tgz") == 2
    assert "x.tgz is not a whole npm tarball" in capsys.readouterr().err
    assert prepare(tmp_path / "out", package(tmp_path / "y.tgz", "left-pad", {})) == 2
    assert "y.tgz is the package left-pad" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["readme", "110000", "1f3f4-e0067_e0062", "0041"])
def test_what_is_no_emoji_has_no_caption(key):
    with pytest.raises(BadSample) as failure:
        caption_of(key)
    assert failure.value.reason == "no name"


def test_a_download_is_kept_only_if_it_has_the_hash_that_is_known(site, tmp_path):
    data = site.files["/a.jpg"]
    site.files["/@lobehub/thing/-/thing-1.0.0.tgz"] = data
    sha512 = base64.b64encode(hashlib.sha512(data).digest()).decode()
    with pytest.raises(OSError, match="SHA-512"):
        download(Package("lobehub", "thing", "1.0.0", "x" + sha512[1:]), tmp_path, site.url)
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        assert download(Package("lobehub", "thing", "1.0.0", sha512), tmp_path, site.url).read_bytes() == data
    assert site.asked["/@lobehub/thing/-/thing-1.0.0.tgz"] == 2


def test_a_package_that_is_not_there_is_named(site, tmp_path):
    with pytest.raises(OSError, match=r"gone-1.0.0.tgz: HTTP 404"):
        download(Package("lobehub", "gone", "1.0.0", ""), tmp_path, site.url)
