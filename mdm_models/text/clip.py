"""Text towers of open_clip."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm_models.text.frozen import OFFLINE, FrozenTextEncoder, loading
from mdm_models.text.interface import up_to_end

CONFIG = "open_clip_config.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.pth")
INCOMPLETE = f"copy the directory anew: {CONFIG} and the weights"


class OpenClipTextEncoder(FrozenTextEncoder):
    """The token features of an open_clip text tower before pooling and projection, its final LayerNorm applied.

    tower: an `open_clip.transformer.TextTransformer`; tokenizer: the one of `open_clip.get_tokenizer`. The tower always
    sees its whole context, padded as in its training.
    """

    def __init__(self, name: str, tower: nn.Module, tokenizer, max_tokens: int = 128):
        if max_tokens < 3:
            raise ValueError(f"max_tokens is {max_tokens}; {name} needs at least 3, with its start and end")
        sizes: Any = tower
        self.context_length: int = sizes.context_length
        super().__init__(name, tower, width=sizes.width, max_tokens=min(max_tokens, self.context_length))
        self.tokenizer = tokenizer
        words = getattr(tokenizer, "tokenizer", None)  # a transformers tokenizer inside, or open_clip's own
        self.end_token = words.eos_token_id if words else tokenizer.eot_token_id  # None: no token ends a text
        self.pad_token = words.pad_token_id if words else None  # None: cannot be told from text

    @classmethod
    def load(
        cls, path_or_id: str, max_tokens: int, dtype: torch.dtype, device: str | torch.device
    ) -> "OpenClipTextEncoder":
        """Load an encoder from a directory as open_clip saves it, without network, or from the hub by "hf-hub:" and its
        id.

        Raises ValueError in one line.
        """
        what = f"text encoder {path_or_id}"
        if os.path.isdir(path_or_id):
            with loading(what, INCOMPLETE):
                borrowed = _text_config(Path(path_or_id)).get("hf_model_name")
            if borrowed:
                raise ValueError(f"{what}: its text tower is {borrowed} of Hugging Face; load that from its directory")
        model: Any
        model, tokenizer = load_open_clip(path_or_id, what)
        return cls(path_or_id, model.text.to(device, dtype), tokenizer, max_tokens)

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(prompts, self.max_tokens)
        mask = self._mask(tokens)
        full = [prompt for prompt, row in zip(prompts, mask, strict=True) if row.all()]
        if full:
            longer = self._mask(self.tokenizer(full, self.max_tokens + 1))[:, -1]
            for prompt, was_cut in zip(full, longer.tolist(), strict=True):
                if was_cut:
                    self.warn_truncated(prompt)
        padding = (0, self.context_length - self.max_tokens)
        return F.pad(tokens, padding, value=self.pad_token or 0), F.pad(mask, padding, value=False)

    def _mask(self, tokens: Tensor) -> Tensor:
        if self.end_token is None:
            return tokens != self.pad_token
        mask = up_to_end(tokens, self.end_token)
        return mask if self.pad_token in (None, self.end_token) else mask & (tokens != self.pad_token)

    def features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        tower: Any = self.network
        last = tower.forward_intermediates(
            tokens, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
        )
        return last["text_intermediates"][0]


def load_open_clip(path_or_id: str, what: str) -> tuple[nn.Module, Callable]:
    """Load a whole open_clip model, on the CPU, and its tokenizer; errors call it `what`.

    path_or_id as for `OpenClipTextEncoder.load`. Raises ValueError in one line.
    """
    name, remedy = path_or_id, OFFLINE
    if os.path.isdir(path_or_id):
        name, remedy = f"local-dir:{path_or_id}", INCOMPLETE
        with loading(what, remedy):
            _text_config(Path(path_or_id))
    with loading(what, remedy):
        import open_clip

        model = open_clip.create_model(name, force_custom_text=True, require_pretrained=True, weights_only=True)
        return model, open_clip.get_tokenizer(name)


def _text_config(folder: Path) -> dict:
    """What the text tower is. Raises ValueError where there are no weights, which open_clip would draw at random."""
    if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise ValueError(f"there are no weights (none of {', '.join(WEIGHTS)})")
    return json.loads((folder / CONFIG).read_text())["model_cfg"]["text_cfg"]
