"""Reads the tensors in tests/golden, which the official code and the diffusers port computed, into our layout."""

import dataclasses
import json
import math
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from mdm_models import UNet, UNetConfig, build_model, official
from mdm_models.diffusers_port import state_dict_from_port

# tests/golden holds a subset that covers every rule; MDM_GOLDEN names a directory with more files of the same form.
DIRECTORY = Path(os.environ.get("MDM_GOLDEN", Path(__file__).parents[1] / "golden"))
MODELS = sorted(
    path.stem for path in DIRECTORY.glob("*.safetensors") if path.stem.startswith(("unet", "nested", "video", "port"))
)


def read(name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors by name) of one file."""
    with safe_open(DIRECTORY / f"{name}.safetensors", "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict


def relative_error(ours: Tensor, golden: Tensor) -> float:
    return ((ours - golden).norm() / golden.norm()).item()


def drawn_weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """float32 weights that follow from their names and shapes alone, so that files need not hold them.

    Of the size that layers of their width have; the gains of normalisations are about 1.
    """
    weights = {}
    for key, shape in shapes.items():
        raw = np.random.PCG64(zlib.crc32(key.encode())).random_raw(math.prod(shape))  # the same in every numpy
        uniform = torch.from_numpy((raw >> 11).astype(np.float64) * 2.0**-52 - 1).reshape(shape)  # in [−1, 1)
        if len(shape) > 1:
            weights[key] = (uniform * math.sqrt(3 / math.prod(shape[1:]))).float()
        else:
            weights[key] = (0.2 * uniform + key.endswith(".weight")).float()
    return weights


class GoldenModel:
    """A model of others on random weights: ours with those weights, its inputs, and the outputs of theirs."""

    def __init__(self, name: str):
        metadata, tensors = read(name)
        if "shapes" in metadata:
            weights = drawn_weights(json.loads(metadata["shapes"]))
        else:
            weights = {k.removeprefix("param."): v.float() for k, v in tensors.items() if k.startswith("param.")}
        if name.startswith("port"):
            self.config = UNetConfig.from_dict(json.loads(metadata["config"]))
            self.weights = state_dict_from_port(weights)
        else:
            self.config = official.config_from_official(json.loads(metadata["config"]))
            self.weights = official.state_dict_from_official(weights)
        levels = len(self.config.levels)
        grids = json.loads(metadata["frames_grid"])  # None: clips as ours are, whose frames the adapters see one by one
        if grids is None:
            self.config = _per_frame(self.config)
        self.grids = grids if isinstance(grids, list) else [grids] * levels
        self.parameters = int(metadata["params"])
        self.x = [self._clip(tensors[f"in.x{i}"], i) for i in range(levels)]
        self.y = [self._clip(tensors[f"out.y{i}"], i) for i in range(levels)]
        self.inputs = {"time": tensors["in.time"], "context": tensors["in.context"]}
        self.inputs["context_mask"] = tensors["in.context_mask"].bool()
        self.inputs["micro"] = {k.removeprefix("in.micro."): v for k, v in tensors.items() if k.startswith("in.micro.")}

    def model(self) -> UNet:
        model = build_model(self.config)
        model.load_state_dict(self.weights)
        return model.eval()

    def _clip(self, x: Tensor, level: int) -> Tensor:
        """The official grid of n×n frames (B, C, n·H, n·W) → (B, C, n², H, W); all else stays."""
        if not self.config.is_video or x.dim() == 5:
            return x
        n = self.grids[level]
        tiles = x.unflatten(3, (n, -1)).unflatten(2, (n, -1))  # (B, C, n, H, n, W)
        return tiles.transpose(3, 4).flatten(2, 3)


def _per_frame(config: UNetConfig) -> UNetConfig:
    inner = _per_frame(config.inner) if config.inner else None
    return dataclasses.replace(config, adapters_see_grid=False, inner=inner)


def shapes_of(name: str) -> dict[str, torch.Size]:
    """Every tensor's shape in the official checkpoint `name`, by official key."""
    shapes = json.loads((DIRECTORY / "official_shapes.json").read_text())
    return {key: torch.Size(shape) for key, shape in shapes[name].items()}
