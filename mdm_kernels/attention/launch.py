"""Which tiles and warps the attention kernels run with, by shape: BLOCK_M queries by BLOCK_N keys.

Chosen by `python -m mdm_kernels.aot`: the largest tiles with which no shape class spills on any target.
"""

from torch import Tensor

from .. import backend, plans, tiles, tma

FEW_QUERIES = 128 * 132  # fewer make less than one tile of 128 for each multiprocessor of a large GPU


def power_of_two(size: int) -> int:
    """Give the least power of two that is no less than `size`, and no less than a matrix product's 16."""
    return max(16, tiles.next_power_of_2(size))


def split_width(head_width: int) -> tuple[int, int]:
    """Split a head's width into (DA, DB), powers of two: 64 → (64, 0), 96 → (64, 32), 80 → (64, 16); one padded tile
    where that is no larger."""
    padded = power_of_two(head_width)
    half = padded // 2
    rest = power_of_two(head_width - half)
    return (half, rest) if half >= 16 and half + rest < padded else (padded, 0)


def width_constants(head_width: int) -> dict[str, int]:
    """Give the constexprs that say how a head's channels are held."""
    first, second = split_width(head_width)
    return {"D": head_width, "DA": first, "DB": second}


def forward_tiles(itemsize: int, queries: int) -> dict[str, int]:
    """Give the tiles and launch options of the forward kernels; `queries` counts those of all heads and samples."""
    if itemsize == 4:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    if queries < FEW_QUERIES:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}


def context_tile(queries_tile: int) -> int:
    """Give how many keys of the context are in a tile of `self_cross_forward`, whose tile of queries is given. With 64
    beside 128 queries it needs more than 128 registers on sm_90, and one program of 8 warps fills a multiprocessor that
    could have two."""
    return 64 if queries_tile == 64 else 32


def query_tiles(itemsize: int, queries: int) -> dict[str, int]:
    """Give the tiles and launch options of the kernels for the gradient of q; `queries` counts those of all heads and
    samples."""
    if itemsize == 4:
        return {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    if queries < FEW_QUERIES:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}


def key_tiles(head_width: int, itemsize: int) -> dict[str, int]:
    """Give the tiles and launch options of the kernels for the gradients of k and v."""
    if itemsize == 4 and head_width > 64:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    if itemsize == 4:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    if head_width > 64:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}


def tile_key(kernel: str, itemsize: int, head_width: int, queries: int) -> str:
    """Give the key by which `tiles.tuned` tells the tiles of a kernel apart."""
    return f"{kernel}, {8 * itemsize} bits, {head_width} wide, {'few' if queries < FEW_QUERIES else 'many'} queries"


def _tile(kernel: str, x: Tensor, head_width: int, queries: int) -> dict[str, int]:
    """Of one of the six kernels, measured or by rule."""
    itemsize = x.element_size()
    measured = tiles.tuned(x.device, tile_key(kernel, itemsize, head_width, queries))
    if measured:
        return measured
    if kernel.endswith("forward"):
        return forward_tiles(itemsize, queries)
    return query_tiles(itemsize, queries) if "query" in kernel else key_tiles(head_width, itemsize)


@plans.planned
def flash_forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out, lse, scale: float) -> None:
    """Write the output, (B, H, L, D), to `out` and the log-sum-exp, float32 (B, H, L), to `lse`."""
    from . import flash_kernels

    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    tile = _tile("flash_forward", q, width, batch * heads * queries)
    backend.launch(
        flash_kernels.flash_forward,
        (tiles.count(queries, tile["BLOCK_M"]) * batch * heads,),
        **{"q_ptr": q, "k_ptr": k, "v_ptr": v, "mask_ptr": key_mask, "out_ptr": out, "lse_ptr": lse},
        **_strides(AXES_OF_HEADS, q=q, k=k, v=v, out=out),
        **_mask_strides(key_mask),
        **{"H": heads, "L": queries, "S": keys, "scale": scale},
        **_descriptors(tile["BLOCK_N"], width, k=k, v=v),
        **width_constants(width),
        EVEN=keys % tile["BLOCK_N"] == 0,
        MASKED=key_mask is not None,
        **tile,
    )


