import http.server
import threading
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
import webdataset

from mdm_models import cli
from mdm_models.data import locations
from mdm_models.data.config import DataConfig
from mdm_models.data.locations import UnreachableError
from mdm_models.data.shard_index import scan
from mdm_models.data.shards import ShardedSamples, open_shards
from mdm_models.errors import DataError
from mdm_models.processes import Processes

SAMPLE = Path(__file__).parents[2] / "recipes" / "data"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(locations, "WAITS", (0, 0))
    monkeypatch.setattr("mdm_models.data.shards.WAITS_AT_START", (0, 0))


@pytest.fixture
def config_of(tmp_path):
    def make(*shards, **changes) -> DataConfig:
        return DataConfig(tuple(map(str, shards)), cache=str(tmp_path / "cache"), **changes)

    return make


class ShakyServer(http.server.SimpleHTTPRequestHandler):
    """Breaks off the first `failing` answers with each shard midway; counts requests by path."""

    failing: int
    asked: Counter[str]

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        if self.path.endswith(".tar") and self.asked[self.path] <= self.failing:
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            return
        super().do_GET()

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server(tmp_path):
    """server(failing) serves tmp_path over http and gives its address."""
    running = []

    def serve(failing: int = 0) -> str:
        handler = type("Handler", (ShakyServer,), {"failing": failing, "asked": Counter()})
        running.append(
            http.server.ThreadingHTTPServer(
                ("127.0.0.1", 0), lambda *arguments: handler(*arguments, directory=str(tmp_path))
            )
        )
        threading.Thread(target=running[-1].serve_forever, args=(0.01,), daemon=True).start()
        serve.asked = handler.asked
        return f"http://127.0.0.1:{running[-1].server_port}"

    yield serve
    for each in running:
        each.shutdown()
        each.server_close()


def test_random_access_finds_what_webdataset_streams(config_of):
    names = f"{SAMPLE}/clips-{{000..001}}.tar"
    samples = ShardedSamples(open_shards(config_of(names)))
    streamed = list(webdataset.WebDataset(names, shardshuffle=False))
    assert len(samples) == len(streamed) == 32
    for index in (31, 0, 16, 15):
        for suffix in ("__key__", "txt", "mp4"):
            assert samples[index][suffix] == streamed[index][suffix]


def test_a_sample_knows_its_shard(pictures_of, config_of):
    samples = ShardedSamples(open_shards(config_of(pictures_of("a.tar", 2), pictures_of("b.tar", 3))))
    assert [Path(samples.shard_of(i).path).name for i in range(5)] == ["a.tar"] * 2 + ["b.tar"] * 3


