"""What the attention kernels are made of: the passes of one tile of queries over keys, or of keys over queries.

A head's D channels are held as two tiles, a [ROWS, DA] and b [ROWS, DB], as `launch.split_width` says: 96 channels are
64 + 32, where padding to 128 would waste a third of the matrix work. With DB = 0, b is a second name of a and never
used. Logits are raw products q·k; `scale` is in units of log₂, so that p = 2^(s·scale − log-sum-exp).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def place(tile, tiles, H):
    """Which tile of which sample and head a program serves; samples and heads in int64, as offsets pass 2³¹."""
    row = tile // tiles
    return tile % tiles, (row // H).to(tl.int64), (row % H).to(tl.int64), row.to(tl.int64)


@triton.jit
def load_part(
    base, row_stride, column_stride, rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """[ROWS, WIDTH]: the columns from FIRST of the rows at `base`; 0 beyond `rows` (unless EVEN) and beyond D."""
    row = tl.arange(0, ROWS)
    column = FIRST + tl.arange(0, WIDTH)
    pointers = base + (row.to(tl.int64)[:, None] * row_stride + column[None, :].to(tl.int64) * column_stride)
    if EVEN and FIRST + WIDTH <= D:
        part = tl.load(pointers)
    elif FIRST + WIDTH <= D:
        part = tl.load(pointers, (row < rows)[:, None], other=0.0)
    else:
        part = tl.load(pointers, (row < rows)[:, None] & (column < D)[None, :], other=0.0)
    return part


@triton.jit
def load_tile(
    base, row_stride, column_stride, rows, D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, ROWS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """[ROWS, DA], [ROWS, DB] of the rows at `base`."""
    a = load_part(base, row_stride, column_stride, rows, 0, DA, D, ROWS, EVEN)
    b = a
    if DB > 0:
        b = load_part(base, row_stride, column_stride, rows, DA, DB, D, ROWS, EVEN)
    return a, b


@triton.jit
def head_of(address, row_stride, column_stride, sample, head, tiles, rest):
    """How to read a head's tokens: from the address of the first; or by TMA, if there are descriptors of `tiles`
    [1, 1, ROWS, DA], and of the `rest` [1, 1, ROWS, DB], of a tensor (samples, heads, tokens, D)."""
    x = address, row_stride, column_stride
    if tiles is not None:
        if rest is None:
            rest = tiles  # a second name, as of a
        x = sample.to(tl.int32), head.to(tl.int32), tiles, rest
    return x


@triton.jit
def load_tokens(
    x, start, tokens, D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """[ROWS, DA], [ROWS, DB] of a head's tokens from `start`; 0 beyond the last of them, and beyond D.

    x: what `head_of` gives. EVEN: ROWS divides `tokens`.
    """
    if len(x) == 3:
        base, row_stride, column_stride = x
        base += tl.cast(start, tl.int64) * row_stride
        a, b = load_tile(base, row_stride, column_stride, tokens - start, D, DA, DB, ROWS, EVEN)
    else:
        sample, head, tiles, rest = x
        a = tiles.load([sample, head, start, 0]).reshape([ROWS, DA])
        b = a
        if DB > 0:
            b = rest.load([sample, head, start, DA]).reshape([ROWS, DB])
    return a, b


@triton.jit
def store_part(base, row_stride, column_stride, rows, x, FIRST: tl.constexpr, D: tl.constexpr):
    row = tl.arange(0, x.shape[0])
    column = FIRST + tl.arange(0, x.shape[1])
    pointers = base + (row.to(tl.int64)[:, None] * row_stride + column[None, :].to(tl.int64) * column_stride)
    tl.store(pointers, x.to(base.dtype.element_ty), (row < rows)[:, None] & (column < D)[None, :])


@triton.jit
def store_tile(
    base, row_stride, column_stride, rows, a, b, D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr
):  # fmt: skip
    """Write the `rows` first rows of [ROWS, DA], [ROWS, DB] at `base`."""
    store_part(base, row_stride, column_stride, rows, a, 0, D)
    if DB > 0:
        store_part(base, row_stride, column_stride, rows, b, DA, D)


@triton.jit
def dot_rows(x_a, x_b, y_a, y_b, DB: tl.constexpr):
    """x yᵀ: [M, D], [N, D] → [M, N] in float32."""
    products = tl.dot(x_a, tl.trans(y_a), input_precision="ieee")
    if DB > 0:
        products = tl.dot(x_b, tl.trans(y_b), products, input_precision="ieee")
    return products


@triton.jit
def sum_of_products(x, y):
    """Σ x·y of each row, float32 (rows,). Each product is rounded before it is added: if the compiler made one of the
    two, then threads that hold the same row would differ in its last bit, and chance say which of them is read."""
    return tl.sum(tl.fma(x.to(tl.float32), y.to(tl.float32), tl.zeros(x.shape, tl.float32)), 1)


@triton.jit
def multiply_add(out, x, y):
    """out + x y. Without matrix units float32 products would be added to `out` one after another, each rounded to its
    unit: thousands of queries or keys would add up to several times the error of PyTorch. They get a sum of their own,
    which the compiler would merge into `out` again but for max_num_imprecise_acc."""
    if y.dtype == tl.float32:
        out += tl.dot(x, y, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        out = tl.dot(x, y, out)
    return out


@triton.jit
def add_product(out_a, out_b, weights, y_a, y_b, DB: tl.constexpr):
    """out + weights y: [M, D] + [M, N] [N, D]; the weights are rounded to y's dtype."""
    weights = weights.to(y_a.dtype)
    out_a = multiply_add(out_a, weights, y_a)
    if DB > 0:
        out_b = multiply_add(out_b, weights, y_b)
    return out_a, out_b


