"""How a model is spread over processes, compiled and kept small: all that the model itself knows nothing of."""

import contextlib
import functools
import inspect
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mdm_models.layers import AttentionBlock, ResidualBlock, TemporalAttentionBlock, TextSelfAttention
from mdm_models.private_torch import allow_recompilations
from mdm_models.processes import Processes
from mdm_models.training.config import SystemConfig
from mdm_models.training.denoiser import CaptionedDenoiser

BLOCKS = (ResidualBlock, AttentionBlock, TemporalAttentionBlock, TextSelfAttention)
RECOMPILATIONS = 256  # one block class runs at many widths and resolutions; beyond torch's default of 8 it gives up


def set_determinism(on: bool) -> None:
    """Say whether torch must choose algorithms whose results never vary; otherwise cuDNN tries which ones are
    fastest."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs a workspace of fixed size for it
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = not on


def parallelise(model: CaptionedDenoiser, config: SystemConfig, processes: Processes) -> nn.Module:
    """Give what to call in place of `model`, which is changed as the settings say; its parameters keep their names."""
    blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
    shards = config.parallel == "fsdp" and processes.world_size > 1
    if config.compile:
        allow_recompilations(RECOMPILATIONS)
        block_by_block = shards or config.checkpoint_activations
        for module in blocks if block_by_block else [model.unet]:
            vars(module)["forward"] = torch.compile(module.forward)
    if config.checkpoint_activations:
        for block in blocks:
            vars(block)["forward"] = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if shards or not config.channels_last:
        model.to(memory_format=torch.contiguous_format)  # fully_shard takes no other; see `Learner` for the images
    if shards:
        mesh = init_device_mesh(processes.device.type, (processes.world_size,))  # or else on GPUs, if there are any
        gathered = torch.bfloat16 if config.uses_bf16(processes.device.type) else torch.float32
        precision = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)  # times would be rounded
        for module in [*blocks, *filter(None, [model.text, model.unet])]:  # each is gathered when its forward begins
            fully_shard(module, mesh=mesh, mp_policy=precision)
        for module in [model.unet, *(block for block in blocks if isinstance(block, AttentionBlock))]:
            register_fsdp_forward_method(module, "prepare")  # which reads whole weights, as forward does
        return model
    if processes.world_size > 1:
        # buffers are constants here, not to be sent at each step; the option for that has a new name in torch 2.15
        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {sync: False}
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
    return model


@contextlib.contextmanager
def accumulating(model: nn.Module, more: bool) -> Iterator[None]:
    """Inside the block, gradients stay with their process if `more` of the same step are to come."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync() if more else contextlib.nullcontext():
            yield
        return
    for module in model.children():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(not more)
    yield
