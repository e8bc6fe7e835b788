import io
import tarfile
from pathlib import Path

import pytest
import torch

from mdm_models.commands import precompute
from mdm_models.text import PrecomputedText, load_text_encoder
from tests.text.directories import save_huggingface, t5

CAPTIONS = {"a": "a red fox", "b.0": "a penguin on ice", "c": "a blue fox on ice"}


def write_shard(path: Path, captions: dict[str, str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, caption in captions.items():
            for suffix, data in (("mp4", bytes(5000)), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{key}/{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return save_huggingface(tmp_path_factory.mktemp("t5"), t5())


@pytest.fixture
def run(encoder_folder, tmp_path):
    """Run the command on a list of shards, into tmp_path/features."""

    def run(*shards: Path, options: tuple[str, ...] = ()) -> int:
        paths = [str(shard) for shard in shards]
        arguments = ["--text-encoder", str(encoder_folder), "--out", str(tmp_path / "features"), "--batch-size", "2"]
        return precompute.main([*paths, *arguments, "--device", "cpu", *options])

    return run


@pytest.fixture
def shard(tmp_path) -> Path:
    return write_shard(tmp_path / "x.tar", {"a": CAPTIONS["a"], "b": CAPTIONS["b.0"], "c": CAPTIONS["c"]})


def test_what_is_read_back_is_what_the_encoder_gives(run, shard, encoder_folder, tmp_path):
    assert run(shard) == 0
    expected, expected_mask = load_text_encoder(encoder_folder)(["", *CAPTIONS.values()])
    features, mask = PrecomputedText(tmp_path / "features")(["", "x/a/a", "x/b/b", "x/c/c"])
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(features, expected, rtol=2**-8, atol=1e-5)  # stored in bfloat16


def test_shards_elsewhere_are_encoded_too(run, shard, encoder_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run(f"pipe:cat {shard}") == 0
    expected, _ = load_text_encoder(encoder_folder)([CAPTIONS["a"]])
    features, _ = PrecomputedText(tmp_path / "features")(["x/a/a"])
    torch.testing.assert_close(features, expected, rtol=2**-8, atol=1e-5)  # stored in bfloat16


def test_features_carry_the_identity_of_their_encoder(run, shard, encoder_folder, tmp_path):
    run(shard)
    PrecomputedText(tmp_path / "features", encoder=load_text_encoder(encoder_folder).identity)
    with pytest.raises(ValueError, match="not of"):
        PrecomputedText(tmp_path / "features", encoder=load_text_encoder(encoder_folder, max_tokens=20).identity)


def test_who_may_read_the_folder_may_read_the_features(run, shard, tmp_path):
    (tmp_path / "features").mkdir(mode=0o755)
    run(shard)
    assert (tmp_path / "features" / "x.safetensors").stat().st_mode & 0o777 == 0o644


def test_shards_that_are_done_are_left_alone(run, shard, tmp_path, monkeypatch):
    run(shard)
    second = write_shard(tmp_path / "y.tar", {"d": "a fox"})
    encoded = []
    write = precompute.write_features

    def record(path, *rest):
        encoded.append(path.name)
        write(path, *rest)

    monkeypatch.setattr(precompute, "write_features", record)
    assert run(shard, second) == 0
    assert encoded == ["y.safetensors"]


def test_a_damaged_file_is_written_again(run, shard, tmp_path):
    run(shard)
    path = tmp_path / "features" / "x.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert run(shard) == 0
    assert path.read_bytes() == whole


def test_a_shard_whose_captions_have_changed_is_encoded_again(run, shard, tmp_path):
    run(shard)
    size = shard.stat().st_size
    write_shard(shard, {"a": "a fox", "b": "ice", "c": "a fox"})
    assert shard.stat().st_size == size
    assert run(shard) == 0
    assert PrecomputedText(tmp_path / "features")(["x/b/b"])[1].sum() == 2


def test_an_interrupted_run_leaves_whole_files_only(run, shard, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(precompute, "_captions", interrupt)
    assert run(shard) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "features").iterdir()] == ["unconditional.safetensors"]


def test_a_folder_with_features_of_another_encoder_is_refused(run, shard, capsys):
    run(shard)
    assert run(shard, options=("--max-tokens", "20")) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_samples_without_a_caption_are_named_and_left_out(run, tmp_path, capsys):
    shard = write_shard(tmp_path / "x.tar", {"a": "a fox", "b": "  ", "c": "a penguin"})
    assert run(shard) == 0
    assert "skipped b/b" in capsys.readouterr().out
    text = PrecomputedText(tmp_path / "features")
    assert text(["x/a/a", "x/c/c"])[1].all()
    with pytest.raises(ValueError, match="'b/b'"):
        text(["x/b/b"])


def test_of_a_shard_that_breaks_off_the_whole_samples_are_used(run, shard, tmp_path, capsys):
    shard.write_bytes(shard.read_bytes()[: 3 * 512 + 5120 + 512 + 2000])  # within the clip of the second sample
    assert run(shard) == 0
    assert "cut off" in capsys.readouterr().out
    text = PrecomputedText(tmp_path / "features")
    assert text(["x/a/a"])[1].all()
    with pytest.raises(ValueError, match="'b/b'"):
        text(["x/b/b"])


def test_two_samples_of_one_key_are_refused(run, tmp_path, capsys):
    shard = write_shard(tmp_path / "x.tar", {"a": "a fox"})
    with tarfile.open(shard, "a") as tar:
        for name in ("b/b.txt", "a/a.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"fox"))
    assert run(shard) == 2
    assert "two samples of the key a/a" in capsys.readouterr().err


def test_two_shards_of_one_name_are_refused(run, shard, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    other = write_shard(tmp_path / "other" / "x.tar", {"a": "a fox"})
    assert run(shard, other) == 2
    assert "the same name" in capsys.readouterr().err


def test_features_that_are_not_finite_are_refused(run, shard, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(precompute, "load_text_encoder", lambda *args, **kwargs: broken)
    broken = load_text_encoder(save_huggingface(tmp_path / "t5", t5()))
    broken.network.encoder.final_layer_norm.weight.fill_(float("inf"))
    assert run(shard) == 2
    assert "not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shard", "encoder", "message"),
    [
        ("missing.tar", None, "there is no shard"),
        ("x.tar", "no/such/folder", "no/such/folder"),
        ("x.tar", "labels.txt", "is no network"),
    ],
)
def test_mistakes_are_answered_in_one_line(run, tmp_path, capsys, monkeypatch, shard, encoder, message):
    monkeypatch.chdir(tmp_path)
    write_shard(Path("x.tar"), {"a": "a fox"})
    Path("labels.txt").write_text("fox\n")
    assert run(Path(shard), options=("--text-encoder", encoder) if encoder else ()) == 2
    error = capsys.readouterr().err
    assert error.startswith("mdm precompute: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_shards_without_any_caption_are_no_success(run, tmp_path, capsys):
    assert run(write_shard(tmp_path / "x.tar", {"a": "", "b": " "})) == 2
    assert "none of the 1 shards has a caption" in capsys.readouterr().err