@triton.jit
def zero_tile(ROWS: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr):
    """Float32 zeros [ROWS, DA], [ROWS, DB]."""
    a = tl.zeros([ROWS, DA], tl.float32)
    b = a
    if DB > 0:
        b = tl.zeros([ROWS, DB], tl.float32)
    return a, b


@triton.jit
def attended_keys(mask_ptr, mask_stride, start, keys, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK_N]: which of the keys from `start` exist and may be attended to."""
    column = start + tl.arange(0, BLOCK_N)
    exists = column < keys
    if MASKED:
        exists = tl.load(mask_ptr + column.to(tl.int64) * mask_stride, exists, other=0) != 0
    return exists


@triton.jit
def attend(
    q_a, q_b, k, v, mask_ptr, mask_stride, keys, scale,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Softmax over all keys of one tile of queries → the output tile and its log₂-sum-exp [BLOCK_M].

    EVEN: BLOCK_N divides the number of keys. Without any key the output is 0 and the log-sum-exp +inf, which makes
    every p of the backward pass 0.
    """
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)  # running maximum of the raw logits
    total = tl.zeros([BLOCK_M], tl.float32)
    out_a, out_b = zero_tile(BLOCK_M, DA, DB)
    for start in range(0, keys, BLOCK_N):
        k_a, k_b = load_tokens(k, start, keys, D, DA, DB, BLOCK_N, EVEN)
        s = dot_rows(q_a, q_b, k_a, k_b, DB)  # [BLOCK_M, BLOCK_N]
        if MASKED or not EVEN:
            exists = attended_keys(mask_ptr, mask_stride, start, keys, BLOCK_N, MASKED)
            s = tl.where(exists[None, :], s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        pivot = new_top
        if MASKED:
            pivot = tl.where(new_top == -float("inf"), 0.0, new_top)  # no key yet: −inf − (−inf) would be NaN
        p = tl.exp2(s * scale - (pivot * scale)[:, None])
        decay = tl.exp2((top - pivot) * scale)
        total = total * decay + tl.sum(p, 1)
        out_a = out_a * decay[:, None]
        if DB > 0:
            out_b = out_b * decay[:, None]
        v_a, v_b = load_tokens(v, start, keys, D, DA, DB, BLOCK_N, EVEN)
        out_a, out_b = add_product(out_a, out_b, p, v_a, v_b, DB)
        top = new_top
    found = total > 0
    total = tl.where(found, total, 1.0)
    share = tl.where(found, tl.div_rn(1.0, total), 0.0)
    lse = tl.where(found, top * scale + tl.log2(total), float("inf"))
    out_a = out_a * share[:, None]
    if DB > 0:
        out_b = out_b * share[:, None]
    return out_a, out_b, lse


@triton.jit
def probabilities(
    q_a, q_b, k_a, k_b, lse, mask_ptr, mask_stride, start, keys, scale,
    DB: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """p [BLOCK_M, BLOCK_N] of the keys from `start`, from the stored log-sum-exp."""
    p = tl.exp2(dot_rows(q_a, q_b, k_a, k_b, DB) * scale - lse[:, None])
    if MASKED or not EVEN:
        exists = attended_keys(mask_ptr, mask_stride, start, keys, BLOCK_N, MASKED)
        p = tl.where(exists[None, :], p, 0.0)
    return p


@triton.jit
def log_sum_exp(
    q_a, q_b, k, mask_ptr, mask_stride, keys, scale,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """log₂-sum-exp [BLOCK_M] of a tile of queries over all keys; +inf without any key."""
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, keys, BLOCK_N):
        k_a, k_b = load_tokens(k, start, keys, D, DA, DB, BLOCK_N, EVEN)
        s = dot_rows(q_a, q_b, k_a, k_b, DB)  # [BLOCK_M, BLOCK_N]
        if MASKED or not EVEN:
            exists = attended_keys(mask_ptr, mask_stride, start, keys, BLOCK_N, MASKED)
            s = tl.where(exists[None, :], s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        pivot = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp2((top - pivot) * scale) + tl.sum(tl.exp2(s * scale - (pivot * scale)[:, None]), 1)
        top = new_top
    found = total > 0
    return tl.where(found, top * scale + tl.log2(tl.where(found, total, 1.0)), float("inf"))


@triton.jit
def add_attention(
    out_a, out_b, q_a, q_b, lse, k, v, mask_ptr, mask_stride, keys, scale,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """out + p v over all keys, with the log-sum-exp known."""
    for start in range(0, keys, BLOCK_N):
        k_a, k_b = load_tokens(k, start, keys, D, DA, DB, BLOCK_N, EVEN)
        v_a, v_b = load_tokens(v, start, keys, D, DA, DB, BLOCK_N, EVEN)
        p = probabilities(q_a, q_b, k_a, k_b, lse, mask_ptr, mask_stride, start, keys, scale, DB, BLOCK_N, EVEN, MASKED)
        out_a, out_b = add_product(out_a, out_b, p, v_a, v_b, DB)
    return out_a, out_b


@triton.jit
def output_dot_grad(
    q_a, q_b, grad_a, grad_b, lse, k, v, mask_ptr, mask_stride, keys, scale,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """δ [BLOCK_M]: output · its gradient, per query, where that output was not stored: Σ p (grad · v) / Σ p.

    Σ p is 1 up to the rounding of the log-sum-exp, which grows with the logits. Left in, it would keep a query's
    p (grad · v − δ) from adding up to 0, and dq would err by it times the mean of the keys.
    """
    delta = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, keys, BLOCK_N):
        k_a, k_b = load_tokens(k, start, keys, D, DA, DB, BLOCK_N, EVEN)
        v_a, v_b = load_tokens(v, start, keys, D, DA, DB, BLOCK_N, EVEN)
        p = probabilities(q_a, q_b, k_a, k_b, lse, mask_ptr, mask_stride, start, keys, scale, DB, BLOCK_N, EVEN, MASKED)
        delta += sum_of_products(p, dot_rows(grad_a, grad_b, v_a, v_b, DB))
        total += tl.sum(p, 1)
    return delta / tl.where(total > 0, total, 1.0)


@triton.jit
def add_query_gradient(
    dq_a, dq_b, q_a, q_b, grad_a, grad_b, lse, delta, k, v, mask_ptr, mask_stride, keys, scale,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """dq + Σ p (grad · v − δ) k over all keys; the factor of the softmax's scale is left to the caller."""
    for start in range(0, keys, BLOCK_N):
        k_a, k_b = load_tokens(k, start, keys, D, DA, DB, BLOCK_N, EVEN)
        v_a, v_b = load_tokens(v, start, keys, D, DA, DB, BLOCK_N, EVEN)
        p = probabilities(q_a, q_b, k_a, k_b, lse, mask_ptr, mask_stride, start, keys, scale, DB, BLOCK_N, EVEN, MASKED)
        ds = p * (dot_rows(grad_a, grad_b, v_a, v_b, DB) - delta[:, None])
        dq_a, dq_b = add_product(dq_a, dq_b, ds, k_a, k_b, DB)
    return dq_a, dq_b


@triton.jit
def key_gradients(
    k_a, k_b, v_a, v_b, exists, q_ptr, grad_ptr, lse_ptr, delta_ptr, q_row, q_column, grad_row, grad_column,
    queries, scale,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk (without the softmax's scale) and dv of one tile of keys, from all queries. EVEN: BLOCK_M divides them.

    A query beyond the last has log-sum-exp +inf, hence p = 0; rows of keys beyond the last are never stored.
    """
    dk_a, dk_b = zero_tile(BLOCK_N, DA, DB)
    dv_a, dv_b = zero_tile(BLOCK_N, DA, DB)
    for start in range(0, queries, BLOCK_M):
        row = tl.cast(start, tl.int64)
        query = start + tl.arange(0, BLOCK_M)
        q_a, q_b = load_tile(q_ptr + row * q_row, q_row, q_column, queries - start, D, DA, DB, BLOCK_M, EVEN)
        lse = tl.load(lse_ptr + query, query < queries, other=float("inf"))
        p = tl.exp2(dot_rows(k_a, k_b, q_a, q_b, DB) * scale - lse[None, :])  # [BLOCK_N, BLOCK_M]
        if MASKED:
            p = tl.where(exists[:, None], p, 0.0)
        grad_base = grad_ptr + row * grad_row
        grad_a, grad_b = load_tile(grad_base, grad_row, grad_column, queries - start, D, DA, DB, BLOCK_M, EVEN)
        dv_a, dv_b = add_product(dv_a, dv_b, p, grad_a, grad_b, DB)
        delta = tl.load(delta_ptr + query, query < queries, other=0.0)
        ds = p * (dot_rows(v_a, v_b, grad_a, grad_b, DB) - delta[None, :])
        dk_a, dk_b = add_product(dk_a, dk_b, ds, q_a, q_b, DB)
    return dk_a, dk_b, dv_a, dv_b
