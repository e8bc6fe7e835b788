"""Models on disk: what comes back, what a crash leaves, and files that are damaged or do not fit."""

import io
import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdm_models import UNetConfig, build_model, from_pretrained, storage
from mdm_models.pipeline import Pipeline, PipelineConfig
from mdm_models.text import TransformerTextEncoder
from tests.models.golden import relative_error

INNER = UNetConfig(
    channels=(32,), blocks=(1,), attention=(1,), mid_blocks=True, embed_dim=32, micro=(("scale", 8.0),), context_dim=8
)
CONFIG = UNetConfig(channels=(32, 32), blocks=(1, 1), embed_dim=32, inner=INNER)
OTHER = UNetConfig(channels=(32,), blocks=(1,), embed_dim=32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_model(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def assert_same_weights(ours, theirs):
    weights = theirs.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in ours.state_dict().items())


def test_model_comes_back_with_its_config_weights_and_memory_format(model, saved):
    loaded = from_pretrained(saved)
    assert loaded.config == CONFIG
    assert_same_weights(loaded, model)
    assert [p.stride() for p in loaded.parameters()] == [p.stride() for p in model.parameters()]
    assert not loaded.training


def test_loaded_model_predicts_the_same(model, saved):
    inputs = [torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)], torch.tensor([3, 700]), torch.randn(2, 4, 8)
    with torch.no_grad():
        for ours, theirs in zip(from_pretrained(saved)(*inputs), model(*inputs), strict=True):
            assert torch.equal(ours, theirs)


def test_loaded_model_can_be_trained(saved):
    loaded = from_pretrained(saved).train()
    inputs = [torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)], torch.tensor([3, 700]), torch.randn(2, 4, 8)
    sum(output.square().mean() for output in loaded(*inputs)).backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_dtype_converts_every_weight(model, saved):
    loaded = from_pretrained(saved, dtype=torch.bfloat16)
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key].bfloat16())


def test_weights_keep_the_dtype_they_were_saved_in(saved):
    loaded = from_pretrained(saved, dtype=torch.float16)
    loaded.save_pretrained(saved)
    assert_same_weights(from_pretrained(saved), loaded)


def test_weights_do_not_depend_on_the_file_after_loading(model, saved):
    loaded = from_pretrained(saved)
    path = saved / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert_same_weights(loaded, model)


def test_dtype_that_no_model_computes_in_is_refused(saved):
    with pytest.raises(TypeError, match=r"dtype is torch.int8; it must be one of torch.float32"):
        from_pretrained(saved, dtype=torch.int8)


def test_saving_again_replaces_the_weights(saved):
    other = build_model(CONFIG)
    other.save_pretrained(saved)
    assert_same_weights(from_pretrained(saved), other)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_saving_again_never_writes_into_the_file_that_is_there(model, saved):
    with (saved / "model.safetensors").open("rb") as file:
        whole = file.read()
        build_model(CONFIG).save_pretrained(saved)
        file.seek(0)
        assert file.read() == whole


def test_another_model_is_not_overwritten_unless_allowed(model, saved):
    other = build_model(OTHER)
    with pytest.raises(ValueError, match="holds another model"):
        other.save_pretrained(saved)
    assert_same_weights(from_pretrained(saved), model)
    other.save_pretrained(saved, overwrite=True)
    assert_same_weights(from_pretrained(saved), other)


def test_both_files_can_be_read_by_whom_the_umask_allows(saved):
    assert (saved / "model.safetensors").stat().st_mode == (saved / "config.json").stat().st_mode


class Crash(Exception):
    """Neither of the errors that saving handles: the process ends here."""


def half_written(tensors, path, metadata):
    save_file(tensors, path, metadata)
    path.write_bytes(path.read_bytes()[:999])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Crash()])
def test_what_was_saved_survives_a_failure_while_the_weights_are_written(model, saved, monkeypatch, error, overwrite):
    def failing(tensors, path, metadata):
        half_written(tensors, path, metadata)
        raise error

    monkeypatch.setattr(storage, "save_file", failing)
    with pytest.raises(type(error), match="No space left" if error.args else None):
        build_model(OTHER if overwrite else CONFIG).save_pretrained(saved, overwrite=overwrite)
    assert_same_weights(from_pretrained(saved), model)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Crash()])
