"""The calls that the models of the zoo make of the ops, recorded from the models on tensors without memory."""

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mdm_kernels as mk
from mdm_kernels.multires.checks import checked_strides, level_shape
from mdm_models import create_model, list_models
from tests.kernels import calls

TEXT_TOKENS = 128
TINY = 32  # height and width of the models whose names do not end in theirs


def frames_of(name: str) -> int | None:
    """Frames of a clip; None for a model of images."""
    if not name.startswith("mdm_t2v"):
        return None
    return 8 if name.endswith(("tiny", "emoji")) else 16


def side_of(name: str) -> int:
    """Height and width of the highest level."""
    *_, size = name.split("_")
    return int(size) if size.isdigit() else TINY


class Recorder(TorchDispatchMode):
    """Notes the forward calls of this package's ops by what tells them apart."""

    def __init__(self):
        super().__init__()
        self.calls: dict[str, functools.partial] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mdm_kernels":
            names = [argument.name for argument in function._schema.arguments]
            makers = MAKERS[function._schema.name.split("::")[1]](**dict(zip(names, args, strict=True)))
            self.calls |= {describe(maker): maker for maker in makers}
        return function(*args, **(kwargs or {}))


def describe(maker: functools.partial) -> str:
    sizes = "×".join(map(str, maker.args))
    options = [f"{name} {value}" for name, value in maker.keywords.items() if value not in (None, False, 0)]
    return ", ".join([f"{maker.func.__name__} {sizes}".strip(), *options])


def like_group_norm(x: Tensor, skip: Tensor | None, num_groups: int, scale: Tensor | None, silu: bool, **_):
    yield functools.partial(
        calls.group_norm, *x.shape,
        groups=num_groups, skip=0 if skip is None else skip.shape[1], film_rows=0 if scale is None else len(scale),
        activation="silu" if silu else None,
    )  # fmt: skip


def like_self_cross(qkv: Tensor, context_kv: Tensor, key_mask: Tensor | None, num_heads: int):
    batch, tokens, channels = qkv.shape
    yield functools.partial(
        calls.self_cross, batch, tokens, context_kv.shape[1], num_heads, channels // (3 * num_heads),
        masked=key_mask is not None,
    )  # fmt: skip


def like_temporal(qkv: Tensor, cos: Tensor | None, num_heads: int, frames: int, **_):
    rows, positions, channels = qkv.shape
    width = channels // (3 * num_heads)
    yield functools.partial(calls.temporal, rows // frames, frames, positions, num_heads, width, rotary=cos is not None)


def like_multires(images: Tensor, time_strides: list[int], space_strides: list[int], **_):
    strides = list(zip(time_strides, space_strides, strict=True))
    yield functools.partial(calls.multires_noise, *images.shape, strides=strides)
    yield functools.partial(calls.multires_loss, *images.shape, strides=strides)


MAKERS = {
    "group_norm_silu_forward": like_group_norm,
    "self_cross_attention_forward": like_self_cross,
    "temporal_attention_forward": like_temporal,
    "multires_noise": like_multires,
}


def thinned(maker: functools.partial) -> functools.partial:
    """The call with less of what its kernels treat alike: one head, two groups, 64 positions, one map (or two frames
    that share their FiLM)."""
    sizes, options = list(maker.args), dict(maker.keywords)
    if maker.func is calls.group_norm:
        share = max(options["groups"] // 2, 1)
        options |= {"groups": options["groups"] // share, "skip": options["skip"] // share}
        sizes[:2] = min(sizes[0], 2 if options["film_rows"] else 1), sizes[1] // share
    elif maker.func is calls.self_cross:
        sizes[3] = 1
    elif maker.func is calls.temporal:
        sizes[2:4] = min(sizes[2], 64), 1
    return functools.partial(maker.func, *sizes, **options)


def few_rows(maker: functools.partial) -> functools.partial:
    """The call with at most two maps or frames, which a group norm treats alike."""
    if maker.func is not calls.group_norm:
        return maker
    rows, *sizes = maker.args
    return functools.partial(maker.func, min(rows, 2), *sizes, **maker.keywords)


@functools.cache
def zoo_calls() -> dict[str, functools.partial]:
    """By what describes them, functions that make the calls that one sample causes in every model of the zoo."""
    recorder = Recorder()
    for name in list_models():
        with torch.device("meta"), torch.no_grad(), mk.use_backend("triton"):
            model = create_model(name)
            frames, side = frames_of(name), side_of(name)
            images = torch.empty(1, 3, *([frames] if frames else []), side, side)
            strides = checked_strides(images, model.config.strides)
            x = [torch.empty(level_shape(images, stride)) for stride in strides]
            tokens = 1 if name.startswith("mdm_c2i") else TEXT_TOKENS
            context = torch.empty(1, tokens, model.config.innermost.context_dim)
            with recorder:
                mk.multires_noise(images, torch.empty(len(x), 1), strides, seed=0)
                model(x, torch.empty(1), context, torch.empty(1, tokens, dtype=torch.bool))
    return recorder.calls
