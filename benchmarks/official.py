"""The models of the official code (apple/ml-mdm), from a checkout of it, measured beside ours on the same weights.

Only its model files are run. What they import for other purposes (reading data, printing summaries, object stores) is
replaced by empty modules, so that the checkout's own requirements, an old PyTorch among them, need not be installed.
"""

import contextlib
import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import yaml
from torch import Tensor, nn

from benchmarks import launches
from benchmarks.launches import WayRow
from benchmarks.models import SIZES, TEXT_TOKENS
from mdm_models import UNet, create_model, official

CONFIGS = {
    "mdm_t2i_64": "cc12m_64x64.yaml",
    "mdm_t2i_256": "cc12m_256x256.yaml",
    "mdm_t2i_1024": "cc12m_1024x1024.yaml",
}
FLOAT32, AUTOCAST = "official, float32", "official, bf16 autocast"
"""the official code in either precision"""
_UNUSED = (
    "boto3",
    "simple_parsing",
    "simple_parsing.wrappers",
    "simple_parsing.wrappers.field_wrapper",
    "torchinfo",
    "ml_mdm.reader",
    "ml_mdm.s3_helpers",
    "ml_mdm.utils.fix_old_checkpoints",
)


class OfficialModel(nn.Module):
    """An official network called as ours are: list of (B, C, H, W) in and out, highest resolution first."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: list[Tensor], time: Tensor, context: Tensor, context_mask: Tensor | None = None):
        if context_mask is None:
            context_mask = torch.ones(context.shape[:2], device=context.device)
        y = self.network(x if len(x) > 1 else x[0], time, context, context_mask)
        return list(y) if isinstance(y, (list, tuple)) else [y]


def source(checkout: Path) -> Path:
    """Find the folder in a checkout that holds the package `ml_mdm`. Raises ValueError if there is none."""
    for folder in (checkout, checkout / "ml-mdm-matryoshka"):
        if (folder / "ml_mdm" / "models" / "nested_unet.py").is_file():
            return folder
    raise ValueError(f"{checkout} is no checkout of apple/ml-mdm: it has no ml_mdm/models/nested_unet.py")


def pair(name: str, checkout: Path) -> tuple[OfficialModel, UNet]:
    """Make the official model and ours with the same random weights in float32, in evaluation mode.

    Every weight is random, those that training starts at zero too: the two would agree on zeros for nothing.
    """
    theirs, ours = _official(name, source(checkout)), create_model(name)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() > 1:  # as wide as keeps the variance of what passes through
                parameter.normal_(std=(3 * parameter[0].numel()) ** -0.5)
    ours.load_state_dict(official.state_dict_from_official(theirs.state_dict()))
    return OfficialModel(theirs).eval(), ours.eval()


def measure(
    name: str,
    checkout: Path,
    batch: int,
    device: torch.device,
    seconds: float,
    *,
    backward: bool = False,
    graphs: bool = False,
) -> Iterator[WayRow]:
    """Measure a forward pass, and if asked for one with its backward, of the official model and ours, in float32 and
    bfloat16; with `graphs` what computes in bfloat16 as captured graphs too.

    The official code computes in bfloat16 under autocast, and so do we in training; when we sample, our weights are
    bfloat16 themselves. The error is of the highest resolution's prediction, or of the gradient of the first weight,
    which backward reaches last: its distance from the official float32 one over that one's norm.
    """
    theirs, ours = pair(name, checkout)
    theirs, ours = theirs.to(device), ours.to(device)
    rounded = copy.deepcopy(ours).to(torch.bfloat16)
    torch.manual_seed(1)
    size, _ = SIZES[name]
    x = [torch.randn(batch, 3, size // space, size // space, device=device) for _, space in ours.config.strides]
    time = torch.randint(0, 1000, (batch,), device=device)
    context = torch.randn(batch, TEXT_TOKENS, ours.config.innermost.context_dim, device=device)
    everywhere, autocast = contextlib.nullcontext(), torch.autocast(device.type, torch.bfloat16)
    ways = {
        FLOAT32: (theirs, everywhere),
        AUTOCAST: (theirs, autocast),
        "ours, float32": (ours, everywhere),
        "ours, bf16": (rounded, everywhere),
        "ours, bf16 autocast": (ours, autocast),
    }
    in_bf16 = [who for who in ways if "bf16" in who]

    @torch.inference_mode()
    def forward(who: str) -> Tensor:
        model, precision = ways[who]
        with precision:
            return model(x, time, context)[0]

    def forward_and_backward(who: str) -> Tensor:
        model, precision = ways[who]
        try:
            with precision:
                predictions = model(x, time, context)
            torch.stack([level.float().square().mean() for level in predictions]).sum().backward()
            return (model.network if model is theirs else model).conv_in.weight.grad
        finally:  # where memory ran out, too
            model.zero_grad()

    steps = {"forward": forward} | ({"forward + backward": forward_and_backward} if backward else {})
    for step, run in steps.items():
        expected = _unless_too_large(lambda run=run: run(FLOAT32))

        def error(results: Tensor, expected=expected) -> float | None:
            return None if expected is None else ((results.float() - expected).norm() / expected.norm()).item()

        calls = {who: (lambda run=run, who=who: run(who)) for who in ways}
        found = launches.outcomes(calls, device, seconds=seconds, graphed=in_bf16 if graphs else (), error=error)
        for who, outcome in found.items():
            yield WayRow(name, f"{batch}×{size}²", step, who, outcome)


def _unless_too_large(run: Callable[[], Tensor]) -> Tensor | None:
    try:
        return run()
    except torch.OutOfMemoryError:
        return None


def _official(name: str, folder: Path) -> nn.Module:
    modules = _import_models(folder)
    config = yaml.safe_load((folder / "configs/models" / CONFIGS[name]).read_text())["unet_config"]
    config["conditioning_feature_dim"] = 2048
    module, network = ("nested_unet", "NestedUNet") if "inner_config" in config else ("unet", "UNet")
    return getattr(modules[module], network)(3, 3, _unet_config(modules, config))


def _unet_config(modules: dict, config: dict):
    """The official config object of a dict, whatever the number of nested levels."""
    config = dict(config)
    inner = config.pop("inner_config", None)
    config["resnet_config"] = modules["unet"].ResNetConfig(**config["resnet_config"])
    if inner is None:
        return modules["unet"].UNetConfig(**config)
    config["initialize_inner_with_pretrained"] = None  # a file on the authors' machines
    return modules["nested_unet"].NestedUNetConfig(inner_config=_unet_config(modules, inner), **config)


def _import_models(folder: Path) -> dict:
    empty = {name: mock.MagicMock() for name in _UNUSED}
    with mock.patch.dict(sys.modules, empty), mock.patch.object(sys, "path", [str(folder), *sys.path]):
        return {name: importlib.import_module(f"ml_mdm.models.{name}") for name in ("unet", "nested_unet")}
