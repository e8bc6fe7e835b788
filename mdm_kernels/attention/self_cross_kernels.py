"""The kernels of self_cross_attention: a program per tile of queries (forward, dq) or of keys (dk, dv) of one head.

The two softmaxes, over the image's own tokens and over the context, use the same loops one after the other. Their
log-sum-exps and δ (output · its gradient, per query) are float32 (2, B, H, L). Only the sum of the two outputs is
stored: its product with the gradient is the sum of both δ, and the context's, of few keys, is computed anew.
"""

import triton
import triton.language as tl

from .kernels import (
    LOG2_E,
    add_attention,
    add_query_gradient,
    attend,
    attended_keys,
    head_of,
    key_gradients,
    load_tile,
    log_sum_exp,
    output_dot_grad,
    place,
    store_tile,
    sum_of_products,
    zero_tile,
)


@triton.jit
def self_cross_forward(
    qkv_ptr, context_ptr, mask_ptr, out_ptr, lse_ptr,
    qkv_batch, qkv_row, qkv_column, context_batch, context_row, context_column, mask_batch, mask_column,
    out_batch, out_row, out_column, B, H, L, S, scale,
    qkv_tiles, qkv_rest, context_tiles, context_rest,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_CONTEXT: tl.constexpr, EVEN: tl.constexpr, EVEN_CONTEXT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tiles of BLOCK_N of the image's keys, BLOCK_CONTEXT of the context's. EVEN, EVEN_CONTEXT: these divide L, S."""
    tile, b, h, row = place(tl.program_id(0), tl.cdiv(L, BLOCK_M), H)
    first = tile.to(tl.int64) * BLOCK_M
    left = L - tile * BLOCK_M
    head, width = h * D, tl.cast(H, tl.int64) * D
    position = row * L + first + tl.arange(0, BLOCK_M)
    inside = tl.arange(0, BLOCK_M) < left

    q = qkv_ptr + b * qkv_batch + head * qkv_column
    q_a, q_b = load_tile(q + first * qkv_row, qkv_row, qkv_column, left, D, DA, DB, BLOCK_M, False)
    k = q + width * qkv_column
    v = k + width * qkv_column
    k = head_of(k, qkv_row, qkv_column, b, H + h, qkv_tiles, qkv_rest)
    v = head_of(v, qkv_row, qkv_column, b, 2 * H + h, qkv_tiles, qkv_rest)
    out_a, out_b, lse = attend(
        q_a, q_b, k, v, mask_ptr, mask_column, L, scale * LOG2_E, D, DA, DB, BLOCK_M, BLOCK_N, EVEN, False
    )  # fmt: skip
    tl.store(lse_ptr + position, lse, inside)

    k = context_ptr + b * context_batch + head * context_column
    v = k + width * context_column
    k = head_of(k, context_row, context_column, b, h, context_tiles, context_rest)
    v = head_of(v, context_row, context_column, b, H + h, context_tiles, context_rest)
    mask = mask_ptr
    if MASKED:
        mask += b * mask_batch
    lse = log_sum_exp(
        q_a, q_b, k, mask, mask_column, S, scale * LOG2_E, D, DA, DB, BLOCK_M, BLOCK_CONTEXT, EVEN_CONTEXT, MASKED
    )  # fmt: skip
    tl.store(lse_ptr + tl.cast(B, tl.int64) * H * L + position, lse, inside)
    out_a, out_b = add_attention(
        out_a, out_b, q_a, q_b, lse, k, v, mask, mask_column, S, scale * LOG2_E,
        D, DA, DB, BLOCK_CONTEXT, EVEN_CONTEXT, MASKED,
    )  # fmt: skip

    out = out_ptr + b * out_batch + head * out_column + first * out_row
    store_tile(out, out_row, out_column, left, out_a, out_b, D, DA, DB)


@triton.jit
def self_cross_query_gradient(
    qkv_ptr, context_ptr, mask_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dqkv_ptr,
    qkv_batch, qkv_row, qkv_column, context_batch, context_row, context_column, mask_batch, mask_column,
    out_batch, out_row, out_column, grad_batch, grad_row, grad_column, dqkv_batch, dqkv_row, dqkv_column,
    B, H, L, S, scale,
    qkv_tiles, qkv_rest, context_tiles, context_rest,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, EVEN_CONTEXT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, from both softmaxes; leaves both δ for `self_cross_key_gradient`."""
    tile, b, h, row = place(tl.program_id(0), tl.cdiv(L, BLOCK_M), H)
    first = tile.to(tl.int64) * BLOCK_M
    left = L - tile * BLOCK_M
    head, width = h * D, tl.cast(H, tl.int64) * D
    position = row * L + first + tl.arange(0, BLOCK_M)
    inside = tl.arange(0, BLOCK_M) < left
    context_position = tl.cast(B, tl.int64) * H * L + position

    out = out_ptr + b * out_batch + head * out_column + first * out_row
    grad = grad_ptr + b * grad_batch + head * grad_column + first * grad_row
    out_a, out_b = load_tile(out, out_row, out_column, left, D, DA, DB, BLOCK_M, False)
    grad_a, grad_b = load_tile(grad, grad_row, grad_column, left, D, DA, DB, BLOCK_M, False)
    delta = sum_of_products(out_a, grad_a)  # of both softmaxes together
    if DB > 0:
        delta += sum_of_products(out_b, grad_b)

    q = qkv_ptr + b * qkv_batch + head * qkv_column
    q_a, q_b = load_tile(q + first * qkv_row, qkv_row, qkv_column, left, D, DA, DB, BLOCK_M, False)
    dq_a, dq_b = zero_tile(BLOCK_M, DA, DB)

    k = context_ptr + b * context_batch + head * context_column
    v = k + width * context_column
    k = head_of(k, context_row, context_column, b, h, context_tiles, context_rest)
    v = head_of(v, context_row, context_column, b, H + h, context_tiles, context_rest)
    mask = mask_ptr
    if MASKED:
        mask += b * mask_batch
    lse = tl.load(lse_ptr + context_position, inside, other=float("inf"))
    context_delta = output_dot_grad(
        q_a, q_b, grad_a, grad_b, lse, k, v, mask, mask_column, S, scale * LOG2_E,
        D, DA, DB, BLOCK_M, BLOCK_N, EVEN_CONTEXT, MASKED,
    )  # fmt: skip
    dq_a, dq_b = add_query_gradient(
        dq_a, dq_b, q_a, q_b, grad_a, grad_b, lse, context_delta, k, v, mask, mask_column, S, scale * LOG2_E,
        D, DA, DB, BLOCK_N, EVEN_CONTEXT, MASKED,
    )  # fmt: skip
    delta -= context_delta
    tl.store(delta_ptr + position, delta, inside)
    tl.store(delta_ptr + context_position, context_delta, inside)

    k = q + width * qkv_column
    v = k + width * qkv_column
    k = head_of(k, qkv_row, qkv_column, b, H + h, qkv_tiles, qkv_rest)
    v = head_of(v, qkv_row, qkv_column, b, 2 * H + h, qkv_tiles, qkv_rest)
    lse = tl.load(lse_ptr + position, inside, other=float("inf"))
    dq_a, dq_b = add_query_gradient(
        dq_a, dq_b, q_a, q_b, grad_a, grad_b, lse, delta, k, v, mask_ptr, mask_column, L, scale * LOG2_E,
        D, DA, DB, BLOCK_N, EVEN, False,
    )  # fmt: skip
    dq = dqkv_ptr + b * dqkv_batch + head * dqkv_column + first * dqkv_row
    store_tile(dq, dqkv_row, dqkv_column, left, dq_a * scale, dq_b * scale, D, DA, DB)


@triton.jit
def key_tile_gradient(
    k_ptr, dk_ptr, q_ptr, grad_ptr, mask_ptr, lse_ptr, delta_ptr, row, column, d_row, d_column, q_row, q_column,
    grad_row, grad_column, mask_column, tile, keys, L, width, scale,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of either softmax; v lies `width` channels after k, dv after dk."""
    first = tile.to(tl.int64) * BLOCK_N
    left = keys - tile * BLOCK_N
    exists = attended_keys(mask_ptr, mask_column, tile * BLOCK_N, keys, BLOCK_N, MASKED)
    k = k_ptr + first * row
    k_a, k_b = load_tile(k, row, column, left, D, DA, DB, BLOCK_N, False)
    v_a, v_b = load_tile(k + width * column, row, column, left, D, DA, DB, BLOCK_N, False)
    dk_a, dk_b, dv_a, dv_b = key_gradients(
        k_a, k_b, v_a, v_b, exists, q_ptr, grad_ptr, lse_ptr, delta_ptr, q_row, q_column, grad_row, grad_column,
        L, scale * LOG2_E, D, DA, DB, BLOCK_M, BLOCK_N, EVEN, MASKED,
    )  # fmt: skip
    dk = dk_ptr + first * d_row
    store_tile(dk, d_row, d_column, left, dk_a * scale, dk_b * scale, D, DA, DB)
    store_tile(dk + width * d_column, d_row, d_column, left, dv_a, dv_b, D, DA, DB)


@triton.jit
def self_cross_key_gradient(
    qkv_ptr, context_ptr, mask_ptr, grad_ptr, lse_ptr, delta_ptr, dqkv_ptr, dcontext_ptr,
    qkv_batch, qkv_row, qkv_column, context_batch, context_row, context_column, mask_batch, mask_column,
    grad_batch, grad_row, grad_column, dqkv_batch, dqkv_row, dqkv_column, dcontext_batch, dcontext_row,
    dcontext_column, B, H, L, S, scale,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys: the first cdiv(L, BLOCK_N) tiles of a head are the image's, the others the
    context's. EVEN: BLOCK_M divides L."""
    own_tiles = tl.cdiv(L, BLOCK_N)
    tile, b, h, row = place(tl.program_id(0), own_tiles + tl.cdiv(S, BLOCK_N), H)
    head, width = h * D, tl.cast(H, tl.int64) * D
    q = qkv_ptr + b * qkv_batch + head * qkv_column
    grad = grad_ptr + b * grad_batch + head * grad_column
    lse = lse_ptr + row * L
    delta = delta_ptr + row * L
    if tile < own_tiles:
        dk = dqkv_ptr + b * dqkv_batch + (width + head) * dqkv_column
        key_tile_gradient(
            q + width * qkv_column, dk, q, grad, mask_ptr, lse, delta, qkv_row, qkv_column, dqkv_row, dqkv_column,
            qkv_row, qkv_column, grad_row, grad_column, mask_column, tile, L, L, width, scale,
            D, DA, DB, BLOCK_M, BLOCK_N, EVEN, False,
        )  # fmt: skip
    else:
        k = context_ptr + b * context_batch + head * context_column
        dk = dcontext_ptr + b * dcontext_batch + head * dcontext_column
        mask = mask_ptr
        if MASKED:
            mask += b * mask_batch
        second = tl.cast(B, tl.int64) * H * L
        key_tile_gradient(
            k, dk, q, grad, mask, lse + second, delta + second, context_row, context_column, dcontext_row,
            dcontext_column, qkv_row, qkv_column, grad_row, grad_column, mask_column, tile - own_tiles, S, L, width,
            scale, D, DA, DB, BLOCK_M, BLOCK_N, EVEN, MASKED,
        )  # fmt: skip
