"""Everything of PyTorch that this package uses and PyTorch does not promise to keep, name by name, in one place.

tests/test_private_torch.py has a test for each name, which says what broke when it fails.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

fake_tensors = FakeTensorMode
"""Context in which tensors have shapes and no memory; the dry run counts what a step would hold in it."""

foreach_lerp_ = torch._foreach_lerp_
"""foreach_lerp_(a, b, share): a ← a + share · (b − a) for lists of tensors, in few launches; averages move by it."""

CHECKPOINT_CLASSES = {
    "torch.distributed.checkpoint.metadata": {"_MEM_FORMAT_ENCODING"},
    "torch.serialization": {"_get_layout"},
}
"""Names beside its dataclasses and enums that a checkpoint's metadata calls for when it is read, by module."""


def cpu_multiplies_bf16() -> bool:
    """Whether this machine's CPU has units for products in bfloat16: AMX, or AVX-512's."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def allow_recompilations(most: int) -> None:
    """Set how often torch.compile may compile one function anew before it gives up, in the whole process."""
    torch._dynamo.config.recompile_limit = most
