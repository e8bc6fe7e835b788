import json

import pytest
from filelock import FileLock

from mdm_models.data.media import BadSample
from mdm_models.data.prepare.folder import ShardFolder
from tests.data.prepare.conftest import samples_of


def write(folder: ShardFolder, count: int, make=lambda text: {"jpg": text.encode()}, workers: int = 3) -> None:
    items = ((f"{i:04d}", f"caption {i}") for i in range(count))
    folder.write(items, make, per_shard=4, workers=workers, total=count, unit="texts")


def test_training_reads_what_was_written(tmp_path):
    write(ShardFolder(tmp_path, {}), 10)
    samples = samples_of(tmp_path)
    assert list(samples) == [f"{i:04d}" for i in range(10)]
    assert all(samples[f"{i:04d}"]["jpg"] == f"caption {i}".encode() for i in range(10))
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]


def test_the_bytes_of_a_shard_do_not_depend_on_which_sample_is_ready_first(tmp_path):
    for name, workers in (("one", 1), ("many", 8)):
        write(ShardFolder(tmp_path / name, {}), 40, workers=workers)
    for path in (tmp_path / "one").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes()


def test_keys_beyond_100_characters_are_kept(tmp_path):
    key = "k" * 150
    folder = ShardFolder(tmp_path, {})
    folder.write([(key, "")], lambda _: {"jpg": b"x"}, per_shard=4, workers=1, total=1, unit="texts")
    assert list(samples_of(tmp_path)) == [key]


def test_a_run_that_broke_off_goes_on_at_its_unfinished_shards(tmp_path):
    made = []

    def make(text):
        made.append(text)
        if text == "caption 9" and len(made) < 12:
            raise OSError("No space left on device")
        return {"jpg": text.encode()}

    with pytest.raises(OSError, match="No space"):
        write(ShardFolder(tmp_path, {}), 12, make, workers=1)
    assert not list(tmp_path.glob(".*.partial-*"))
    finished = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert list(samples_of(tmp_path)) == [f"{i:04d}" for i in range(4 * len(finished))]
    assert "00000.tar" in finished
    made.clear()
    made.extend([""] * 12)
    write(ShardFolder(tmp_path, {}), 12, make, workers=1)
    assert len(made) - 12 == 12 - 4 * len(finished)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in finished} == finished
    assert len(samples_of(tmp_path)) == 12


def test_a_shard_that_was_deleted_is_made_again(tmp_path):
    write(ShardFolder(tmp_path, {}), 8)
    before = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").unlink()
    write(ShardFolder(tmp_path, {}), 8)
    assert (tmp_path / "00001.tar").read_bytes() == before


def test_skipped_samples_are_counted_by_reason_and_named(tmp_path):
    def make(text):
        if text != "caption 5":
            raise BadSample("odd" if int(text[-1]) % 2 else "even", text)
        return {"jpg": b"x"}

    folder = ShardFolder(tmp_path, {"source": "test"})
    write(folder, 10, make)
    shown = folder.summary()
    assert "1 samples in 1 shards, 9 skipped" in shown
    assert "4  odd" in shown
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == {
        "settings": {"source": "test"},
        "shards": 1,
        "written": 1,
        "skipped": {"even": 5, "odd": 4},
    }
    first = json.loads((tmp_path / "reports" / "00000.json").read_text())
    assert first["skipped"]["odd"] == [["0001", "caption 1"], ["0003", "caption 3"]]


def test_a_shard_without_a_usable_sample_has_no_tar_and_is_not_tried_again(tmp_path):
    tried = []

    def make(text):
        tried.append(text)
        raise BadSample("bad")

    for _ in range(2):
        write(ShardFolder(tmp_path, {}), 4, make)
    assert list(tmp_path.glob("*.tar")) == []
    assert len(tried) == 4


def test_a_folder_begun_with_other_settings_is_refused(tmp_path):
    ShardFolder(tmp_path, {"size": 256})
    with pytest.raises(ValueError, match="size 256, not 512; choose another --out"):
        ShardFolder(tmp_path, {"size": 512})


def test_a_folder_of_foreign_shards_is_refused(tmp_path):
    (tmp_path / "00000.tar").touch()
    with pytest.raises(ValueError, match="unknown origin"):
        ShardFolder(tmp_path, {})


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    folder = ShardFolder(tmp_path, {})
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="another process is writing"):
        write(folder, 4)


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path):
    (tmp_path / ".00000.tar.partial-123").touch()
    write(ShardFolder(tmp_path, {}), 4)
    assert not list(tmp_path.glob(".*.partial-*"))
