"""The kernels of flash_attention: a program per tile of queries (forward, dq) or of keys (dk, dv) of one head.

The log-sum-exp and δ (output · its gradient, per query) are float32 (B, H, L).
"""

import triton
import triton.language as tl

from .kernels import (
    LOG2_E,
    add_query_gradient,
    attend,
    attended_keys,
    head_of,
    key_gradients,
    load_tile,
    place,
    store_tile,
    sum_of_products,
    zero_tile,
)


@triton.jit
def flash_forward(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, lse_ptr,
    q_batch, q_head, q_row, q_column, k_batch, k_head, k_row, k_column, v_batch, v_head, v_row, v_column,
    mask_batch, mask_column, out_batch, out_head, out_row, out_column, H, L, S, scale,
    k_tiles, k_rest, v_tiles, v_rest,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    tile, b, h, row = place(tl.program_id(0), tl.cdiv(L, BLOCK_M), H)
    first = tile.to(tl.int64) * BLOCK_M
    left = L - tile * BLOCK_M
    q = q_ptr + b * q_batch + h * q_head + first * q_row
    k = head_of(k_ptr + b * k_batch + h * k_head, k_row, k_column, b, h, k_tiles, k_rest)
    v = head_of(v_ptr + b * v_batch + h * v_head, v_row, v_column, b, h, v_tiles, v_rest)
    mask = mask_ptr
    if MASKED:
        mask += b * mask_batch
    q_a, q_b = load_tile(q, q_row, q_column, left, D, DA, DB, BLOCK_M, False)
    out_a, out_b, lse = attend(
        q_a, q_b, k, v, mask, mask_column, S, scale * LOG2_E, D, DA, DB, BLOCK_M, BLOCK_N, EVEN, MASKED
    )  # fmt: skip
    out = out_ptr + b * out_batch + h * out_head + first * out_row
    store_tile(out, out_row, out_column, left, out_a, out_b, D, DA, DB)
    query = tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + row * L + first + query, lse, query < left)


@triton.jit
def flash_query_gradient(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_batch, q_head, q_row, q_column, k_batch, k_head, k_row, k_column, v_batch, v_head, v_row, v_column,
    mask_batch, mask_column, out_batch, out_head, out_row, out_column, grad_batch, grad_head, grad_row, grad_column,
    dq_batch, dq_head, dq_row, dq_column, H, L, S, scale,
    k_tiles, k_rest, v_tiles, v_rest,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries; leaves δ for `flash_key_gradient`."""
    tile, b, h, row = place(tl.program_id(0), tl.cdiv(L, BLOCK_M), H)
    first = tile.to(tl.int64) * BLOCK_M
    left = L - tile * BLOCK_M
    q = q_ptr + b * q_batch + h * q_head + first * q_row
    k = head_of(k_ptr + b * k_batch + h * k_head, k_row, k_column, b, h, k_tiles, k_rest)
    v = head_of(v_ptr + b * v_batch + h * v_head, v_row, v_column, b, h, v_tiles, v_rest)
    out = out_ptr + b * out_batch + h * out_head + first * out_row
    grad = grad_ptr + b * grad_batch + h * grad_head + first * grad_row
    mask = mask_ptr
    if MASKED:
        mask += b * mask_batch
    out_a, out_b = load_tile(out, out_row, out_column, left, D, DA, DB, BLOCK_M, False)
    grad_a, grad_b = load_tile(grad, grad_row, grad_column, left, D, DA, DB, BLOCK_M, False)
    delta = sum_of_products(out_a, grad_a)
    if DB > 0:
        delta += sum_of_products(out_b, grad_b)
    query = tl.arange(0, BLOCK_M)
    position = row * L + first + query
    tl.store(delta_ptr + position, delta, query < left)
    lse = tl.load(lse_ptr + position, query < left, other=float("inf"))
    q_a, q_b = load_tile(q, q_row, q_column, left, D, DA, DB, BLOCK_M, False)
    dq_a, dq_b = zero_tile(BLOCK_M, DA, DB)
    dq_a, dq_b = add_query_gradient(
        dq_a, dq_b, q_a, q_b, grad_a, grad_b, lse, delta, k, v, mask, mask_column, S, scale * LOG2_E,
        D, DA, DB, BLOCK_N, EVEN, MASKED,
    )  # fmt: skip
    dq = dq_ptr + b * dq_batch + h * dq_head + first * dq_row
    store_tile(dq, dq_row, dq_column, left, dq_a * scale, dq_b * scale, D, DA, DB)


@triton.jit
def flash_key_gradient(
    q_ptr, k_ptr, v_ptr, mask_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_batch, q_head, q_row, q_column, k_batch, k_head, k_row, k_column, v_batch, v_head, v_row, v_column,
    mask_batch, mask_column, grad_batch, grad_head, grad_row, grad_column,
    dk_batch, dk_head, dk_row, dk_column, dv_batch, dv_head, dv_row, dv_column, H, L, S, scale,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys."""
    tile, b, h, row = place(tl.program_id(0), tl.cdiv(S, BLOCK_N), H)
    first = tile.to(tl.int64) * BLOCK_N
    left = S - tile * BLOCK_N
    mask = mask_ptr
    if MASKED:
        mask += b * mask_batch
    exists = attended_keys(mask, mask_column, tile * BLOCK_N, S, BLOCK_N, MASKED)
    k = k_ptr + b * k_batch + h * k_head + first * k_row
    v = v_ptr + b * v_batch + h * v_head + first * v_row
    k_a, k_b = load_tile(k, k_row, k_column, left, D, DA, DB, BLOCK_N, False)
    v_a, v_b = load_tile(v, v_row, v_column, left, D, DA, DB, BLOCK_N, False)
    dk_a, dk_b, dv_a, dv_b = key_gradients(
        k_a, k_b, v_a, v_b, exists, q_ptr + b * q_batch + h * q_head, grad_ptr + b * grad_batch + h * grad_head,
        lse_ptr + row * L, delta_ptr + row * L, q_row, q_column, grad_row, grad_column, L, scale * LOG2_E,
        D, DA, DB, BLOCK_M, BLOCK_N, EVEN, MASKED,
    )  # fmt: skip
    dk = dk_ptr + b * dk_batch + h * dk_head + first * dk_row
    dv = dv_ptr + b * dv_batch + h * dv_head + first * dv_row
    store_tile(dk, dk_row, dk_column, left, dk_a * scale, dk_b * scale, D, DA, DB)
    store_tile(dv, dv_row, dv_column, left, dv_a, dv_b, D, DA, DB)
