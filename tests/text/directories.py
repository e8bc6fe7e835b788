"""Small text encoders with random weights, saved as the large ones are."""

import json
from pathlib import Path

import open_clip
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

WORDS = ("a", "red", "blue", "penguin", "fox", "on", "ice")


def save_tokenizer(folder: Path, ends: bool = True) -> None:
    """Splits at spaces; <pad> is 0 and </s>, at the end of every text if `ends`, is 1."""
    vocabulary = {token: number for number, token in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def save_huggingface(folder: Path, model: PreTrainedModel, ends: bool = True) -> Path:
    model.eval().save_pretrained(folder)
    save_tokenizer(folder, ends)
    return folder


def t5() -> T5ForConditionalGeneration:
    """Encoder and decoder, like the published flan-t5-xl."""
    sizes = {"vocab_size": 16, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.5)
    return T5ForConditionalGeneration(config).eval()


def save_open_clip(folder: Path, **text) -> open_clip.CLIP:
    """A CLIP whose text tower is 32 wide and takes 12 tokens; `text` replaces fields of its config."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 8, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2} | text,
    }
    model = open_clip.CLIP(**config).eval()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


class MakesFile:
    """A pickle that makes a file where it is run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
