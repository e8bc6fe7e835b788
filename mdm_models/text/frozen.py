"""What the encoders that come with weights of their own share: they are never trained, and loading one can fail."""

import contextlib
import hashlib
import pickle
import textwrap
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mdm_models.text.interface import EncoderIdentity, check_prompts

PROBED = 16  # leading values of each parameter that make the digest: reading all of flan-t5-xl would take seconds
PROBE = "A quick brown fox jumps over 0123456789 lazy dogs: naïve, 日本語, emoji!"

OFFLINE = "without a network, download it elsewhere and give its directory"


class FrozenTextEncoder(nn.Module):
    """A pretrained network that turns prompts into token features: always in evaluation mode, never with gradients.

    A subclass says how prompts become tokens and tokens become features. See `TextEncoder` for what a call returns;
    features have the dtype and the device of the network, and .to() moves it like any module.
    """

    def __init__(self, name: str, network: nn.Module, width: int, max_tokens: int):
        super().__init__()
        self.name = name
        self.network = network.requires_grad_(False)
        self.width = width
        self.max_tokens = max_tokens
        self._warned = False
        self.eval()

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Turn at least one prompt into tokens (B, S) int64 and mask (B, S) bool: at most max_tokens of a row are True,
        all of them on its left."""
        raise NotImplementedError

    def features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Turn tokens (B, S) and their mask (B, S) into features (B, S, width)."""
        raise NotImplementedError

    def forward(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        check_prompts(prompts)
        parameter = next(self.network.parameters())
        if not prompts:
            return parameter.new_zeros(0, 0, self.width), parameter.new_zeros(0, 0, dtype=torch.bool)
        tokens, mask = self.tokenize(prompts)
        longest = int(mask.sum(dim=1).max())  # while it is on the CPU: a look at a GPU's memory waits for the GPU
        tokens, mask = (tensor.to(parameter.device, non_blocking=True) for tensor in (tokens, mask))
        with torch.no_grad():
            features = self.features(tokens, mask)
        features, mask = features[:, :longest], mask[:, :longest]
        return features.masked_fill(~mask[..., None], 0), mask

    def train(self, mode: bool = True) -> "FrozenTextEncoder":
        """Stay in evaluation mode, whatever the model that holds the encoder does."""
        return super().train(False)

    @property
    def identity(self) -> EncoderIdentity:
        """What tells this encoder from others: its sizes, and a digest of the names, shapes and first numbers of its
        weights, and another of the tokens that it makes of a text."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self.network.named_parameters()):
            digest.update(f"{name} {tuple(parameter.shape)} ".encode())
            probe = parameter.detach().flatten()[:PROBED].to("cpu", torch.bfloat16)
            digest.update(probe.view(torch.int16).numpy().tobytes())
        read = hashlib.sha256(str([tokens.tolist() for tokens in self.tokenize([PROBE])]).encode())
        return EncoderIdentity(self.name, self.width, self.max_tokens, digest.hexdigest()[:16], read.hexdigest()[:16])

    def warn_truncated(self, prompt: str) -> None:
        """Warn that a prompt was cut, the first time that one is."""
        if self._warned:
            return
        self._warned = True
        start = prompt if len(prompt) <= 60 else prompt[:60] + "…"
        warnings.warn(
            f"the prompt {start!r} is longer than the {self.max_tokens} tokens of {self.name} and was cut; "
            "further long prompts will be cut without a warning",
            stacklevel=2,
        )


@contextlib.contextmanager
def loading(what: str, remedy: str) -> Iterator[None]:
    """Turn what libraries raise for missing, damaged or hostile files into a ValueError of one line."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{what}: {_first_line(error)}; pip install the package that it names") from error
    except pickle.UnpicklingError as error:
        reason = "pickled weights hold more than tensors and were not run; get weights in safetensors format"
        raise ValueError(f"{what}: {reason}") from error
    except Exception as error:  # the libraries raise anything: SafetensorError, OSError, JSONDecodeError...
        raise ValueError(f"{what}: {_first_line(error)}; {remedy}") from error


def _first_line(error: Exception) -> str:
    """The first line of a message, and the second where the first only announces it."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return textwrap.shorten(said, 200, placeholder="…").rstrip(".,:;")
