"""What a training step costs, found without computing anything: operations, and the memory of its activations.

The model is run on tensors that have shapes but no memory, so that this takes seconds for a model of any size, and
needs neither the device nor the data.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from mdm_kernels import GroupNormSiLU, use_backend
from mdm_models.config import UNetConfig
from mdm_models.private_torch import fake_tensors
from mdm_models.text import TransformerTextEncoder
from mdm_models.training.config import ModelConfig, Plan, TrainConfig, level_shares
from mdm_models.training.denoiser import CaptionedDenoiser
from mdm_models.training.parallel import BLOCKS
from mdm_models.unet import UNet, empty_model

Shapes = tuple[tuple[int, ...], ...]
"""one sample's shape at each level, highest resolution first"""


def weightless_model(architecture: UNetConfig, config: ModelConfig) -> CaptionedDenoiser:
    """Make the model of a run on the meta device; of a frozen text encoder only the features come in."""
    encoder = None
    if not config.text_encoder:
        with torch.device("meta"):
            encoder = TransformerTextEncoder(config.text_width, config.text_layers, max_tokens=config.text_tokens)
    return CaptionedDenoiser(empty_model(architecture), encoder).to("meta")  # the buffers too


@functools.cache
def level_flops(architecture: UNetConfig, config: ModelConfig, shapes: Shapes) -> tuple[int, ...]:
    """Count the floating-point operations, two a multiplication with its addition, of the forward pass of one sample in
    each level's UNet; those of the text in the innermost level's. Matrix products and convolutions only, as in
    torch.utils.flop_counter: what the matrix units do."""
    model = weightless_model(architecture, config)
    for module in model.modules():
        if isinstance(module, GroupNormSiLU):  # of no matrix product, and most of the time
            vars(module)["forward"] = _unnormalised

    counter = FlopCounterMode(display=False)
    with_inner: list[int] = []
    """operations of each level and those inside it, the innermost first, as they end"""

    def counted(denoise: Callable) -> Callable:
        def denoise_counted(*given):
            before = counter.get_total_flops()
            result = denoise(*given)
            with_inner.append(counter.get_total_flops() - before)
            return result

        return denoise_counted

    for unet in model.modules():
        if isinstance(unet, UNet):
            vars(unet)["denoise"] = counted(unet.denoise)
    with counter, use_backend("torch"), torch.no_grad():
        model(*_inputs(architecture, config, shapes, [1] * len(shapes), "meta"))
    *outer, innermost = [more - less for more, less in itertools.pairwise([*reversed(with_inner), 0])]
    text = counter.get_total_flops() - with_inner[-1]
    return *outer, innermost + text


def _unnormalised(x: Tensor, scale=None, shift=None, skip: Tensor | None = None) -> Tensor:
    """A tensor of the shape that a normalisation's has."""
    return x if skip is None else torch.cat([x, skip], dim=1)


def training_flops(config: TrainConfig, planned: Plan) -> float:
    """Count the operations that the model needs for a sample's forward and backward pass, mean over a batch whose
    levels have shares of it."""
    forward = level_flops(planned.architecture, config.model, tuple(planned.shapes))
    shares = level_shares(config, planned.architecture)
    return 3 * sum(share * flops for share, flops in zip(shares, forward, strict=True))


@dataclass(frozen=True)
class Activations:
    """Bytes of memory that a forward and a backward pass need besides weights and their gradients."""

    kept: int
    """by the forward pass for the backward pass"""
    in_flight: int
    """at most, by gradients inside a block on their way to the one before: as much as the largest block keeps"""


def activation_bytes(
    architecture: UNetConfig,
    config: ModelConfig,
    shapes: Shapes,
    rows: Sequence[int],
    device: str,
    autocast: bool,
    recompute: bool,
) -> Activations:
    """Estimate the activations of one chunk on device "cpu" or "cuda", where the kernels run; copies of the weights in
    bfloat16 under autocast are among them. Up to twice too much on a CPU, where group_norm_silu keeps no more than
    its input and its reference, which is run here, keeps every step.

    rows: samples at each level. recompute: of each block only its inputs are kept, and its insides made again one block
    at a time (activation checkpointing).
    """
    model = weightless_model(architecture, config)
    with fake_tensors(), use_backend("triton" if device == "cuda" else "torch"):
        weights = {name: _like(p, device).requires_grad_() for name, p in model.named_parameters()}
        buffers = {name: _like(b, device) for name, b in model.named_buffers()}
        inputs = _inputs(architecture, config, shapes, rows, device)
        before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        torch.set_autocast_enabled(device, autocast)  # torch.autocast refuses a device that this machine lacks
        torch.set_autocast_dtype(device, torch.bfloat16)
        try:
            with _Saved(model, weights.values()) as saved:
                torch.func.functional_call(model, weights | buffers, inputs)
        finally:
            torch.set_autocast_enabled(device, before[0])
            torch.set_autocast_dtype(device, before[1])
            torch.clear_autocast_cache()
    return saved.with_recomputation() if recompute else saved.in_full()


Memory = dict[torch.UntypedStorage, int]
"""pieces of memory, told apart by identity, and their bytes"""


class _Saved:
    """What autograd keeps of a forward pass inside the `with` block, but the weights: outside of blocks, and block by
    block."""

    def __init__(self, model: nn.Module, weights: Iterable[Tensor]):
        self._weights = {weight.untyped_storage() for weight in weights}
        self._blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
        self._outside: Memory = {}
        self._block_inputs: Memory = {}
        self._insides: list[Memory] = []
        self._current = self._outside

    def __enter__(self) -> "_Saved":
        self._handles = [block.register_forward_pre_hook(self._enter_block) for block in self._blocks]
        self._handles += [block.register_forward_hook(self._leave_block) for block in self._blocks]
        self._hooks = saved_tensors_hooks(self._note, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def in_full(self) -> Activations:
        kept = self._outside.copy()
        for inside in self._insides:
            kept |= inside
        return Activations(sum(kept.values()), max((sum(inside.values()) for inside in self._insides), default=0))

    def with_recomputation(self) -> Activations:
        kept = self._outside | self._block_inputs
        insides = [sum(size for memory, size in inside.items() if memory not in kept) for inside in self._insides]
        largest = max(insides, default=0)
        return Activations(sum(kept.values()) + largest, largest)

    def _note(self, tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory not in self._weights:
            self._current[memory] = memory.nbytes()
        return tensor

    def _enter_block(self, block: nn.Module, inputs: tuple) -> None:
        self._current = self._block_inputs
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                self._note(tensor)
        self._current = {}
        self._insides.append(self._current)

    def _leave_block(self, *args) -> None:
        self._current = self._outside


def _like(tensor: Tensor, device: str) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _inputs(architecture: UNetConfig, config: ModelConfig, shapes: Shapes, rows: Sequence[int], device: str) -> tuple:
    """x of every level, times and captions: what `CaptionedDenoiser` takes."""
    batch, tokens = rows[-1], config.text_tokens
    x = [torch.empty(count, *shape, device=device) for count, shape in zip(rows, shapes, strict=True)]
    width = architecture.innermost.context_dim
    if config.text_encoder:
        mask = torch.empty(batch, tokens, dtype=torch.bool, device=device)
        captions = torch.empty(batch, tokens, width, device=device), mask
    else:
        captions = (torch.empty(batch, tokens, dtype=torch.int64, device=device),)
    return x, torch.empty(batch, device=device), captions
