"""Reads the tensors in tests/golden, which the official code computed, into our layout."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mdm_models import UNet, build_model, official

# tests/golden holds a subset that covers every rule; MDM_GOLDEN names a directory with more files of the same form.
DIRECTORY = Path(os.environ.get("MDM_GOLDEN", Path(__file__).parents[1] / "golden"))
MODELS = sorted(
    path.stem for path in DIRECTORY.glob("*.safetensors") if path.stem.startswith(("unet", "nested", "video"))
)


def read(name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors by name) of one file."""
    with safe_open(DIRECTORY / f"{name}.safetensors", "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict


def relative_error(ours: Tensor, golden: Tensor) -> float:
    return ((ours - golden).norm() / golden.norm()).item()


class GoldenModel:
    """An official model on random weights: ours with those weights, its inputs, and the official outputs."""

    def __init__(self, name: str):
        metadata, tensors = read(name)
        self.config = official.config_from_official(json.loads(metadata["config"]))
        grids = json.loads(metadata["frames_grid"])
        self.grids = grids if isinstance(grids, list) else [grids] * len(self.config.levels)
        weights = {k.removeprefix("param."): v.float() for k, v in tensors.items() if k.startswith("param.")}
        self.weights = official.state_dict_from_official(weights)
        self.parameters = int(metadata["params"])
        self.x = [self._clip(tensors[f"in.x{i}"], i) for i in range(len(self.grids))]
        self.y = [self._clip(tensors[f"out.y{i}"], i) for i in range(len(self.grids))]
        self.inputs = {"time": tensors["in.time"], "context": tensors["in.context"]}
        self.inputs["context_mask"] = tensors["in.context_mask"].bool()

    def model(self) -> UNet:
        model = build_model(self.config)
        model.load_state_dict(self.weights)
        return model.eval()

    def _clip(self, x: Tensor, level: int) -> Tensor:
        """The official grid of n×n frames (B, C, n·H, n·W) → (B, C, n², H, W); an image model's images stay."""
        if not self.config.is_video:
            return x
        n = self.grids[level]
        tiles = x.unflatten(3, (n, -1)).unflatten(2, (n, -1))  # (B, C, n, H, n, W)
        return tiles.transpose(3, 4).flatten(2, 3)


def shapes_of(name: str) -> dict[str, torch.Size]:
    """Every tensor's shape in the official checkpoint `name`, by official key."""
    shapes = json.loads((DIRECTORY / "official_shapes.json").read_text())
    return {key: torch.Size(shape) for key, shape in shapes[name].items()}
