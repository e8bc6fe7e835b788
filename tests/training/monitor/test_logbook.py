import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mdm_models.data.config import DataConfig
from mdm_models.data.reader import Skip
from mdm_models.training.config import OptimizerConfig, TrainConfig
from mdm_models.training.monitor import logbook
from mdm_models.training.monitor.logbook import Logbook, Remaining


@pytest.fixture
def open_book(tmp_path):
    books = []

    def opened(step: int) -> Logbook:
        config = TrainConfig(str(tmp_path), DataConfig(("none.tar",)), optimizer=OptimizerConfig(steps=100))
        books.append(Logbook(config, step))
        return books[-1]

    yield opened
    for book in books:
        book.close()


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def curves(tmp_path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = events.Tags()["scalars"]
    return {name: [(event.step, round(event.value, 4)) for event in events.Scalars(name)] for name in names}


def test_a_record_is_one_line_of_json(open_book, tmp_path):
    open_book(0).record(10, loss=0.5, level_losses=[0.2, 0.3])
    expected = {"step": 10, "kind": "training", "loss": 0.5, "level_losses": [0.2, 0.3], "skipped": {}}
    assert lines(tmp_path / "log.jsonl") == [expected]


def test_an_evaluation_is_told_from_training(open_book, tmp_path):
    book = open_book(0)
    book.record(10, loss=0.5)
    book.record(10, "evaluation", loss=0.6)
    book.close()
    assert lines(tmp_path / "log.jsonl")[1] == {"step": 10, "kind": "evaluation", "loss": 0.6}
    assert curves(tmp_path) == {"loss": [(10, 0.5)], "evaluation/loss": [(10, 0.6)]}


def test_every_level_and_every_kind_of_skip_has_a_curve(open_book, tmp_path):
    book = open_book(0)
    book.skip([Skip("a.tar", "k1", "too short", "")])
    book.record(10, level_losses=[0.2, math.nan])
    book.close()
    assert curves(tmp_path) == {"level_losses/0": [(10, 0.2)], "skipped/too_short": [(10, 1)]}


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


class Measured:
    """An interval with known numbers."""

    def summary(self) -> dict[str, float]:
        return {"loss": 0.25, "step_seconds": 1.5, "data_seconds": 0.1, "samples_per_second": 64.0, "mfu": 0.421}


def test_the_bar_shows_how_the_run_goes(open_book):
    book = open_book(40)
    book.progress(Measured())
    assert book.bar.n == 41
    assert book.bar.postfix == "? left, loss 0.2500, 1.50 s/step, 64.0 samples/s, MFU 42.1%"


def test_the_time_left_is_that_of_the_whole_run_at_the_pace_since_a_resume(monkeypatch):
    clock = iter([1000.0, 1060.0, 1600.0])  # a slow first step before; then 60 s, then 9 steps in 540 s
    monkeypatch.setattr(logbook.time, "monotonic", lambda: next(clock))
    remaining = Remaining(steps=1000)
    assert [remaining.after(step) for step in (901, 902, 911)] == ["?", "1:38:00", "1:29:00"]
