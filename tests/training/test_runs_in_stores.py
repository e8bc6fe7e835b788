"""Runs in an object store, whose machine is lost at any moment."""

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from mdm_models.data import locations
from mdm_models.training.checkpoint import checkpoints
from mdm_models.training.checkpoint.remote import mirrored
from mdm_models.training.checkpoint.store import Store
from mdm_models.training.config import TrainConfig, changed
from mdm_models.training.trainer import train
from tests import forked
from tests.hub import REPOSITORY, hub
from tests.made_data import encode_image, write_shard
from tests.training import remote_run
from tests.training.models import LEAST_MODEL, settings

MEMORY = "memory://bucket/run"


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    pictures = {key: encode_image(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)) for key in "abcd"}
    samples = {key: {"png": picture, "txt": key.encode()} for key, picture in pictures.items()}
    return write_shard(tmp_path_factory.mktemp("data") / "a.tar", samples)


@pytest.fixture(scope="module")
def through(shard, tmp_path_factory) -> Path:
    """An undisturbed run of six steps on a local disk."""
    return train(changed(settings(shard, tmp_path_factory.mktemp("through") / "run"), frames=1), LEAST_MODEL)


@pytest.fixture(autouse=True)
def store(monkeypatch):
    """An empty store that is not waited for."""
    monkeypatch.setattr(locations, "WAITS", ())
    monkeypatch.setattr(locations, "_given_up", {})
    yield Store(MEMORY)
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def on(shard, tmp_path) -> Callable[..., TrainConfig]:
    """on("a") are the settings of the run on machine a, which nothing is known on at first."""

    def settings_on(machine: str, **values) -> TrainConfig:
        config = changed(settings(shard, tmp_path), frames=1, cache=str(tmp_path / machine), out=MEMORY)
        return changed(config, **values)

    return settings_on


def steps_in(store: Store) -> list[str]:
    """The checkpoints that count."""
    return [name.split("/")[1] for name in store.names("checkpoints") if name.endswith("/manifest.json")]


def logged(text: bytes) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in map(json.loads, text.splitlines())]


