"""A text encoder that is trained along with the model."""

import contextlib
import functools
import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mdm_models.layers import TextSelfAttention, module_list
from mdm_models.storage import check_local, write_whole
from mdm_models.text.frozen import loading
from mdm_models.text.interface import check_prompts, up_to_end

CONFIG, WEIGHTS = "mdm_text_encoder.json", "model.safetensors"


@functools.cache
def _tokenizer():
    return _tokenizer_module().SimpleTokenizer()


@functools.lru_cache(maxsize=1 << 16)
def _tokens(prompt: str, count: int) -> Tensor:
    """(count,) int64. Kept, as a run meets its captions again each epoch: byte pairs of 256 of them take longer than a
    GPU's step."""
    return _tokenizer()([prompt], count)[0]


def _tokenizer_module() -> ModuleType:
    """open_clip/tokenizer.py without its package, which imports transformers, torchvision and timm: seconds."""
    name = "open_clip.tokenizer"
    found = importlib.util.find_spec("open_clip")
    paths = [Path(folder) / "tokenizer.py" for folder in (found and found.submodule_search_locations) or ()]
    if name not in sys.modules and paths and paths[0].is_file():
        spec = importlib.util.spec_from_file_location("open_clip_tokenizer_alone", paths[0])
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            with contextlib.suppress(ImportError):  # a version whose tokenizer imports its neighbours
                spec.loader.exec_module(module)
                return module
    return importlib.import_module(name)


class TransformerTextEncoder(nn.Module):
    """A small transformer over open_clip's byte-pair tokens, trained along with the model. Works offline.

    A `TextEncoder`, except that every prompt has max_tokens tokens; forward also takes the tokens (B, S) int64 that
    `tokenize` makes of the prompts, which is what data parallelism can hand to a replica.

    vocabulary: the tokens that have an embedding, in rising order, if not all have; the others share one.
    """

    def __init__(
        self,
        width: int,
        layers: int = 4,
        num_heads: int = 8,
        max_tokens: int = 32,
        vocabulary: Sequence[int] | None = None,
    ):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width is {width}; it must be a multiple of num_heads {num_heads}")
        if layers < 1:
            raise ValueError(f"layers is {layers}; it must be at least 1")
        if max_tokens < 3:
            raise ValueError(f"max_tokens is {max_tokens}; a prompt needs at least 3 with its start and end")
        self.width = width
        self.max_tokens = max_tokens
        self.end_token = _tokenizer().eot_token_id
        self.vocabulary = None if vocabulary is None else list(vocabulary)
        tokens = _tokenizer().vocab_size
        self.embedding = nn.Embedding(tokens if vocabulary is None else len(vocabulary) + 1, width)
        self.register_buffer("row_of_token", None, persistent=False)
        if vocabulary is not None:
            self.row_of_token = torch.full((tokens,), len(vocabulary))
            self.row_of_token[self.vocabulary] = torch.arange(len(vocabulary))
        self.positions = nn.Parameter(torch.empty(max_tokens, width))
        self.layers = module_list(TextSelfAttention(width, num_heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Turn B prompts into tokens (B, max_tokens) int64: start, text, end, zeros. Long prompts are cut before the
        end."""
        check_prompts(prompts)
        if not prompts:
            return torch.zeros(0, self.max_tokens, dtype=torch.int64)
        return torch.stack([_tokens(prompt, self.max_tokens) for prompt in prompts])

    def forward(self, prompts: list[str] | Tensor) -> tuple[Tensor, Tensor]:
        tokens = prompts if isinstance(prompts, Tensor) else self.tokenize(prompts).to(self.positions.device)
        mask = self.mask(tokens)
        x = self.embedding(self._rows(tokens)) + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x).masked_fill(~mask[..., None], 0), mask

    def _rows(self, tokens: Tensor) -> Tensor:
        """Where the embeddings of these tokens are."""
        return tokens if self.row_of_token is None else self.row_of_token[tokens]

    def mask(self, tokens: Tensor) -> Tensor:
        """Mark the tokens (B, S) up to the end token: (B, S) bool; padding has the number of "!", so it cannot be told
        by value."""
        return up_to_end(tokens, self.end_token)

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments with which an encoder of the same sizes is made."""
        heads = self.layers[0].num_heads
        return {"width": self.width, "layers": len(self.layers), "num_heads": heads, "max_tokens": self.max_tokens}

    @torch.no_grad()
    def pruned(self, captions: Iterable[str]) -> "TransformerTextEncoder":
        """Make a copy that knows the tokens of these captions alone, which it reads as this one does. All other tokens
        have an embedding of 0: what training never saw says nothing."""
        known = torch.cat([self.tokenize([caption]) for caption in {"", *captions}]).unique()
        copy = TransformerTextEncoder(**self.sizes, vocabulary=known.tolist()).to(self.positions)
        embeddings = self.embedding.weight[self._rows(known.to(self.positions.device))]
        weight = torch.cat([embeddings, torch.zeros_like(embeddings[:1])])
        copy.load_state_dict(self.state_dict() | {"embedding.weight": weight})
        return copy

    @torch.no_grad()
    def take_over(self, other: "TransformerTextEncoder") -> None:
        """Take the weights of an encoder of the same sizes, its embeddings of the tokens that both know. Raises
        ValueError if the sizes differ."""
        if other.sizes != self.sizes:
            raise ValueError(f"its text encoder has the sizes {other.sizes}, this one {self.sizes}")
        tokens = torch.arange(_tokenizer().vocab_size, device=self.positions.device)
        both = tokens[self._knows(tokens) & other._knows(tokens)]
        weight = self.embedding.weight.clone()
        weight[self._rows(both)] = other.embedding.weight[other._rows(both)].to(weight)
        self.load_state_dict(other.state_dict() | {"embedding.weight": weight})

    def _knows(self, tokens: Tensor) -> Tensor:
        return self._rows(tokens) < (_tokenizer().vocab_size if self.vocabulary is None else len(self.vocabulary))

    def save(self, directory: Path) -> None:
        """Write the encoder to a directory, for `load`. Raises ValueError for a URL."""
        check_local(directory)
        directory.mkdir(parents=True, exist_ok=True)
        sizes = self.sizes if self.vocabulary is None else self.sizes | {"vocabulary": self.vocabulary}
        weights = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        write_whole(directory / WEIGHTS, lambda path: save_file(weights, path))
        write_whole(directory / CONFIG, lambda path: path.write_text(json.dumps(sizes) + "\n"))

    @classmethod
    def load(cls, directory: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
        """Load what `save` wrote, no longer to be trained. Raises ValueError in one line that names the directory."""
        directory = Path(directory)
        with loading(f"text encoder {directory}", "save the pipeline again"):
            encoder = cls(**json.loads((directory / CONFIG).read_text()))
            encoder.load_state_dict(load_file(directory / WEIGHTS))
        return encoder.requires_grad_(False).to(device=device, dtype=dtype)