def test_what_was_saved_survives_a_failure_while_the_config_is_written(model, saved, monkeypatch, error):
    fail_at(monkeypatch, "config.json", error)
    with pytest.raises(type(error), match=r"No space left on device: '.*config.json'" if error.args else None):
        build_model(OTHER).save_pretrained(saved, overwrite=True)
    assert_same_weights(from_pretrained(saved), model)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def fail_at(monkeypatch, name: str, error: BaseException) -> None:
    """Has the writing of files of that name end with the error, from here on."""
    sync = storage.sync

    def failing(path) -> None:
        if path.name.startswith(f".{name}.partial"):
            raise error
        sync(path)

    monkeypatch.setattr(storage, "sync", failing)


@pytest.mark.parametrize("moment", [1, 2])
def test_a_crash_while_files_take_their_places_leaves_no_config_of_other_weights(saved, monkeypatch, moment):
    replace, left = Path.replace, iter([Crash] if moment == 1 else [None, Crash])

    def crash(path, target):
        if crashes := next(left):
            raise crashes
        replace(path, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(Crash):
        build_model(OTHER).save_pretrained(saved, overwrite=True)
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file; the directory holds no saved model"):
        from_pretrained(saved)


def files_in(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_a_pipeline_as_it_was(tmp_path, monkeypatch):
    """Of which each file could be written but the last."""

    def pipeline() -> Pipeline:
        text = TransformerTextEncoder(CONFIG.innermost.context_dim, layers=1, max_tokens=8)
        return Pipeline(build_model(CONFIG), text, PipelineConfig(size=8))

    pipeline().save_pretrained(tmp_path)
    before = files_in(tmp_path)
    fail_at(monkeypatch, "pipeline.json", OSError(28, "No space left on device"))
    with pytest.raises(OSError, match=r"No space left on device: '.*pipeline.json'"):
        pipeline().save_pretrained(tmp_path)
    assert files_in(tmp_path) == before


def refusal(directory, kind=ValueError) -> str:
    with pytest.raises(kind, match=str(directory)) as error:
        from_pretrained(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def refuse(monkeypatch, name: str) -> None:
    """Has files of that name refused as the system does, which lets root read all."""
    opened = io.open

    def refusing(file, *args, **options):
        if Path(file).name == name:
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *args, **options)

    monkeypatch.setattr(io, "open", refusing)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_not_taken_for_a_damaged_one(saved, monkeypatch, name):
    refuse(monkeypatch, name)
    assert f"Permission denied: '{saved}/{name}'" in refusal(saved, PermissionError)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, 0.5, -1])