def test_local_shards_are_read_where_they_are(pictures_of, config_of, tmp_path):
    ShardedSamples(open_shards(config_of(pictures_of("a.tar", 2))))[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


@pytest.mark.parametrize("kind", ["store", "http", "pipe"])
def test_shards_elsewhere_are_read_as_if_they_were_here(pictures_of, config_of, bucket, server, kind):
    shard = pictures_of("a.tar", 3)
    name = {"store": bucket, "http": lambda path: f"{server()}/{path.name}", "pipe": lambda path: f"pipe:cat {path}"}
    here = ShardedSamples([scan(str(shard))])
    there = ShardedSamples(open_shards(config_of(name[kind](shard))))
    assert len(there) == 3
    for index in range(3):
        mine, theirs = here[index], there[index]
        assert {**mine, "__url__": ""} == {**theirs, "__url__": ""}


def test_a_download_that_breaks_midway_is_begun_again(pictures_of, config_of, server):
    pictures_of("a.tar", 300)
    samples = ShardedSamples(open_shards(config_of(f"{server(failing=2)}/a.tar")))
    assert len(samples) == 300
    assert samples[299]["txt"] == b"a299"
    assert server.asked["/a.tar"] == 3


def test_the_samples_of_a_shard_elsewhere_are_found_once(pictures_of, config_of, server, tmp_path):
    pictures_of("a.tar", 3)
    config = config_of(f"{server()}/a.tar")
    [first], [second] = open_shards(config), open_shards(config)
    assert server.asked["/a.tar"] == 1
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    [third] = open_shards(config)
    assert server.asked["/a.tar"] == 1
    assert ShardedSamples([third])[2]["txt"] == b"a2"
    assert server.asked["/a.tar"] == 2
    np.testing.assert_array_equal(first.bounds, second.bounds)


def test_a_shard_that_was_replaced_is_looked_at_again(pictures_of, config_of, bucket):
    [first] = open_shards(config_of(bucket(pictures_of("a.tar", 3))))
    [second] = open_shards(config_of(bucket(pictures_of("a.tar", 5))))
    assert (len(first), len(second)) == (3, 5)


def test_mdm_index_spares_other_machines_the_reading(pictures_of, server, tmp_path, capsys):
    for name in ("a.tar", "b.tar"):
        pictures_of(name, 3)
    assert cli.main(["index", str(tmp_path / "*.tar")]) == 0
    assert "6 samples in 2 shards" in capsys.readouterr().out
    address = server()
    shards = open_shards(DataConfig((f"{address}/{{a,b}}.tar",), cache=str(tmp_path / "cache")))
    assert [len(shard) for shard in shards] == [3, 3]
    assert server.asked == {"/a.tar.index": 1, "/b.tar.index": 1}
    assert ShardedSamples(shards)[4]["txt"] == b"b1"


def test_mdm_index_writes_into_an_object_store(pictures_of, bucket, tmp_path):
    name = bucket(pictures_of("a.tar", 3))
    assert cli.main(["index", name, "--cache", str(tmp_path / "cache")]) == 0
    assert fsspec.filesystem("memory").exists("/bucket/a.tar.index")


def test_mdm_index_names_a_shard_that_is_none(tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(b"none")
    assert cli.main(["index", str(tmp_path)]) == 2
    assert "a.tar is not a tar file" in capsys.readouterr().err


def test_an_index_of_another_file_is_not_used(pictures_of, config_of, tmp_path):
    shard = pictures_of("a.tar", 3)
    cli.main(["index", str(shard)])
    pictures_of("a.tar", 30)
    assert [len(shard) for shard in open_shards(config_of(shard))] == [30]


def test_an_index_of_another_file_of_the_same_size_is_not_used(pictures_of, config_of, tmp_path):
    shard = pictures_of("a.tar", 3)
    cli.main(["index", str(shard)])
    [before] = open_shards(config_of(shard))
    pictures_of("b.tar", 3).rename(shard)
    [now] = open_shards(config_of(shard))
    assert now.size == before.size
    assert ShardedSamples([now])[2]["__key__"] == "b2"


def test_a_shard_out_of_reach_stays_without_samples(pictures_of, config_of, server):
    for i in range(3):
        pictures_of(f"{i}.tar", 2)
    address = server(failing=0)
    shards = open_shards(config_of(f"{address}/{{0..2}}.tar", "pipe:exit 1", max_bad_share=0.3))
    assert [len(shard) for shard in shards] == [2, 2, 2, 0]
    assert shards[3].damage == "cannot be reached: the command ended with status 1:"


def test_too_many_shards_out_of_reach_end_in_an_error(pictures_of, config_of):
    with pytest.raises(DataError, match=r"1 of 2 shards, among them pipe:exit 1, cannot be reached"):
        open_shards(config_of(pictures_of("a.tar", 2), "pipe:exit 1", max_bad_share=0.4))


def test_a_server_that_does_not_answer_is_not_a_missing_shard(config_of, server):
    with pytest.raises(DataError, match=r"1 of 1 shards.*cannot be reached"):
        open_shards(config_of("http://127.0.0.1:9/a.tar"))
    with pytest.raises(DataError, match="no shard http"):
        open_shards(config_of(f"{server()}/a.tar"))


@pytest.mark.parametrize("patience", [0, 600])
def test_a_shard_that_is_lost_is_asked_for_again_after_a_while(pictures_of, config_of, tmp_path, monkeypatch, patience):
    monkeypatch.setattr("mdm_models.data.shards.TRY_AGAIN", patience)
    shard = pictures_of("a.tar", 2)
    samples = ShardedSamples(open_shards(config_of(f"pipe:cat {shard}")))
    [copy] = (tmp_path / "cache").glob("*.tar")
    copy.unlink()
    away = shard.rename(tmp_path / "away")
    with pytest.raises(UnreachableError):
        samples[0]
    away.rename(shard)
    if patience:
        with pytest.raises(UnreachableError):
            samples[0]
    else:
        assert samples[0]["txt"] == b"a0"


def test_shards_without_any_picture_are_refused(pictures_of, config_of):
    with pytest.raises(DataError, match=r"no image or clip in .*a\.tar"):
        open_shards(config_of(pictures_of("a.tar", 0, b={"txt": b"b"})))


def _find(rank: int, meeting: str, config: DataConfig, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        results[rank] = [len(shard) for shard in open_shards(config, Processes(rank, 2, torch.device("cpu")))]
    except DataError as error:
        results[rank] = str(error)
    dist.destroy_process_group()


@pytest.mark.parametrize("broken", [False, True])
def test_processes_share_the_work_and_the_errors(pictures_of, config_of, tmp_path, broken):
    shards = [pictures_of(f"{i}.tar", i + 1) for i in range(5)]
    if broken:
        shards[3].write_bytes(b"none")
    results = processes.Manager().dict()
    processes.start_processes(
        _find, (str(tmp_path / "meeting"), config_of(*shards), results), nprocs=2, start_method="fork"
    )
    if broken:
        assert results[0] == results[1]
        assert "3.tar is not a tar file" in results[0]
    else:
        assert results[0] == results[1] == [1, 2, 3, 4, 5]