def equal_weights(run: Path, other: Path) -> bool:
    ours, theirs = checkpoints.load_averages(run), checkpoints.load_averages(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_store_has_what_a_run_leaves(on, store, capsys):
    train(on("a", sample_every=6), LEAST_MODEL)
    names = store.names()
    assert steps_in(store) == ["step-00000003", "step-00000006"]
    assert {"log.jsonl", "skipped.jsonl", "model/pipeline.json", "samples/step-00000006.webp"} <= set(names)
    assert any(name.startswith("tensorboard/") for name in names)
    assert json.loads(store.read("config.json"))["out"] == MEMORY
    assert json.loads(store.read("heartbeat.json"))["state"] == "finished"
    assert f"{MEMORY}: 6 of 6 steps" in capsys.readouterr().out


def test_another_machine_goes_on_to_the_same_weights(on, store, through):
    train(on("a", steps=3), LEAST_MODEL)
    run = train(on("b"), LEAST_MODEL)
    assert equal_weights(run, through)
    assert logged(store.read("log.jsonl"))[0] == logged((through / "log.jsonl").read_bytes())[0]
    assert [step for step, _ in logged(store.read("log.jsonl"))] == [2, 3, 4, 6]


class Elsewhere(MemoryFileSystem):
    """fsspec's memory under another protocol: what it is called is tried, not the service of that name."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(re.sub("^gs://", "memory://", path))


def test_a_run_under_another_protocol_is_gone_on_with(on, through, monkeypatch):
    monkeypatch.setitem(_registry, "gs", Elsewhere)
    url = "gs://bucket/run"
    train(on("a", out=url, steps=3), LEAST_MODEL)
    assert steps_in(Store(url)) == ["step-00000003"]
    assert equal_weights(train(on("b", out=url), LEAST_MODEL), through)


def test_a_run_and_its_shards_in_a_repository_of_the_hub(shard, through, tmp_path):
    """Killed before its second checkpoint counts, it is gone on with from an empty cache."""
    with hub() as server:
        server.files["shards/a.tar"] = shard.read_bytes()
        url = f"hf://{REPOSITORY}"
        config = changed(settings(shard, f"{url}/run"), shards=(f"{url}/shards/",), split_shards="no", frames=1)

        def train_on(machine: str, kill_at: str = "") -> int | None:
            environment = server.environment | {"XDG_CACHE_HOME": str(tmp_path / machine)}
            [code] = remote_run.run(config, tmp_path, [environment], kill_at)
            return code

        assert train_on("a", kill_at="checkpoints/step-00000006/manifest.json") == -signal.SIGKILL
        counting = [name for name in server.files if name.endswith("manifest.json")]
        assert counting == ["run/checkpoints/step-00000003/manifest.json"]
        assert train_on("b") == 0
        assert [step for step, _ in logged(server.files["run/log.jsonl"])] == [2, 4, 6]
        [mirror] = (tmp_path / "b").glob("**/runs/*/")
        assert equal_weights(mirror, through)
        for name in ("model/model.safetensors", "checkpoints/step-00000006/manifest.json"):
            assert server.files[f"run/{name}"] == (mirror / name).read_bytes()
    said = (tmp_path / "said-0").read_text()
    assert "hf://buckets/" in said  # what suits a run better
    assert "hffs-" not in said  # bars of huggingface_hub's, one for each file


def test_machines_that_share_no_folder_go_on_from_the_store_and_so_does_one_alone(shard, tmp_path, monkeypatch):
    """Of two, one is killed while it sends its part of the second checkpoint."""
    config = changed(settings(shard, "s3://bucket/run"), frames=1, micro_batch=1)
    store, part = Store(config.out), "checkpoints/step-00000006/__1_0.distcp"
    with remote_run.bucket("bucket", tmp_path / "server.log") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

        def both(kill_at: str = "") -> list[int | None]:
            ranks = [
                environment | each | {"LOCAL_RANK": "0", "XDG_CACHE_HOME": f"{tmp_path}/{each['RANK']}"}
                for each in forked.world(2)
            ]
            return remote_run.run(config, tmp_path, ranks, kill_at)

        leader, follower = both(kill_at=part)
        assert leader not in (None, 0)
        assert follower == -signal.SIGKILL
        assert steps_in(store) == ["step-00000003"]
        assert both() == [0, 0]
        assert steps_in(store) == ["step-00000003", "step-00000006"]
        assert [step for step, _ in logged(store.read("log.jsonl"))] == [2, 4, 6]
        [mirror] = (tmp_path / "1").glob("**/*.rank-1")
        assert [path.name for path in mirror.glob("checkpoints/*06/*")] == ["__1_0.distcp"]
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "0"))  # which has only the leader's part
        alone = train(changed(config, steps=7), LEAST_MODEL)
    whole = train(changed(config, steps=7, out=str(tmp_path / "whole")), LEAST_MODEL)
    ours, theirs = checkpoints.load_averages(alone), checkpoints.load_averages(whole)
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name])


def test_each_of_two_processes_sends_its_share(shard, tmp_path):
    url = f"file://{tmp_path}/bucket/run"
    config = changed(settings(shard, url), frames=1, cache=str(tmp_path / "cache"), micro_batch=1)
    assert remote_run.run(config, tmp_path, forked.world(2)) == [0, 0]
    checkpoint = "checkpoints/step-00000006"
    first, second = ((tmp_path / f"sent-{rank}").read_text().splitlines() for rank in "01")
    assert {f"{checkpoint}/.metadata", f"{checkpoint}/__1_0.distcp", f"{checkpoint}/manifest.json"} <= set(first)
    assert f"{checkpoint}/__0_0.distcp" in second
    checkpoints.verified_manifest(tmp_path / "bucket" / "run" / checkpoint)


def test_a_run_in_a_bucket_killed_while_it_sends_goes_on_from_an_empty_mirror(shard, through, tmp_path, monkeypatch):
    config = changed(settings(shard, "s3://bucket/run"), frames=1, cache=str(tmp_path / "a"))
    store, half_sent = Store(config.out), "checkpoints/step-00000006"
    with remote_run.bucket("bucket", tmp_path / "server.log") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert remote_run.run(config, tmp_path, [environment], kill_at=f"{half_sent}/__0_0.distcp") == [-signal.SIGKILL]
        assert steps_in(store) == ["step-00000003"]
        assert store.names(half_sent) == [f"{half_sent}/.metadata"]
        moved = changed(config, cache=str(tmp_path / "b"))
        assert remote_run.run(moved, tmp_path, [environment]) == [0]
        assert steps_in(store) == ["step-00000003", "step-00000006"]
        log = store.read("log.jsonl")
    assert equal_weights(Path(mirrored(moved).out), through)
    assert [step for step, _ in logged(log)] == [2, 4, 6]