def test_truncated_weights_are_refused(saved, kept):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    assert "is not a whole .safetensors file" in refusal(saved)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 64,
        b"{not json" + b" " * 55,
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'.ljust(64),  # of data that are not there
        b'{"a":{"dtype":"F32","shape":[1e99],"data_offsets":[0,0]}}'.ljust(64),
        b'{"a":{"dtype":"EVIL","shape":[0],"data_offsets":[0,0]}}'.ljust(64),
    ],
)
def test_weights_with_a_bad_header_are_refused(saved, header):
    (saved / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "is not a whole .safetensors file" in refusal(saved)


def test_weights_with_an_absurd_header_length_are_refused(saved):
    (saved / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert "is not a whole .safetensors file" in refusal(saved)


def test_a_pickle_in_place_of_the_weights_is_refused(saved):
    torch.save({"conv_in.weight": torch.zeros(3)}, saved / "model.safetensors")
    assert "is not a whole .safetensors file" in refusal(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("conv_in.bias"), "of another model: it lacks 1 tensors, as conv_in.bias"),
        (lambda w: w.update(extra=torch.zeros(1)), "of another model: it has 1 tensors too many, as 'extra'"),
        (lambda w: w.update({"conv_in.bias": torch.zeros(31)}), r"conv_in.bias has shape (31,); the model's is (32,)"),
        (lambda w: w.update({"conv_in.bias": torch.zeros(32).int()}), "must be floating-point numbers"),
        (lambda w: w.update({"conv_in.bias": torch.zeros(32).half()}), "choose one to compute in with the argument"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(saved, change, message):
    weights = load_file(saved / "model.safetensors")
    change(weights)
    save_file(weights, saved / "model.safetensors")
    assert message in refusal(saved)


def test_weights_of_several_types_are_loaded_as_the_type_asked_for(saved):
    weights = load_file(saved / "model.safetensors")
    weights["conv_in.bias"] = weights["conv_in.bias"].half()
    save_file(weights, saved / "model.safetensors")
    assert {p.dtype for p in from_pretrained(saved, dtype=torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("key", "value", "kind", "message"),
    [
        ("channels", None, ValueError, "config keys channels are missing"),
        ("widths", [3], ValueError, "unknown config keys widths"),
        ("channels", "32", TypeError, "channels is '32'; it must be of type tuple"),
        ("channels", [32, "32"], TypeError, "channels is (32, '32')"),
        ("channels", [32.0, 32.0], TypeError, "channels is (32.0, 32.0)"),
        ("blocks", [True, True], TypeError, "blocks is (True, True)"),
        ("rotary", 1, TypeError, "rotary is 1; it must be of type bool"),
        ("micro", [["scale"]], TypeError, "micro is (('scale',),)"),
        ("embed_dim", 0, ValueError, "embed_dim 0 must be at least 1"),
        ("norm_groups", 0, ValueError, "norm_groups 0 must be at least 1"),
        ("blocks", [1, 10**12], ValueError, "too few for the"),
        ("dropout", float("nan"), ValueError, "dropout nan"),
        ("kind", "volume", ValueError, "kind 'volume' must be one of"),
        ("inner", [], TypeError, "a UNet's config is ()"),
    ],
)
def test_a_config_key_that_is_wrong_is_named(saved, key, value, kind, message):
    path = saved / "config.json"
    config = json.loads(path.read_text())
    config["unet"].pop(key, None)
    if value is not None:
        config["unet"][key] = value
    path.write_text(json.dumps(config))
    assert message in refusal(saved, kind)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        ('{"format_version": 1, "unet": {', "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[1]", "has no format_version"),
        ('{"model_type": "t5"}', "has no format_version"),
        ('{"format_version": 2, "unet": {}}', "has format_version 2; this code reads 1"),
        ('{"format_version": 1}', "see unet"),
        ('{"format_version": 1, "unet": {}, "auto_map": "evil.py"}', "see auto_map"),
    ],
)
def test_a_config_that_is_damaged_or_of_something_else_is_refused(saved, text, message):
    (saved / "config.json").write_text(text)
    assert message in refusal(saved)


def test_bytes_that_are_no_text_are_refused_as_config(saved):
    (saved / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "is damaged" in refusal(saved)


def test_missing_weights_are_named(saved):
    (saved / "model.safetensors").unlink()
    assert "model.safetensors: no such file" in refusal(saved, FileNotFoundError)


def test_a_file_in_place_of_a_directory_gets_a_hint(saved):
    with pytest.raises(ValueError, match=r"config.json is a file; name the directory"):
        from_pretrained(saved / "config.json")


def test_a_path_that_is_not_there_is_named(tmp_path):
    assert "no such directory" in refusal(tmp_path / "absent", FileNotFoundError)


def test_a_repository_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot be had from the Hugging Face Hub" in refusal("nobody/no-such-model-of-ours", FileNotFoundError)


def test_the_hub_client_need_not_be_installed_until_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "cannot be had from the Hugging Face Hub" in refusal("somebody/some-model", FileNotFoundError)


def test_a_repository_of_the_hub_is_read_from_where_it_was_downloaded_to(model, saved, monkeypatch):
    asked = {}

    def snapshot_download(repository, allow_patterns):
        asked[repository] = allow_patterns
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_same_weights(from_pretrained("somebody/some-model"), model)
    assert asked == {"somebody/some-model": ["config.json", "model.safetensors"]}


def test_a_bfloat16_copy_agrees_with_the_original(model, saved):
    inputs = [torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)], torch.tensor([3, 700]), torch.randn(2, 4, 8)
    with torch.no_grad():
        for ours, theirs in zip(from_pretrained(saved, dtype=torch.bfloat16)(*inputs), model(*inputs), strict=True):
            assert relative_error(ours.float(), theirs) < 0.05  # some 20 layers, each rounding to 8 bits
