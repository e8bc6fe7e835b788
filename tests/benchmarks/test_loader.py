import json

from benchmarks import loader


def test_both_loaders_give_the_same_pictures_and_captions(tmp_path):
    shards = loader.write_shards(tmp_path, 1, 4)

    def found(of) -> set[tuple[bytes, str]]:
        drawn = of(shards, 4, 0)
        batches = [next(drawn) for _ in range(12)]  # of random order, which repeats samples
        return {(p.numpy().tobytes(), c) for images, captions in batches for p, c in zip(images, captions, strict=True)}

    ours, plain = found(loader.ours), found(loader.plain)
    assert len(plain) == 4
    assert {picture for picture, _ in ours} == {picture for picture, _ in plain}
    assert {pair for pair in ours if pair[1]} == plain  # "" where a caption was dropped


def test_command_prints_a_row_for_each_number_of_workers_and_writes_json(tmp_path, capsys):
    small = ["--shards", "2", "--samples", "8", "--batch-size", "4", "--turn", "2", "--seconds", "0"]
    loader.main([*small, "--workers", "0", "2", "--json", str(tmp_path / "loader.json")])
    *_, none, two = capsys.readouterr().out.splitlines()
    assert none.startswith("| 0 ")
    assert two.startswith("| 2 ")
    rates = json.loads((tmp_path / "loader.json").read_text())["samples/s"]
    assert all(rate > 0 for of_workers in rates.values() for rate in of_workers.values())
    assert rates.keys() == {"0", "2"}


def test_where_the_time_goes_is_told_of_both(capsys):
    loader.main(["--profile", "--shards", "1", "--samples", "8", "--batch-size", "4", "--turn", "1"])
    printed = capsys.readouterr().out
    assert "ours: 4 samples" in printed
    assert "webdataset: 4 samples" in printed