@plans.planned
def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor, scale: float,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v to `dq`, `dk` and `dv`, which have their shapes."""
    from . import flash_kernels

    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    shared = {
        **{"q_ptr": q, "k_ptr": k, "v_ptr": v, "mask_ptr": key_mask, "grad_ptr": grad, "lse_ptr": lse},
        "delta_ptr": plans.scratch(*lse.shape, like=lse),
        **_strides(AXES_OF_HEADS, q=q, k=k, v=v, grad=grad),
        **_mask_strides(key_mask),
        **{"H": heads, "L": queries, "S": keys, "scale": scale},
        **width_constants(width),
        "MASKED": key_mask is not None,
    }
    tile = _tile("flash_query_gradient", q, width, batch * heads * queries)
    backend.launch(
        flash_kernels.flash_query_gradient,
        (tiles.count(queries, tile["BLOCK_M"]) * batch * heads,),
        **shared,
        **{"out_ptr": out, "dq_ptr": dq},
        **_strides(AXES_OF_HEADS, out=out, dq=dq),
        **_descriptors(tile["BLOCK_N"], width, k=k, v=v),
        EVEN=keys % tile["BLOCK_N"] == 0,
        **tile,
    )
    tile = _tile("flash_key_gradient", q, width, batch * heads * queries)
    backend.launch(
        flash_kernels.flash_key_gradient,
        (tiles.count(keys, tile["BLOCK_N"]) * batch * heads,),
        **shared,
        **{"dk_ptr": dk, "dv_ptr": dv},
        **_strides(AXES_OF_HEADS, dk=dk, dv=dv),
        EVEN=queries % tile["BLOCK_M"] == 0,
        **tile,
    )


@plans.planned
def self_cross_forward(
    qkv: Tensor, context_kv: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor, num_heads: int
) -> None:
    """Write the output, (B, L, C), to `out` and the two log-sum-exps, float32 (2, B, H, L), to `lse`."""
    from . import self_cross_kernels

    batch, tokens, channels = out.shape
    width, context_tokens = channels // num_heads, context_kv.shape[1]
    tile = _tile("self_cross_forward", qkv, width, batch * num_heads * tokens)
    context = context_tile(tile["BLOCK_M"])
    backend.launch(
        self_cross_kernels.self_cross_forward,
        (tiles.count(tokens, tile["BLOCK_M"]) * batch * num_heads,),
        **{"qkv_ptr": qkv, "context_ptr": context_kv, "mask_ptr": key_mask, "out_ptr": out, "lse_ptr": lse},
        **_strides(AXES_OF_TOKENS, qkv=qkv, context=context_kv, out=out),
        **_mask_strides(key_mask),
        **{"B": batch, "H": num_heads, "L": tokens, "S": context_tokens, "scale": width**-0.5},
        **_descriptors(tile["BLOCK_N"], width, qkv=qkv),
        **_descriptors(context, width, context=context_kv),
        **width_constants(width),
        EVEN=tokens % tile["BLOCK_N"] == 0,
        BLOCK_CONTEXT=context,
        EVEN_CONTEXT=context_tokens % context == 0,
        MASKED=key_mask is not None,
        **tile,
    )


@plans.planned
def self_cross_backward(
    grad: Tensor, qkv: Tensor, context_kv: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor, num_heads: int,
    dqkv: Tensor, dcontext: Tensor,
) -> None:  # fmt: skip
    """Write the gradients of qkv and context_kv to `dqkv` and `dcontext`, which have their shapes."""
    from . import self_cross_kernels

    batch, tokens, channels = out.shape
    width, context_tokens = channels // num_heads, context_kv.shape[1]
    shared = {
        **{"qkv_ptr": qkv, "context_ptr": context_kv, "mask_ptr": key_mask, "grad_ptr": grad, "lse_ptr": lse},
        **{"delta_ptr": plans.scratch(*lse.shape, like=lse), "dqkv_ptr": dqkv},
        **_strides(AXES_OF_TOKENS, qkv=qkv, context=context_kv, grad=grad, dqkv=dqkv),
        **_mask_strides(key_mask),
        **{"B": batch, "H": num_heads, "L": tokens, "S": context_tokens, "scale": width**-0.5},
        **width_constants(width),
        "MASKED": key_mask is not None,
    }
    tile = _tile("self_cross_query_gradient", qkv, width, batch * num_heads * tokens)
    backend.launch(
        self_cross_kernels.self_cross_query_gradient,
        (tiles.count(tokens, tile["BLOCK_M"]) * batch * num_heads,),
        **shared,
        out_ptr=out,
        **_strides(AXES_OF_TOKENS, out=out),
        **_descriptors(tile["BLOCK_N"], width, qkv=qkv, context=context_kv),
        EVEN=tokens % tile["BLOCK_N"] == 0,
        EVEN_CONTEXT=context_tokens % tile["BLOCK_N"] == 0,
        **tile,
    )
    tile = _tile("self_cross_key_gradient", qkv, width, batch * num_heads * tokens)
    key_tile_count = tiles.count(tokens, tile["BLOCK_N"]) + tiles.count(context_tokens, tile["BLOCK_N"])
    backend.launch(
        self_cross_kernels.self_cross_key_gradient,
        (key_tile_count * batch * num_heads,),
        **shared,
        dcontext_ptr=dcontext,
        **_strides(AXES_OF_TOKENS, dcontext=dcontext),
        EVEN=tokens % tile["BLOCK_M"] == 0,
        **tile,
    )


AXES_OF_HEADS = ("batch", "head", "row", "column")  # of (B, H, L, D)
AXES_OF_TOKENS = ("batch", "row", "column")  # of (B, L, C)


def _strides(axes: tuple[str, ...], **tensors: Tensor) -> dict[str, int]:
    """{"q_batch": …}: the kernel arguments that say where a tensor's elements lie."""
    return {
        f"{name}_{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip(axes, tensor.stride(), strict=True)
    }


def _descriptors(rows: int, head_width: int, **tensors: Tensor) -> dict:
    """The kernel arguments by which tiles of `rows` tokens are read by TMA; None where they are not."""
    return tma.descriptors(rows, head_width, split_width(head_width), **tensors)


def _mask_strides(key_mask: Tensor | None) -> dict[str, int]:
    batch, column = (0, 0) if key_mask is None else key_mask.stride()
    return {"mask_batch": batch, "mask_column": column}
