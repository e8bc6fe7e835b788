import json
import math

import pytest

from mdm_models.training.data import Skip
from mdm_models.training.logbook import Logbook


@pytest.fixture
def open_book(tmp_path):
    books = []

    def opened(step: int) -> Logbook:
        books.append(Logbook(tmp_path, step, steps=100))
        return books[-1]

    yield opened
    for book in books:
        book.close()


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_is_one_line_of_json(open_book, tmp_path):
    open_book(0).record(10, loss=0.5, level_losses=[0.2, 0.3])
    assert lines(tmp_path / "log.jsonl") == [{"step": 10, "loss": 0.5, "level_losses": [0.2, 0.3], "skipped": {}}]


def test_what_is_not_finite_is_null(open_book, tmp_path):
    open_book(0).record(10, loss=math.nan, level_losses=[math.inf, 1.0])
    record = lines(tmp_path / "log.jsonl")[0]
    assert (record["loss"], record["level_losses"]) == (None, [None, 1.0])


def test_a_resumed_run_drops_the_records_it_will_write_again(open_book, tmp_path):
    book = open_book(0)
    for step in (10, 20, 30):
        book.record(step, loss=1.0)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # killed while it wrote
    open_book(20).record(25, loss=2.0)
    assert [record["step"] for record in lines(tmp_path / "log.jsonl")] == [10, 20, 25]


def test_each_skipped_sample_is_named_once_also_after_a_resume(open_book, tmp_path):
    skip, other = Skip("a.tar", "k1", "too short", "9 frames"), Skip("a.tar", "k2", "too short", "")
    open_book(0).skip([skip, skip])
    with (tmp_path / "skipped.jsonl").open("a") as file:
        file.write('{"shard": "a.t')  # killed while it wrote
    book = open_book(5)
    book.skip([skip, other])
    book.record(6, loss=0.0)
    assert [record["key"] for record in lines(tmp_path / "skipped.jsonl")] == ["k1", "k2"]
    assert lines(tmp_path / "log.jsonl")[-1]["skipped"] == {"too short": 2}


def test_a_skip_is_shown_with_its_file(open_book, capsys):
    open_book(0).skip([Skip("shards/a.tar", "k1", "undecodable", "no video stream")])
    assert "skipped k1 in shards/a.tar: undecodable (no video stream)" in capsys.readouterr().out
