import dataclasses
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mdm_models.text import EncoderIdentity, PrecomputedText, load_text_encoder
from mdm_models.text.precomputed import UNCONDITIONAL, prompt_for, write_features

T5 = EncoderIdentity("t5", width=4, max_tokens=8, weights="abc")
FEATURES = {  # sorted neither by key nor by length
    "b": torch.arange(12.0).reshape(3, 4),
    "a": torch.arange(8.0).reshape(2, 4) - 3,
    "long/key é": torch.full((5, 4), 7.0),
}
CAPTIONS = {key: f"a {key}" for key in FEATURES}
EMPTY = torch.full((1, 4), -2.0)


@pytest.fixture
def folder(tmp_path):
    write_features(tmp_path / "clips-000.safetensors", FEATURES, T5, CAPTIONS)
    write_features(tmp_path / UNCONDITIONAL, {"": EMPTY}, T5, {"": ""})
    return tmp_path


def test_features_come_back_by_shard_and_key(folder):
    prompts = [prompt_for("data/clips-000.tar", key) for key in ("b", "long/key é")]
    features, mask = PrecomputedText(folder)([*prompts, "", "clips-000/a"])
    assert mask.sum(dim=1).tolist() == [3, 5, 1, 2]
    wanted = (FEATURES["b"], FEATURES["long/key é"], EMPTY, FEATURES["a"])
    for row, valid, expected in zip(features, mask, wanted, strict=True):
        assert torch.equal(row[valid], expected)
        assert (row[~valid] == 0).all()


def test_it_is_a_text_encoder_that_load_text_encoder_finds(folder):
    encoder = load_text_encoder(folder, dtype=torch.bfloat16)
    assert (encoder.width, encoder.max_tokens, encoder.identity) == (4, 8, T5)
    assert encoder([""])[0].dtype == torch.bfloat16


def test_no_prompts_give_no_rows(folder):
    features, mask = PrecomputedText(folder)([])
    assert features.shape == (0, 0, 4)
    assert mask.shape == (0, 0)


@pytest.mark.parametrize("key", ["c", "B", "", "a ", "zzz"])
def test_a_sample_without_features_is_refused(folder, key):
    with pytest.raises(ValueError, match=r"clips-000.safetensors"):
        PrecomputedText(folder)([f"clips-000/{key}"])


def test_a_sample_whose_caption_was_another_is_refused(folder):
    encoder = PrecomputedText(folder)
    encoder.check_prompt("clips-000/long/key é", "a long/key é")
    with pytest.raises(ValueError, match=r"clips-000.safetensors have 'b' with another caption; run mdm precompute"):
        encoder.check_prompt("clips-000/b", "a c")


def test_features_that_do_not_tell_of_which_caption_they_are_are_taken(folder):
    path = folder / "clips-000.safetensors"
    with safe_open(path, "pt") as file:
        kept, metadata = {key: file.get_tensor(key) for key in ("features", "ends", "keys")}, file.metadata()
    save_file(kept, path, metadata)
    PrecomputedText(folder).check_prompt("clips-000/b", "a c")


def test_features_by_another_tokenizer_are_refused(folder):
    for tokenizer in ("", "one"):
        write_features(folder / "x.safetensors", FEATURES, dataclasses.replace(T5, tokenizer=tokenizer), CAPTIONS)
        PrecomputedText(folder, encoder=dataclasses.replace(T5, tokenizer="one"))(["x/a"])
    with pytest.raises(ValueError, match=r"weights abc, tokenizer one.*, not of .*tokenizer two"):
        PrecomputedText(folder, encoder=dataclasses.replace(T5, tokenizer="two"))(["x/a"])


def test_a_shard_without_features_is_refused(folder):
    with pytest.raises(ValueError, match=r"clips-001.safetensors are missing; run"):
        PrecomputedText(folder)(["clips-001/a"])


def test_a_folder_without_features_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unconditional.safetensors are missing"):
        PrecomputedText(tmp_path)


@pytest.mark.parametrize("field", [{"width": 5}, {"max_tokens": 9}, {"weights": "abd"}])
def test_features_of_another_encoder_are_refused(folder, field):
    with pytest.raises(ValueError, match="not of t5"):
        PrecomputedText(folder, encoder=dataclasses.replace(T5, **field))


def test_a_folder_of_two_encoders_is_refused(folder):
    other = dataclasses.replace(T5, weights="abd")
    write_features(folder / "clips-001.safetensors", FEATURES, other, CAPTIONS)
    with pytest.raises(ValueError, match=r"clips-001.safetensors are of t5 .* abd"):
        PrecomputedText(folder)(["clips-000/a", "clips-001/a"])


def test_the_same_encoder_from_another_folder_is_welcome(folder):
    PrecomputedText(folder, encoder=dataclasses.replace(T5, name="/elsewhere/t5"))


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None])
def test_damaged_files_are_refused_in_one_line(folder, content):
    path = folder / "clips-000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(ValueError, match="damaged") as caught:
        PrecomputedText(folder)(["clips-000/a"])
    assert "\n" not in str(caught.value)


def test_it_reaches_worker_processes_without_its_features(folder):
    text = PrecomputedText(folder)
    before = text(["clips-000/b"])
    copy = pickle.dumps(text)
    assert len(copy) < 1000
    torch.testing.assert_close(pickle.loads(copy)(["clips-000/b"]), before)


def test_a_shard_may_have_no_features_at_all(tmp_path):
    write_features(tmp_path / "clips-000.safetensors", {}, T5, {})
    write_features(tmp_path / UNCONDITIONAL, {"": EMPTY}, T5, {"": ""})
    with pytest.raises(ValueError, match="no sample 'a'"):
        PrecomputedText(tmp_path)(["clips-000/a"])
