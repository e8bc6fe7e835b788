"""Text features on disk: encoded once, read by key ever after, without the encoder.

A folder holds, for every shard of the data set, SHARD.safetensors with

    features  (tokens, width) bfloat16   the features of all samples, one after the other, without padding
    ends      (samples,) int64           where in `features` each sample ends
    keys      (samples, length) uint8    their keys in UTF-8, padded by zeros, in byte order
    captions  (samples, 8) uint8         a digest of each one's caption, which earlier versions did not keep

and in the metadata the encoder's identity and a digest of all captions. unconditional.safetensors has the same form and
the one key "".
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mdm_models.storage import write_whole
from mdm_models.text.interface import EncoderIdentity, check_prompts

UNCONDITIONAL = "unconditional.safetensors"
METADATA = "text_features"


class FeatureFile:
    """One file of features, mapped into memory: nothing is read but what is asked for.

    Raises ValueError in one line if it is missing, damaged, or none of ours.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                made_of = json.loads(file.metadata()[METADATA])
                self.features, self.ends = file.get_tensor("features"), file.get_tensor("ends")
                keys = file.get_tensor("keys").numpy()
                self._captions = file.get_tensor("captions").numpy() if "captions" in set(file.keys()) else None
            self.identity = EncoderIdentity(**made_of["encoder"])
            self.captions = made_of["captions"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
            raise ValueError(f"text features {path} are {reason}; run mdm precompute again") from None
        self.keys = np.ascontiguousarray(keys).view(f"S{keys.shape[1]}")[:, 0]

    def __getitem__(self, key: str) -> Tensor:
        """(tokens, width) bfloat16 of the sample `key`. Raises KeyError."""
        row = self._row(key)
        start = int(self.ends[row - 1]) if row else 0
        return self.features[start : int(self.ends[row])]

    def is_of(self, key: str, caption: str) -> bool:
        """Whether the features of the sample `key` are of this caption, as far as the file tells. Raises KeyError."""
        row = self._row(key)
        return self._captions is None or self._captions[row].tobytes() == _digest(caption)

    def _row(self, key: str) -> int:
        name = key.encode()
        row = int(np.searchsorted(self.keys, name))
        if row == len(self.keys) or self.keys[row] != name:
            raise KeyError(key)
        return row


def digest_of(captions: Mapping[str, str]) -> str:
    """A digest of all captions of a shard by key, to be compared with `FeatureFile.captions`."""
    return hashlib.sha256(json.dumps(captions, sort_keys=True).encode()).hexdigest()


def _digest(caption: str) -> bytes:
    return hashlib.blake2b(caption.encode(), digest_size=8).digest()


def write_features(
    path: Path, features: Mapping[str, Tensor], identity: EncoderIdentity, captions: Mapping[str, str]
) -> None:
    """Write key → features (tokens, width) of key → caption; the file is there whole or not at all."""
    order = sorted(features, key=str.encode)
    longest = max([1, *(len(key.encode()) for key in order)])
    keys = np.array([key.encode() for key in order], dtype=f"S{longest}")
    nothing = torch.zeros(0, identity.width, dtype=torch.bfloat16)  # gives a shard without captions its width
    tensors = {
        "features": torch.cat([nothing, *(features[key].bfloat16() for key in order)]),
        "ends": torch.tensor([len(features[key]) for key in order]).cumsum(dim=0),
        "keys": torch.from_numpy(keys.view(np.uint8).reshape(len(order), longest)),
        "captions": torch.tensor([list(_digest(captions[key])) for key in order], dtype=torch.uint8).view(-1, 8),
    }
    made_of = {"encoder": dataclasses.asdict(identity), "captions": digest_of(captions)}
    write_whole(path, lambda partial: save_file(tensors, partial, {METADATA: json.dumps(made_of)}))


def file_of(shard: str | Path) -> str:
    """Name the file that holds the features of a shard: clips-000.tar → clips-000.safetensors."""
    return f"{Path(shard).stem}.safetensors"


def prompt_for(shard: str | Path, key: str) -> str:
    """Give the name by which `PrecomputedText` knows a sample: clips-000.tar and a17 → "clips-000/a17"."""
    return f"{Path(shard).stem}/{key}"


class PrecomputedText:
    """A `TextEncoder` whose prompts are the names that `prompt_for` gives to samples, and "" for the empty prompt that
    guidance and dropped captions need.

    encoder: whose features they must be, by default whatever the folder holds; all of it must be of one encoder.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        encoder: EncoderIdentity | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        self.folder = Path(folder)
        self.dtype = dtype
        self.device = device
        self._files: dict[str, FeatureFile] = {}
        self.identity = encoder or FeatureFile(self.folder / UNCONDITIONAL).identity
        self._file(UNCONDITIONAL)
        self.width = self.identity.width
        self.max_tokens = self.identity.max_tokens

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Give the features (B, L, width) and mask (B, L) of B samples. Raises ValueError for one that has no features
        or features of another encoder."""
        check_prompts(prompts)
        if not prompts:
            empty = torch.zeros(0, 0, self.width, dtype=self.dtype, device=self.device)
            return empty, empty.new_zeros(0, 0, dtype=torch.bool)
        rows = [self._features(prompt) for prompt in prompts]
        mask = torch.arange(max(map(len, rows))) < torch.tensor([len(row) for row in rows])[:, None]
        features = pad_sequence(rows, batch_first=True)
        if torch.device(self.device).type == "cuda":
            features = features.pin_memory()  # so many bytes would otherwise wait for what the GPU is doing
        features, mask = (tensor.to(self.device, non_blocking=True) for tensor in (features, mask))
        return features.to(self.dtype), mask

    def check_prompt(self, prompt: str, caption: str) -> None:
        """Raises ValueError for a sample that has no features, or features of another encoder or caption."""
        self._features(prompt)
        file, key = self._place(prompt)
        if not file.is_of(key, caption):
            raise ValueError(f"text features {file.path} have {key!r} with another caption; run mdm precompute again")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}  # a worker process maps the files anew: pickling would copy them

    def _features(self, prompt: str) -> Tensor:
        file, key = self._place(prompt)
        try:
            return file[key]
        except KeyError:
            raise ValueError(f"text features {file.path} have no sample {key!r}; was its caption unusable?") from None

    def _place(self, prompt: str) -> tuple[FeatureFile, str]:
        shard, _, key = prompt.partition("/")
        return self._file(f"{shard}.safetensors" if prompt else UNCONDITIONAL), key

    def _file(self, name: str) -> FeatureFile:
        if name not in self._files:
            file = FeatureFile(self.folder / name)
            if not file.identity.fits(self.identity):
                raise ValueError(f"text features {file.path} are of {file.identity}, not of {self.identity}")
            self._files[name] = file
        return self._files[name]
