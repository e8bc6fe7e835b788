"""GroupNormSiLU of what else goes by tiles, in one pass over memory: an experiment, off, as an H100 took 1.3 to 2
times as long for it as for tile_kernels.py (benchmarks/NOTES.md), of which it has the tiles, the partial results and
the arithmetic.

A *unit* is what has to be known before any of it can be written: all tiles of as few channel blocks of one row as hold
whole groups. Every program takes a ticket, and thereby the next tile of the next unit; reduces it, and publishes the
partial results by a release. Then it keeps the tile in its registers until the unit is complete, by acquire, claims
groups of it to combine, and writes the tile. So x is read once and y written once, and in backward x and dy read once.

It cannot hang, however few programs run at once and in whatever order they start:

1. A program has one ticket and publishes its tile before it waits for anything; it waits only if it has seen that all
   tickets of its unit are taken, that is by programs which run already, and each of these will publish.
2. A tile that may not wait is *left*: put on a list, from which those of its unit that do wait, the taker of the last
   ticket always among them, claim tiles once they have written their own, and read them again, out of the cache.
3. A group that others wait for has been claimed by a program that computes it without waiting.

Left are all but the last tiles of a unit larger than what the registers of the whole GPU hold (H100: 33 MB less what
the arithmetic takes): they come from the cache of 50 MB, if they are still there.

Counters are one row of COLUMNS integers a unit, zero before the launch; the row before the first has the tickets.
"""

import triton
import triton.language as tl

from .kernels import elements
from .tile_kernels import (
    channel_statistics,
    combine_group_gradient_sums,
    combine_group_statistics,
    gradients,
    less_pilots,
    store_input_gradients,
    store_transformed,
    tile_elements,
)

COLUMNS = tl.constexpr(8)  # 32 bytes: units do not share a memory sector
PUBLISHED, LEFT, CLAIMED_TILES, CLAIMED_GROUPS, COMBINED = (tl.constexpr(column) for column in range(5))


@triton.jit
def take(counter_ptr):
    """The next number, from 0 on, of those that a counter hands out."""
    return tl.atomic_add(counter_ptr, 1, sem="relaxed")


@triton.jit
def release(counter_ptr, count):
    """Add to a counter, after everything that this program has stored."""
    tl.debug_barrier()  # the addition is one thread's, the stores are those of all
    tl.atomic_add(counter_ptr, count, sem="release")


@triton.jit
def acquire(counter_ptr, count):
    """Wait until a counter has come to `count`; then see everything that was stored before it did."""
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire")
    while seen < count:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def unit_of(ticket, tiles, UNIT_BLOCKS: tl.constexpr):
    """Of a ticket: its unit, and how many tickets a unit has."""
    tickets = tiles * UNIT_BLOCKS
    return ticket // tickets, tickets


