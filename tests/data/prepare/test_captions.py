import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mdm_models import cli
from mdm_models.commands.line import parse
from mdm_models.commands.prepare import Options
from mdm_models.data.config import DataConfig
from mdm_models.data.reader import SampleReader, caption_of
from mdm_models.data.shards import ShardedSamples, open_shards
from tests.data.prepare.conftest import samples_of


def index_of(folder: Path, site, *paths: str) -> Path:
    path = folder / "index.tsv"
    path.write_text("".join(f"{site.url}{name}\tcaption of {name}\n" for name in paths))
    return path


def arguments(index: Path, out: Path, *more: object) -> list[str]:
    return ["prepare", "captions", *map(str, (index, "--out", out, "--retries", 0, "--threads", 4, *more))]


def test_images_and_clips_become_samples_that_training_reads(site, tmp_path):
    index = index_of(tmp_path, site, "/a.jpg", "/b.png", "/clip.mp4")
    assert cli.main(arguments(index, tmp_path / "out")) == 0
    samples = samples_of(tmp_path / "out")
    assert list(samples) == ["000000000", "000000001", "000000002"]
    assert samples["000000000"]["jpg"] == site.files["/a.jpg"]
    assert samples["000000001"]["png"] == site.files["/b.png"]
    assert samples["000000002"]["mp4"] == site.files["/clip.mp4"]
    assert caption_of(samples["000000001"]) == "caption of /b.png"
    facts = json.loads(samples["000000002"]["json"])
    assert facts == {
        "url": f"{site.url}/clip.mp4",
        "caption": "caption of /clip.mp4",
        "frames": 24,
        "fps": 24.0,
        "width": 32,
        "height": 32,
    }
    config = DataConfig((str(tmp_path / "out"),), size=16)
    reader = SampleReader(ShardedSamples(open_shards(config)), config)
    assert len(reader.samples) == 3


def test_a_row_keeps_its_key_whatever_other_rows_come_to(site, tmp_path):
    index = index_of(tmp_path, site, "/missing", "/a.jpg", "/page", "/b.png")
    assert cli.main(arguments(index, tmp_path / "out")) == 0
    assert list(samples_of(tmp_path / "out")) == ["000000001", "000000003"]


def test_the_summary_counts_what_was_skipped_by_reason(site, tmp_path, capsys):
    paths = ("/a.jpg", "/missing", "/missing", "/page", "/truncated", "/huge", "/loop")
    index = index_of(tmp_path, site, *paths)
    with index.open("a") as file:
        file.write(f"{site.url}/b.png\t \nnot a url\tx\n")
    assert cli.main(arguments(index, tmp_path / "out", "--rows-per-shard", 4)) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["written"] == 1
    assert report["skipped"] == {
        "HTTP 404": 2,
        "not an image": 1,
        "truncated": 1,
        "too large": 1,
        "too many redirects": 1,
        "caption empty": 1,
        "bad URL": 1,
    }
    assert "1 samples in 1 shards, 8 skipped" in capsys.readouterr().out
    named = json.loads((tmp_path / "out" / "reports" / "00000.json").read_text())["skipped"]["HTTP 404"]
    assert named == [["000000001", f"{site.url}/missing"], ["000000002", f"{site.url}/missing"]]


def test_finished_shards_are_not_downloaded_again(site, tmp_path):
    index = index_of(tmp_path, site, *(f"/a.jpg?{i}" for i in range(6)))
    for _ in range(2):
        assert cli.main(arguments(index, tmp_path / "out", "--rows-per-shard", 2)) == 0
    assert site.asked == {f"/a.jpg?{i}": 1 for i in range(6)}


def test_a_run_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(site, tmp_path):
    index = index_of(tmp_path, site, *(f"/a.jpg?{i}" if i < 10 else f"/held?{i}" for i in range(16)))
    killed = arguments(index, tmp_path / "killed", "--rows-per-shard", 4)
    process = subprocess.Popen([sys.executable, "-m", "mdm_models.cli", *killed], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("killed/*.tar")):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    site.released.set()
    assert cli.main(killed) == 0
    assert cli.main(arguments(index, tmp_path / "whole", "--rows-per-shard", 4)) == 0
    shards = sorted(path.name for path in tmp_path.glob("whole/*.tar"))
    assert len(shards) == 4
    for name in shards:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("index", "more", "message"),
    [
        ("nowhere.tsv", (), "nowhere.tsv"),
        ("index.json", (), "a list of URLs is a .tsv, .csv or .parquet file"),
    ],
)
def test_an_error_is_one_line(tmp_path, capsys, index, more, message):
    assert cli.main(arguments(tmp_path / index, tmp_path / "out", *more)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("mdm prepare: error: ")
    assert shown.count("\n") == 1
    assert message in shown


def test_another_index_in_the_same_folder_is_refused(site, tmp_path, capsys):
    assert cli.main(arguments(index_of(tmp_path, site, "/a.jpg"), tmp_path / "out")) == 0
    assert cli.main(arguments(index_of(tmp_path, site, "/b.png"), tmp_path / "out")) == 2
    assert "choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--threads", "--size", "--rows-per-shard"])
def test_a_number_below_1_is_refused(tmp_path, option, capsys):
    assert cli.main(arguments(tmp_path / "index.tsv", tmp_path / "out", option, 0)) == 2
    assert f"{option.removeprefix('--').replace('-', '_')} is 0; it must be above 0" in capsys.readouterr().err


def test_half_a_second_and_half_a_megabyte_are_taken_and_none_is_refused():
    needed = ["captions", "index.tsv", "--out", "out"]
    taken = parse("mdm prepare", None, Options, [*needed, "--seconds", "0.5", "--max-mb", "0.5"])
    assert (taken.seconds, taken.max_mb) == (0.5, 0.5)
    with pytest.raises(ValueError, match=r"seconds is 0\.0; it must be above 0"):
        parse("mdm prepare", None, Options, [*needed, "--seconds", "0"])
