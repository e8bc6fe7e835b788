"""A text encoder that is trained along with the model."""

import functools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mdm_models.layers import TextSelfAttention
from mdm_models.storage import write_whole
from mdm_models.text.frozen import loading
from mdm_models.text.interface import check_prompts
from mdm_models.text.tokens import up_to_end

CONFIG, WEIGHTS = "mdm_text_encoder.json", "model.safetensors"


@functools.cache
def _tokenizer():
    from open_clip.tokenizer import SimpleTokenizer  # seconds to import

    return SimpleTokenizer()


class TransformerTextEncoder(nn.Module):
    """A small transformer over open_clip's byte-pair tokens, trained along with the model. Works offline.

    A `TextEncoder`, except that every prompt has max_tokens tokens; forward also takes the tokens (B, S) int64 that
    `tokenize` makes of the prompts, which is what data parallelism can hand to a replica.
    """

    def __init__(self, width: int, layers: int = 4, num_heads: int = 8, max_tokens: int = 32):
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
        self.embedding = nn.Embedding(_tokenizer().vocab_size, width)
        self.positions = nn.Parameter(torch.empty(max_tokens, width))
        self.layers = nn.ModuleList(TextSelfAttention(width, num_heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """(B,) prompts → (B, max_tokens) int64: start, text, end, zeros. Long prompts are cut before the end."""
        check_prompts(prompts)
        if not prompts:
            return torch.zeros(0, self.max_tokens, dtype=torch.int64)
        return _tokenizer()(list(prompts), self.max_tokens)

    def forward(self, prompts: list[str] | Tensor) -> tuple[Tensor, Tensor]:
        tokens = prompts if isinstance(prompts, Tensor) else self.tokenize(prompts).to(self.positions.device)
        mask = self.mask(tokens)
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x).masked_fill(~mask[..., None], 0), mask

    def mask(self, tokens: Tensor) -> Tensor:
        """(B, S) bool, True up to the end token; padding has the number of "!", so it cannot be told by value."""
        return up_to_end(tokens, self.end_token)

    def save(self, directory: Path) -> None:
        """Write the encoder for `load`."""
        directory.mkdir(parents=True, exist_ok=True)
        heads = self.layers[0].num_heads
        sizes = {"width": self.width, "layers": len(self.layers), "num_heads": heads, "max_tokens": self.max_tokens}
        weights = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        write_whole(directory / WEIGHTS, lambda path: save_file(weights, path))
        write_whole(directory / CONFIG, lambda path: path.write_text(json.dumps(sizes, indent=1) + "\n"))

    @classmethod
    def load(cls, directory: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        """What `save` wrote, no longer trained. Raises ValueError in one line that names the directory."""
        directory = Path(directory)
        with loading(f"text encoder {directory}", "save the pipeline again"):
            encoder = cls(**json.loads((directory / CONFIG).read_text()))
            encoder.load_state_dict(load_file(directory / WEIGHTS))
        return encoder.requires_grad_(False).to(device=device, dtype=dtype)
