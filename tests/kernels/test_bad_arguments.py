"""Whatever is passed to an op, it returns a result of the right shape or raises a ValueError or TypeError that names
the argument: nothing else escapes, and no kernel runs on what does not fit.

A call that works is changed in one place by every value of a table, and in two places by values that Hypothesis draws.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import mdm_kernels as mk
from mdm_kernels.multires.checks import checked_strides, level_shape

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # infinite scales, interpreted
BACKENDS = ("torch", "triton")


def group_norm_module(num_channels, **options) -> Tensor:
    """What a module gives for so many channels; without memory, since they may be many."""
    module = mk.GroupNormSiLU(num_channels=num_channels, **options, device="meta")
    return module(torch.empty(2, num_channels, 3, device="meta"))


def group_norm_arguments() -> dict:
    scale, shift = torch.randn(1, 12).chunk(2, dim=1)
    return {
        "x": torch.randn(2, 4, 3, 2), "num_groups": 2, "weight": torch.randn(6), "bias": torch.randn(6), "eps": 1e-5,
        "skip": torch.randn(2, 2, 3, 2), "scale": scale, "shift": shift, "activation": "silu",
    }  # fmt: skip


def group_norm_module_arguments() -> dict:
    return {"num_groups": 2, "num_channels": 6, "eps": 1e-5, "affine": True, "activation": "silu"}


def flash_arguments() -> dict:
    q, k, v = torch.randn(2, 2, 5, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
    return {"q": q, "k": k, "v": v, "key_mask": torch.ones(2, 7, dtype=torch.bool), "scale": 0.25}


def sdpa_arguments() -> dict:
    query, key, value, mask, scale = flash_arguments().values()
    return {
        "query": query, "key": key, "value": value, "attn_mask": mask[:, None, None, :], "dropout_p": 0.0,
        "is_causal": False, "scale": scale, "enable_gqa": False,
    }  # fmt: skip


def self_cross_arguments() -> dict:
    mask = torch.ones(2, 7, dtype=torch.bool)
    return {"qkv": torch.randn(2, 5, 96), "context_kv": torch.randn(2, 7, 64), "num_heads": 2, "key_mask": mask}


def temporal_arguments() -> dict:
    return {"qkv": torch.randn(6, 2, 96), "num_heads": 2, "frames": 3, "rotary": torch.randn(3, 8)}


def noise_arguments() -> dict:
    images, noise = torch.randn(2, 1, 2, 8, 4), [torch.randn(2, 1, 2, 8, 4), torch.randn(2, 1, 1, 2, 1)]
    return {"images": images, "alpha_bars": torch.rand(2, 2), "strides": [1, (2, 4)], "noise": noise, "seed": None}


def loss_arguments() -> dict:
    arguments = noise_arguments() | {"noise": None, "seed": 5}
    preds = [torch.randn(2, 1, 2, 8, 4), torch.randn(1, 1, 1, 2, 1)]
    spaces = {"prediction": "v", "loss_target": "eps"}
    return {"preds": preds} | arguments | spaces | {"weights": [1.0, 2.0], "rows": [2, 1]}


def group_norm_shape(arguments: dict) -> list[tuple]:
    """x's, with the channels of a skip."""
    x, skip = arguments["x"], arguments["skip"]
    return [(x.shape[0], x.shape[1] + (0 if skip is None else skip.shape[1]), *x.shape[2:])]


