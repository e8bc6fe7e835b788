import json
import os
import socket
import warnings

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from mdm_models.text import load_text_encoder
from tests.text.directories import MakesFile, save_open_clip, save_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny CLIP and the directory that it is saved in."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    model = save_open_clip(folder)
    return model, folder


def hidden_states(model: open_clip.CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """What `CLIP.encode_text` pools: every token after the final LayerNorm."""
    x = model.token_embedding(tokens) + model.positional_embedding
    return model.ln_final(model.transformer(x, attn_mask=model.attn_mask)).detach()


def test_features_are_the_towers_tokens_before_pooling(saved):
    model, folder = saved
    encoder = load_text_encoder(folder)
    features, mask = encoder(["a red fox", "a fox"])
    tokens = open_clip.SimpleTokenizer()(["a red fox", "a fox"], 12)
    assert mask.tolist() == [[True] * 5, [True] * 4 + [False]]
    torch.testing.assert_close(features, hidden_states(model, tokens)[:, :5] * mask[..., None])
    assert (encoder.width, encoder.max_tokens) == (32, 12)


def test_the_directory_is_loaded_without_network(saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    features, _ = load_text_encoder(saved[1])(["a fox"])
    assert features.isfinite().all()


def test_the_empty_prompt_has_a_start_and_an_end(saved):
    features, mask = load_text_encoder(saved[1])([""])
    assert mask.tolist() == [[True, True]]
    assert features.shape == (1, 2, 32)


def test_an_exclamation_mark_is_text_though_its_number_is_that_of_padding(saved):
    _, mask = load_text_encoder(saved[1])(["! fox"])
    assert mask.tolist() == [[True] * 4]


def test_fewer_tokens_than_the_tower_takes_cut_prompts_before_their_end_with_one_warning(saved):
    model, folder = saved
    encoder = load_text_encoder(folder, max_tokens=4)
    with pytest.warns(UserWarning, match="longer than the 4 tokens") as caught:
        features, mask = encoder(["a red fox on ice", "a blue fox on ice"])
    assert len(caught) == 1
    assert mask.all()
    tokens = open_clip.SimpleTokenizer()(["a red", "a blue"], 12)
    torch.testing.assert_close(features, hidden_states(model, tokens)[:, :4])


def test_a_prompt_that_just_fits_is_not_warned_about(saved):
    encoder = load_text_encoder(saved[1], max_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["a fox"])


def test_weights_and_features_have_the_wanted_dtype(saved):
    features, _ = load_text_encoder(saved[1], dtype=torch.bfloat16)(["a fox"])
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features.float(), load_text_encoder(saved[1])(["a fox"])[0], rtol=0.05, atol=0.1)


def test_a_hugging_face_tokenizer_inside_the_directory_is_used(tmp_path):
    model = save_open_clip(tmp_path, hf_tokenizer_name="some/tokenizer", no_causal_mask=True, pool_type="last")
    save_tokenizer(tmp_path)
    features, mask = load_text_encoder(tmp_path, max_tokens=5)(["a red fox", "fox"])
    assert mask.sum(dim=1).tolist() == [4, 2]
    tokens = torch.tensor([[3, 4, 7, 1] + [0] * 8])
    torch.testing.assert_close(features[:1], hidden_states(model, tokens)[:, :4])  # padding is seen, as in training


def test_the_final_norm_is_applied_in_towers_that_pool_before_it(tmp_path):
    save_open_clip(tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["embed_cls"] = True  # a token after the text gathers it, as in CoCa
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.CustomTextCLIP(**config["model_cfg"])
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    features, _ = load_text_encoder(tmp_path)(["a fox"])
    assert features.shape == (1, 4, 32)
    torch.testing.assert_close(features.mean(dim=-1), torch.zeros(1, 4), atol=1e-5, rtol=0)  # ln_final starts as (1, 0)
    torch.testing.assert_close(features.std(dim=-1, correction=0), torch.ones(1, 4), atol=1e-3, rtol=0)


def remove_weights(folder):
    (folder / "open_clip_model.safetensors").unlink()


def truncate_weights(folder):
    os.truncate(folder / "open_clip_model.safetensors", 1000)


def deepen(folder):
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["layers"] = 3
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def borrow_a_tower(folder):
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] = {"hf_model_name": "some/bert"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def break_config(folder):
    (folder / "open_clip_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove_weights, "no weights"),
        (truncate_weights, "header"),
        (deepen, r"text.transformer.resblocks.2"),
        (borrow_a_tower, "some/bert of Hugging Face; load that"),
        (break_config, "model_cfg"),
    ],
)
def test_a_damaged_directory_is_refused_in_one_line(tmp_path, damage, reason):
    save_open_clip(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=reason) as caught:
        load_text_encoder(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_in_pickled_weights_is_not_run(tmp_path):
    save_open_clip(tmp_path)
    remove_weights(tmp_path)
    torch.save({"logit_scale": MakesFile(tmp_path / "ran")}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="more than tensors"):
        load_text_encoder(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_too_few_tokens_for_a_prompt_are_refused(saved):
    with pytest.raises(ValueError, match="max_tokens is 2"):
        load_text_encoder(saved[1], max_tokens=2)
