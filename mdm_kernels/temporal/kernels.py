"""The kernels of temporal_attention: everything of a few positions in registers, one head a program.

A program holds ROWS rows: P = ROWS // T positions of T frames each, row r being frame r % T of position r // T. The
logits of all pairs of rows are made by one matrix product and those between different positions are dropped: at these
sizes the kernel waits for memory, and the superfluous products are free.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def place(L, H, T: tl.constexpr, ROWS: tl.constexpr):
    """Clip and head of a program, and per row its position in the program and in the map, its frame, if it exists.

    Heads run fastest: programs that run together read neighbouring channels.
    """
    P: tl.constexpr = ROWS // T
    program = tl.program_id(0)
    tile = program // H
    tiles = tl.cdiv(L, P)
    row = tl.arange(0, ROWS)
    local = row // T
    position = (tile % tiles) * P + local
    exists = (local < P) & (position < L)
    return (tile // tiles).to(tl.int64), (program % H).to(tl.int64), local, position.to(tl.int64), row % T, exists


@triton.jit
def rotate(x, cos, sin, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Turn the channels (2i, 2i+1) of [ROWS, WIDTH] by the angles of cos, sin [ROWS, WIDTH / 2] → float32."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), [ROWS, WIDTH // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [ROWS, WIDTH])


@triton.jit
def load_angles(cos_ptr, sin_ptr, frame, D: tl.constexpr, WIDTH: tl.constexpr):
    """cos and sin of each row's frame, [ROWS, WIDTH / 2], from contiguous (T, D / 2)."""
    pair = tl.arange(0, WIDTH // 2)
    offset = frame[:, None] * (D // 2) + pair[None, :]
    inside = (pair < D // 2)[None, :]
    return tl.load(cos_ptr + offset, inside, other=1.0), tl.load(sin_ptr + offset, inside, other=0.0)


@triton.jit
def softmax(q, k, local, scale):
    """p [ROWS, ROWS] over the rows of the same position; `scale` in units of log₂."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    s = tl.where(local[:, None] == local[None, :], s, -float("inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p * tl.div_rn(1.0, tl.sum(p, 1))[:, None]


@triton.jit
def temporal_forward(
    qkv_ptr, cos_ptr, sin_ptr, out_ptr,
    qkv_row, qkv_position, qkv_column, out_row, out_position, out_column, H, L, scale,
    T: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    clip, h, local, position, frame, exists = place(L, H, T, ROWS)
    channel = tl.arange(0, WIDTH)
    mask = exists[:, None] & (channel < D)[None, :]
    row = clip * T + frame
    column = h * D + channel
    q_ptr = qkv_ptr + (row * qkv_row + position * qkv_position)[:, None] + (column * qkv_column)[None, :]
    part = tl.cast(H, tl.int64) * D * qkv_column  # from q to k, from k to v
    q = tl.load(q_ptr, mask, other=0.0)
    k = tl.load(q_ptr + part, mask, other=0.0)
    v = tl.load(q_ptr + 2 * part, mask, other=0.0)
    if ROTARY:
        cos, sin = load_angles(cos_ptr, sin_ptr, frame, D, WIDTH)
        q = rotate(q, cos, sin, ROWS, WIDTH).to(v.dtype)
        k = rotate(k, cos, sin, ROWS, WIDTH).to(v.dtype)
    p = softmax(q, k, local, scale * LOG2_E)
    out = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    offset = (row * out_row + position * out_position)[:, None] + (column * out_column)[None, :]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def temporal_backward(
    qkv_ptr, cos_ptr, sin_ptr, grad_ptr, dqkv_ptr,
    qkv_row, qkv_position, qkv_column, grad_row, grad_position, grad_column, dqkv_row, dqkv_position, dqkv_column,
    H, L, scale,
    T: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """The softmax is computed anew: nothing but qkv is kept from the forward pass."""
    clip, h, local, position, frame, exists = place(L, H, T, ROWS)
    channel = tl.arange(0, WIDTH)
    mask = exists[:, None] & (channel < D)[None, :]
    row = clip * T + frame
    column = h * D + channel
    q_ptr = qkv_ptr + (row * qkv_row + position * qkv_position)[:, None] + (column * qkv_column)[None, :]
    part = tl.cast(H, tl.int64) * D * qkv_column
    q = tl.load(q_ptr, mask, other=0.0)
    k = tl.load(q_ptr + part, mask, other=0.0)
    v = tl.load(q_ptr + 2 * part, mask, other=0.0)
    offset = (row * grad_row + position * grad_position)[:, None] + (column * grad_column)[None, :]
    grad = tl.load(grad_ptr + offset, mask, other=0.0)
    if ROTARY:
        cos, sin = load_angles(cos_ptr, sin_ptr, frame, D, WIDTH)
        q = rotate(q, cos, sin, ROWS, WIDTH).to(v.dtype)
        k = rotate(k, cos, sin, ROWS, WIDTH).to(v.dtype)
    p = softmax(q, k, local, scale * LOG2_E)
    dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(v.dtype)
    dq = tl.dot(ds, k, input_precision="ieee")
    dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
    dv = tl.dot(tl.trans(p.to(v.dtype)), grad, input_precision="ieee")
    if ROTARY:
        dq = rotate(dq, cos, -sin, ROWS, WIDTH)
        dk = rotate(dk, cos, -sin, ROWS, WIDTH)
    dq_ptr = dqkv_ptr + (row * dqkv_row + position * dqkv_position)[:, None] + (column * dqkv_column)[None, :]
    part = tl.cast(H, tl.int64) * D * dqkv_column
    tl.store(dq_ptr, dq.to(dqkv_ptr.dtype.element_ty), mask)
    tl.store(dq_ptr + part, dk.to(dqkv_ptr.dtype.element_ty), mask)
    tl.store(dq_ptr + 2 * part, dv.to(dqkv_ptr.dtype.element_ty), mask)
