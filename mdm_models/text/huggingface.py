"""Encoders of Hugging Face transformers: T5 (the official models read flan-t5-xl), BERT, CLIP and others."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdm_models.text.frozen import OFFLINE, FrozenTextEncoder, loading


class HuggingFaceTextEncoder(FrozenTextEncoder):
    """The last hidden states of a transformers encoder.

    Longer prompts than max_tokens lose their end but not their end token. T5 and BERT add such tokens of their own to
    "", too; a tokenizer that adds none is given its start or end token in place of an empty text.
    """

    def __init__(self, name: str, network: nn.Module, tokenizer, max_tokens: int = 128):
        least = tokenizer.num_special_tokens_to_add() + 1
        config: Any = network.config
        positions = getattr(config, "max_position_embeddings", max_tokens)  # T5 has none
        longest = min(max_tokens, tokenizer.model_max_length, positions)
        if longest < least:
            raise ValueError(f"max_tokens is {max_tokens}; {name} needs at least {least}, with its special tokens")
        super().__init__(name, network, width=config.hidden_size, max_tokens=longest)
        self.tokenizer = tokenizer
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.empty = "" if least > 1 else tokenizer.bos_token or tokenizer.eos_token

    @classmethod
    def load(
        cls, path_or_id: str, max_tokens: int, dtype: torch.dtype, device: str | torch.device
    ) -> "HuggingFaceTextEncoder":
        """Load an encoder from a directory, without network, or from the hub by its id. Raises ValueError in one
        line."""
        is_folder = os.path.isdir(path_or_id)
        source = {"local_files_only": is_folder, "trust_remote_code": False}
        remedy = "copy the directory anew, or write it by save_pretrained" if is_folder else OFFLINE
        with loading(f"tokenizer of the text encoder {path_or_id}", remedy):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(path_or_id, **source)
            if is_folder:
                _check_vocabulary(Path(path_or_id), tokenizer)
        with loading(f"text encoder {path_or_id}", remedy), _quietly():
            network = _network(path_or_id, dtype, source)
        return cls(path_or_id, network.to(device), tokenizer, max_tokens)

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        texts = [prompt or self.empty for prompt in prompts]
        options = {"return_attention_mask": True, "verbose": False}
        encoded = self.tokenizer(
            texts, max_length=self.max_tokens, truncation=True, padding=True, return_tensors="pt", **options
        )
        mask = encoded["attention_mask"].bool()
        for text, length in zip(texts, mask.sum(dim=1).tolist(), strict=True):
            if length == self.max_tokens and len(self.tokenizer(text, **options)["input_ids"]) > length:
                self.warn_truncated(text)
        return encoded["input_ids"], mask

    def features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.network(input_ids=tokens, attention_mask=mask).last_hidden_state


def _network(path_or_id: str, dtype: torch.dtype, source: dict) -> nn.Module:
    """The part of the saved model that reads text, with every one of its weights. Pickles are read as tensors only."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel, AutoModelForTextEncoding

    config = AutoConfig.from_pretrained(path_or_id, **source)
    knows_text_part = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    network, found = (AutoModelForTextEncoding if knows_text_part else AutoModel).from_pretrained(
        path_or_id, dtype=dtype, weights_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **source
    )
    if found["mismatched_keys"]:
        key, saved, wanted = min(found["mismatched_keys"])
        raise ValueError(f"{key} has shape {tuple(saved)} in the weights, {tuple(wanted)} by config.json")
    missing = sorted(key for key in found["missing_keys"] if "pooler." not in key)  # what comes after the features
    if missing:
        raise ValueError(f"the weights lack {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    if config.is_encoder_decoder and not knows_text_part:
        return network.get_encoder()
    return getattr(network, "text_model", network)


def _check_vocabulary(folder: Path, tokenizer) -> None:
    """transformers makes a tokenizer that knows no words of a directory that holds none."""
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((folder / name).is_file() for name in names):
        raise ValueError(f"the directory has none of {', '.join(sorted(names))}")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the report that transformers logs on weights: what matters of it is raised in one line."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
