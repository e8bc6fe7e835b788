import subprocess
import sys

import pytest
import torch

from mdm_models.text import TransformerTextEncoder


@pytest.fixture(scope="module")
def encoder() -> TransformerTextEncoder:
    torch.manual_seed(0)
    encoder = TransformerTextEncoder(width=32, layers=2, num_heads=4, max_tokens=8)
    with torch.no_grad():
        for layer in encoder.layers:  # they start as the identity
            layer.proj.weight.normal_(std=0.2)
            layer.mlp.fc2.weight.normal_(std=0.2)
    return encoder.eval()


def test_features_have_the_width_and_a_mask(encoder):
    features, mask = encoder(encoder.tokenize(["a cat", "a dog"]))
    assert features.shape == (2, 8, 32)
    assert mask.shape == (2, 8)
    assert mask.dtype == torch.bool


def test_prompts_give_what_their_tokens_give(encoder):
    torch.testing.assert_close(encoder(["a cat", ""]), encoder(encoder.tokenize(["a cat", ""])))


def test_features_are_zero_at_padding(encoder):
    features, mask = encoder(["a cat"])
    assert (features[~mask] == 0).all()
    assert (features[mask] != 0).any(dim=-1).all()


def test_the_empty_caption_has_a_start_and_an_end(encoder):
    assert encoder.mask(encoder.tokenize([""])).sum() == 2


def test_an_exclamation_mark_is_text_though_its_number_is_that_of_padding(encoder):
    tokens = encoder.tokenize(["!^"])
    assert tokens[0, 1] == 0
    assert encoder.mask(tokens).tolist() == [[True] * 4 + [False] * 4]


def test_padding_changes_no_feature(encoder):
    tokens = encoder.tokenize(["a cat"])
    features, mask = encoder(tokens)
    other, _ = encoder(torch.where(mask, tokens, 1234))
    torch.testing.assert_close(features[mask], other[mask])


def test_every_token_changes_the_others_features(encoder):
    features, _ = encoder(encoder.tokenize(["red cat", "red dog"]))
    assert (features[0, 1] - features[1, 1]).abs().max() > 1e-3


def test_a_long_caption_keeps_its_end(encoder):
    tokens = encoder.tokenize(["word " * 50])
    assert tokens.shape == (1, 8)
    assert tokens[0, -1] == encoder.end_token
    assert encoder.mask(tokens).all()


def test_no_captions_give_no_rows(encoder):
    features, mask = encoder(encoder.tokenize([]))
    assert features.shape == (0, 8, 32)
    assert mask.shape == (0, 8)


@pytest.mark.parametrize("captions", ["a cat", [None], [b"a cat"]])
def test_captions_that_are_no_list_of_strings_are_refused(encoder, captions):
    with pytest.raises(TypeError, match="prompts"):
        encoder.tokenize(captions)


@pytest.mark.parametrize(
    ("options", "name"), [({"width": 30}, "width"), ({"width": 32, "max_tokens": 2}, "max_tokens")]
)
def test_impossible_sizes_are_refused(options, name):
    with pytest.raises(ValueError, match=name):
        TransformerTextEncoder(layers=1, num_heads=4, **options)


def test_a_pruned_encoder_reads_the_captions_that_it_was_pruned_to_as_before(encoder):
    captions = ["a red cat", "a blue dog!"]
    pruned = encoder.pruned(captions)
    assert pruned.embedding.weight.shape == (9 + 1, 32)  # a, red, cat, blue, dog, !, start, end, padding; the others
    torch.testing.assert_close(pruned([*captions, "cat", ""]), encoder([*captions, "cat", ""]))


def test_words_that_a_pruned_encoder_does_not_know_are_one_word_to_it(encoder):
    pruned = encoder.pruned(["a cat"])
    torch.testing.assert_close(pruned(["a dog"]), pruned(["a house"]))
    assert not torch.equal(pruned(["a dog"])[0], pruned(["a cat"])[0])


def test_a_pruned_encoder_is_saved_with_its_vocabulary(encoder, tmp_path):
    pruned = encoder.pruned(["a cat"])
    pruned.save(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 200_000
    torch.testing.assert_close(TransformerTextEncoder.load(tmp_path)(["a cat", "a dog"]), pruned(["a cat", "a dog"]))


def test_an_encoder_takes_over_what_a_pruned_one_knows_and_keeps_the_rest(encoder):
    torch.manual_seed(1)
    other = TransformerTextEncoder(width=32, layers=2, num_heads=4, max_tokens=8)
    before = other.embedding.weight.clone()
    other.take_over(encoder.pruned(["a cat"]))
    torch.testing.assert_close(other(["a cat"]), encoder(["a cat"]))
    assert (other.embedding.weight != before).any(dim=1).sum() == 5  # a, cat, start, end, padding


def test_encoders_of_other_sizes_are_not_taken_over(encoder):
    with pytest.raises(ValueError, match=r"'layers': 2.*'layers': 1"):
        TransformerTextEncoder(width=32, layers=1, num_heads=4, max_tokens=8).take_over(encoder)


def test_the_tokenizer_comes_without_the_rest_of_open_clip():
    code = "import sys; from mdm_models.text import TransformerTextEncoder; TransformerTextEncoder(16, 1, 2)(['a cat'])"
    code += "; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"open_clip", "transformers", "torchvision", "timm"} & set(modules)


def test_the_tokenizer_is_open_clips_own():
    from open_clip.tokenizer import SimpleTokenizer

    captions = ["a red apple, 3d style", "T-Rex’s 2nd “café”", "  "]
    encoder = TransformerTextEncoder(16, 1, 2, max_tokens=16)
    assert encoder.tokenize(captions).equal(SimpleTokenizer()(captions, 16))