@triton.jit
def ticket_position(
    ticket, C, S, tiles, UNIT_BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """As `tile_position`. Nothing is inside of the ticket −1, nor where a row's last unit has blocks, and tickets,
    beyond the channels."""
    channels = tl.where(ticket >= 0, C, 0)
    ticket = tl.maximum(ticket, 0)  # a remainder of −1 is −1, whose channels would be below 0 and so inside
    units = tl.cdiv(tl.cdiv(C, BLOCK_C), UNIT_BLOCKS)  # of a row
    unit, tickets = unit_of(ticket, tiles, UNIT_BLOCKS)
    n = (unit // units).to(tl.int64)
    tile = (ticket % tickets // UNIT_BLOCKS).to(tl.int64)
    block = unit % units * UNIT_BLOCKS + ticket % UNIT_BLOCKS
    c, first_s, i, inside = tile_elements(block, tile, channels, S, BLOCK_C, BLOCK_S)
    return n, tile, c, first_s, i, inside


@triton.jit
def counters_of(counters_ptr, ticket, tiles, UNIT_BLOCKS: tl.constexpr):
    """The counters of a ticket's unit."""
    unit, _ = unit_of(ticket, tiles, UNIT_BLOCKS)
    return counters_ptr + (unit + 1) * COLUMNS


@triton.jit
def publish(counters_ptr, left_ptr, ticket, tiles, UNIT_BLOCKS: tl.constexpr):
    """Publish the partial results of a ticket's tile, which have been stored; → whether to keep the tile and wait."""
    unit, tickets = unit_of(ticket, tiles, UNIT_BLOCKS)
    counters = counters_of(counters_ptr, ticket, tiles, UNIT_BLOCKS)
    keep = tl.atomic_add(counters_ptr, 0, sem="relaxed") >= (unit + 1) * tickets
    if not keep:
        tl.store(left_ptr + unit * tickets + take(counters + LEFT), ticket)
    release(counters + PUBLISHED, 1)
    return keep


@triton.jit
def unit_groups(ticket, C, G, tiles, UNIT_BLOCKS: tl.constexpr, UNIT_GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The first group of a ticket's unit, numbered n·G + g, and how many the unit has."""
    units = tl.cdiv(tl.cdiv(C, BLOCK_C), UNIT_BLOCKS)
    unit, _ = unit_of(ticket, tiles, UNIT_BLOCKS)
    g = unit % units * UNIT_GROUPS
    return unit // units * G + g, tl.minimum(G - g, UNIT_GROUPS)


@triton.jit
def next_left(counters_ptr, left_ptr, ticket, tiles, UNIT_BLOCKS: tl.constexpr):
    """The ticket of a tile of the same unit that is left for this program to write, −1 if none is: the last one left
    first, as it is the likeliest to be in the cache still."""
    unit, tickets = unit_of(ticket, tiles, UNIT_BLOCKS)
    counters = counters_of(counters_ptr, ticket, tiles, UNIT_BLOCKS)
    place = tl.load(counters + LEFT) - 1 - take(counters + CLAIMED_TILES)
    return tl.load(left_ptr + unit * tickets + place, place >= 0, other=-1)


@triton.jit
def read(
    x_ptr, skip_ptr, ticket, C, C_SKIP, S, tiles,
    UNIT_BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """A ticket's tile as it is in memory, [BLOCK_C, BLOCK_S]; 0 for what is not inside."""
    n, _, c, first_s, i, inside = ticket_position(ticket, C, S, tiles, UNIT_BLOCKS, BLOCK_C, BLOCK_S)
    at = elements(x_ptr, skip_ptr, n, c, first_s, i, C, C_SKIP, S, CHANNELS_LAST)
    return tl.load(at, inside, other=0.0)


@triton.jit
def write_forward(
    ticket, x, x_ptr, skip_ptr, y_ptr, mean_ptr, rstd_ptr,
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    G, S, frames, C_SKIP, tiles,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, UNIT_BLOCKS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y of a ticket's tile, of which x is what `read` gave."""
    C = G * CHANNELS
    n, _, c, first_s, i, inside = ticket_position(ticket, C, S, tiles, UNIT_BLOCKS, BLOCK_C, BLOCK_S)
    store_transformed(
        less_pilots(x, x_ptr, skip_ptr, n, c, C, C_SKIP, S, CHANNELS, CHANNELS_LAST),
        y_ptr, mean_ptr, rstd_ptr,
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
        n, c, first_s, i, inside, G, S, frames, CHANNELS, CHANNELS_LAST, SILU,
    )  # fmt: skip


@triton.jit
def write_backward(
    ticket, dy, x, x_ptr, skip_ptr, dx_ptr, dskip_ptr, mean_ptr, rstd_ptr, mean_dz_ptr, mean_dz_xhat_ptr,
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    G, S, frames, C_SKIP, tiles,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, UNIT_BLOCKS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx and dskip of a ticket's tile, of which x and dy are what `read` gave."""
    C = G * CHANNELS
    n, _, c, first_s, i, inside = ticket_position(ticket, C, S, tiles, UNIT_BLOCKS, BLOCK_C, BLOCK_S)
    du, xhat, rstd, gain = gradients(
        dy, less_pilots(x, x_ptr, skip_ptr, n, c, C, C_SKIP, S, CHANNELS, CHANNELS_LAST), mean_ptr, rstd_ptr,
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
        n, c, G, frames, CHANNELS, SILU,
    )  # fmt: skip
    store_input_gradients(
        du, xhat, rstd, gain, dx_ptr, dskip_ptr, mean_dz_ptr, mean_dz_xhat_ptr,
        n, c, first_s, i, inside, G, S, C_SKIP, CHANNELS, CHANNELS_LAST,
    )  # fmt: skip


@triton.jit
def one_pass_forward(
    x_ptr, skip_ptr, y_ptr, mean_ptr, rstd_ptr, means_ptr, deviations_ptr, counters_ptr, left_ptr,
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    G, S, frames, C_SKIP, tiles, eps,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    UNIT_BLOCKS: tl.constexpr, UNIT_GROUPS: tl.constexpr, BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y of one tile, or of none, or of several; mean and rstd of as many groups as the program claims."""
    C = G * CHANNELS
    ticket = take(counters_ptr)
    n, tile, c, _, _, inside = ticket_position(ticket, C, S, tiles, UNIT_BLOCKS, BLOCK_C, BLOCK_S)
    x = read(x_ptr, skip_ptr, ticket, C, C_SKIP, S, tiles, UNIT_BLOCKS, BLOCK_C, BLOCK_S, CHANNELS_LAST)
    mean, deviation = channel_statistics(
        less_pilots(x, x_ptr, skip_ptr, n, c, C, C_SKIP, S, CHANNELS, CHANNELS_LAST), inside, tile, S, BLOCK_S
    )
    out = (n * tiles + tile) * C + c
    tl.store(means_ptr + out, mean, c < C)
    tl.store(deviations_ptr + out, deviation, c < C)

    keep = publish(counters_ptr, left_ptr, ticket, tiles, UNIT_BLOCKS)
    if keep:
        counters = counters_of(counters_ptr, ticket, tiles, UNIT_BLOCKS)
        acquire(counters + PUBLISHED, tiles * UNIT_BLOCKS)
        first, groups = unit_groups(ticket, C, G, tiles, UNIT_BLOCKS, UNIT_GROUPS, BLOCK_C)
        combined = 0
        k = take(counters + CLAIMED_GROUPS)
        while k < groups:
            combine_group_statistics(
                first + k, means_ptr, deviations_ptr, mean_ptr, rstd_ptr, G, S, tiles, eps, CHANNELS, BLOCK_S, BLOCK
            )
            combined += 1
            k = take(counters + CLAIMED_GROUPS)
        release(counters + COMBINED, combined)
        acquire(counters + COMBINED, groups)
    while keep:
        write_forward(
            ticket, x, x_ptr, skip_ptr, y_ptr, mean_ptr, rstd_ptr,
            weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
            G, S, frames, C_SKIP, tiles, CHANNELS, BLOCK_C, BLOCK_S, UNIT_BLOCKS, CHANNELS_LAST, SILU,
        )  # fmt: skip
        ticket = next_left(counters_ptr, left_ptr, ticket, tiles, UNIT_BLOCKS)
        x = read(x_ptr, skip_ptr, ticket, C, C_SKIP, S, tiles, UNIT_BLOCKS, BLOCK_C, BLOCK_S, CHANNELS_LAST)
        keep = ticket >= 0


@triton.jit
def one_pass_backward(
    dy_ptr, x_ptr, skip_ptr, dx_ptr, dskip_ptr, mean_ptr, rstd_ptr, sums_du_ptr, sums_du_xhat_ptr,
    sum_du_ptr, sum_du_xhat_ptr, mean_dz_ptr, mean_dz_xhat_ptr, counters_ptr, left_ptr,
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    G, S, frames, C_SKIP, tiles,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    UNIT_BLOCKS: tl.constexpr, UNIT_GROUPS: tl.constexpr, COMBINE_C: tl.constexpr, COMBINE_T: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx and dskip of one tile, or of none, or of several; the sums of as many groups as the program claims."""
    C = G * CHANNELS
    ticket = take(counters_ptr)
    n, tile, c, _, _, _ = ticket_position(ticket, C, S, tiles, UNIT_BLOCKS, BLOCK_C, BLOCK_S)
    x = read(x_ptr, skip_ptr, ticket, C, C_SKIP, S, tiles, UNIT_BLOCKS, BLOCK_C, BLOCK_S, CHANNELS_LAST)
    dy = read(dy_ptr, None, ticket, C, 0, S, tiles, UNIT_BLOCKS, BLOCK_C, BLOCK_S, CHANNELS_LAST)
    du, xhat, _, _ = gradients(
        dy, less_pilots(x, x_ptr, skip_ptr, n, c, C, C_SKIP, S, CHANNELS, CHANNELS_LAST), mean_ptr, rstd_ptr,
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
        n, c, G, frames, CHANNELS, SILU,
    )  # fmt: skip
    out = (n * tiles + tile) * C + c
    tl.store(sums_du_ptr + out, tl.sum(du, 1, keep_dims=True), c < C)
    tl.store(sums_du_xhat_ptr + out, tl.sum(du * xhat, 1, keep_dims=True), c < C)

    keep = publish(counters_ptr, left_ptr, ticket, tiles, UNIT_BLOCKS)
    if keep:
        counters = counters_of(counters_ptr, ticket, tiles, UNIT_BLOCKS)
        acquire(counters + PUBLISHED, tiles * UNIT_BLOCKS)
        first, groups = unit_groups(ticket, C, G, tiles, UNIT_BLOCKS, UNIT_GROUPS, BLOCK_C)
        combined = 0
        k = take(counters + CLAIMED_GROUPS)
        while k < groups:
            combine_group_gradient_sums(
                first + k,
                sums_du_ptr, sums_du_xhat_ptr, sum_du_ptr, sum_du_xhat_ptr, mean_dz_ptr, mean_dz_xhat_ptr,
                weight_ptr, scale_ptr, scale_stride, G, S, frames, tiles, CHANNELS, COMBINE_C, COMBINE_T,
            )  # fmt: skip
            combined += 1
            k = take(counters + CLAIMED_GROUPS)
        release(counters + COMBINED, combined)
        acquire(counters + COMBINED, groups)
    while keep:
        write_backward(
            ticket, dy, x, x_ptr, skip_ptr, dx_ptr, dskip_ptr, mean_ptr, rstd_ptr, mean_dz_ptr, mean_dz_xhat_ptr,
            weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
            G, S, frames, C_SKIP, tiles, CHANNELS, BLOCK_C, BLOCK_S, UNIT_BLOCKS, CHANNELS_LAST, SILU,
        )  # fmt: skip
        ticket = next_left(counters_ptr, left_ptr, ticket, tiles, UNIT_BLOCKS)
        x = read(x_ptr, skip_ptr, ticket, C, C_SKIP, S, tiles, UNIT_BLOCKS, BLOCK_C, BLOCK_S, CHANNELS_LAST)
        dy = read(dy_ptr, None, ticket, C, 0, S, tiles, UNIT_BLOCKS, BLOCK_C, BLOCK_S, CHANNELS_LAST)
        keep = ticket >= 0