def attention_shape(name: str) -> Callable[[dict], list[tuple]]:
    """(rows, tokens, 3C) → (rows, tokens, C)."""
    return lambda arguments: [(*arguments[name].shape[:2], arguments[name].shape[2] // 3)]


def sdpa_shape(arguments: dict) -> list[tuple]:
    """(*leading, tokens, width of the values), the leading sizes broadcast together; grouped heads count as query's."""
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    grouped = arguments["enable_gqa"]
    leading = [x.shape[: -2 - grouped] + query.shape[-3:-2] * grouped for x in (query, key, value)]
    return [(*torch.broadcast_shapes(*leading), query.shape[-2], value.shape[-1])]


def level_shapes(arguments: dict) -> list[tuple]:
    images = arguments["images"]
    return [level_shape(images, stride) for stride in checked_strides(images, arguments["strides"])]


class Op(NamedTuple):
    function: Callable
    valid: Callable[[], dict]
    result_shapes: Callable[[dict], list[tuple]]


OPS = {
    "group_norm_silu": Op(mk.group_norm_silu, group_norm_arguments, group_norm_shape),
    "GroupNormSiLU": Op(
        group_norm_module, group_norm_module_arguments, lambda arguments: [(2, arguments["num_channels"], 3)]
    ),
    "flash_attention": Op(mk.flash_attention, flash_arguments, lambda arguments: [tuple(arguments["q"].shape)]),
    "scaled_dot_product_attention": Op(mk.scaled_dot_product_attention, sdpa_arguments, sdpa_shape),
    "self_cross_attention": Op(mk.self_cross_attention, self_cross_arguments, attention_shape("qkv")),
    "temporal_attention": Op(mk.temporal_attention, temporal_arguments, attention_shape("qkv")),
    "multires_noise": Op(mk.multires_noise, noise_arguments, level_shapes),
    "multires_loss": Op(mk.multires_loss, loss_arguments, lambda arguments: [(len(arguments["images"]),)]),
}

OBJECTS = (
    None, True, 0, -1, 1, 3, 2**31, 2**70, 0.0, -1.0, 1.5, float("nan"), float("inf"), 1 + 2j, "", "silu", "x0", b"v",
    [], (), {}, [None], [1.5, 2.5], [0, 4], [1, -4], [1, 3], [1, 2**40], [1, (2,)], [1, (2, 4, 4)], [1, (3, 4)],
    [True, 1], [1, "4"], ["a", "b"], [3, 2], [float("nan"), 1.0], object(), int, np.float32(1.5), np.int64(3),
    np.ones(3), np.ones((2, 7), bool), torch.tensor(3), torch.tensor(1.5), torch.empty(0), torch.float32,
)  # fmt: skip

DTYPES = (
    torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
)  # fmt: skip


def changed_tensors(x: Tensor) -> list:
    """x with other dimensions, sizes, types, on another device, and things that are like it but are no tensor."""
    sizes = [x.narrow(d, 0, size) for d in range(x.dim()) for size in {0, 1, x.shape[d] - 1} if size < x.shape[d]]
    doubled = [torch.cat([x, x], d) for d in range(x.dim())]
    dims = [x[None], x[0], x.flatten(), x[..., None], x.sum()]
    types = [x.to(dtype) for dtype in DTYPES]
    others = [x.to("meta"), x.to_sparse(), x.mT if x.dim() > 1 else x, [x], (x, x), x.tolist(), x.cpu().numpy()]
    needing_gradient = [x.clone().requires_grad_()] if x.is_floating_point() else []
    return [*sizes, *doubled, *dims, *types, *others, *needing_gradient]


def changed_lists(tensors: list[Tensor]) -> list:
    """Lists of another length, of other tensors, of no tensors."""
    first, *rest = tensors
    lengths = [[first], [*tensors, first], tensors[::-1], tuple(tensors), first, torch.stack([first, first])]
    return lengths + [[x, *rest] for x in (*changed_tensors(first), *OBJECTS)]


def changes(value) -> list:
    """Everything to put in the place of an argument that is `value`."""
    if isinstance(value, Tensor):
        return [*OBJECTS, *changed_tensors(value)]
    if isinstance(value, list) and isinstance(value[0], Tensor):
        return [*OBJECTS, *changed_lists(value)]
    return list(OBJECTS)


def describe(value) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.layout} on {value.device}"
    return f"[{', '.join(map(describe, value))}]" if isinstance(value, list | tuple) else repr(value)


def fault_of(op: Op, changed: dict) -> str | None:
    """What is wrong with how a call of `op` ends, some arguments of which are changed; None if nothing is."""
    arguments = op.valid() | changed
    story = ", ".join(f"{name} = {describe(value)}" for name, value in changed.items())
    try:
        result = op.function(**arguments)
    except (ValueError, TypeError) as error:
        absent = any(value is None for value in changed.values())  # its error may be what that does to another one
        named = any(re.search(rf"\b{name}\b", str(error)) for name in (arguments if absent else changed))
        return None if named and "\n" not in str(error) else f"{story}: not named in one line: {error}"
    except Exception as error:
        return f"{story}: {type(error).__name__}: {str(error).splitlines()[0]}"
    shapes = [tuple(tensor.shape) for tensor in (result if isinstance(result, list) else [result])]
    return None if shapes == op.result_shapes(arguments) else f"{story}: gives shapes {shapes}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_any_one_wrong_argument_is_named(name, backend):
    op = OPS[name]
    with mk.use_backend(backend):
        faults = [fault_of(op, {})]
        for argument, value in op.valid().items():
            faults += [fault_of(op, {argument: change}) for change in changes(value)]
    assert not any(faults), "\n".join(["", *filter(None, faults)])


@pytest.mark.parametrize("name", OPS)
def test_autocast_makes_no_wrong_dtype_right(name):
    op = OPS[name]
    with torch.autocast("cpu"):
        for argument, value in op.valid().items():
            if isinstance(value, Tensor) and value.is_floating_point():
                for dtype in (torch.int64, torch.bool, torch.complex64):
                    with pytest.raises(TypeError, match=argument):
                        op.function(**op.valid() | {argument: value.to(dtype)})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_two_wrong_arguments_are_named(name, backend, data):
    op = OPS[name]
    valid = op.valid()
    names = data.draw(st.lists(st.sampled_from(list(valid)), min_size=2, max_size=2, unique=True))
    changed = {}
    for argument in names:
        values = changes(valid[argument])
        changed[argument] = values[data.draw(st.integers(0, len(values) - 1))]
    with mk.use_backend(backend):
        assert fault_of(op, changed) is None


def test_a_wrong_backend_is_named():
    for value in (*OBJECTS, "cuda", np.array(["torch"])):
        with pytest.raises((ValueError, TypeError), match="backend is"):
            mk.set_backend(value)
        with pytest.raises((ValueError, TypeError), match="backend is"), mk.use_backend(value):
            pass
