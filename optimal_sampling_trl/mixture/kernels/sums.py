"""Reading the logits of a row tile by tile, summing over them, and joining the sums of its chunks: for all kernels.

A row is cut into chunks. A program reads one chunk as tiles of OUTER × INNER logits, where the INNER logits lie in one
thread. It stores its sums in `CHUNK_SLOTS` numbers; the last program of the row to arrive joins those of all chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import CHUNK_SLOTS, LANES, NOWHERE


@triton.jit
def fold_endings(teacher, endings, V, FOLDED: tl.constexpr):
    """Return the teacher's logit of the student's ending with the mass of `FOLDED` endings of the teacher added.

    `endings` holds the student's ending, then the teacher's.
    """
    value = 0.0
    if FOLDED > 0:
        index = tl.arange(0, 128)
        ids = tl.load(endings + index, mask=index <= FOLDED, other=V)
        values = tl.load(teacher + ids, mask=ids < V, other=NOWHERE).to(tl.float32)
        top = tl.max(values)
        safe = tl.where(top == NOWHERE, 0.0, top)
        value = safe + tl.log(tl.sum(tl.exp(values - safe)))
    return value


@triton.jit
def load_tile(
    theta, teacher, endings, folded, start, V, FOLDED: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr
):
    """Return the raw logits of a tile from `start` on, -inf beyond V, and their index; all (OUTER, INNER), float32.

    `folded` is what `fold_endings` returned. A sum over the inner axis stays in a thread.
    """
    index = start + tl.arange(0, OUTER)[:, None] * INNER + tl.arange(0, INNER)[None, :]
    s = tl.load(theta + index, mask=index < V, other=NOWHERE).to(tl.float32)
    t = tl.load(teacher + index, mask=index < V, other=NOWHERE).to(tl.float32)
    if FOLDED > 0:
        for i in tl.static_range(FOLDED):
            t = tl.where(index == tl.load(endings + 1 + i), NOWHERE, t)
        t = tl.where(index == tl.load(endings), folded, t)
    return s, t, index


@triton.jit
def growth(weights, grown, z):
    """Return grown - weights, where grown = weights·2^z: by the series of 2^z - 1 where z is small."""
    series = z * (0.6931471806 + z * (0.2402265070 + z * (0.0555041087 + z * (0.0096181291 + z * 0.0013333558))))
    return tl.where(tl.abs(z) < 0.18, weights * series, grown - weights)


@triton.jit
def store_sums(
    chunk, slot_0, slot_1, slot_2, slot_3, slot_4, slot_5, slot_6, slot_7, slot_8, slot_9, slot_10, slot_11, slot_12,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """Sum each of the vectors (OUTER,) over the threads and store the first `SLOTS` sums, all in one exchange.

    `tl.join` puts its two operands on a new last axis, so that the slots stand in the order of their bits reversed.
    """
    zero = slot_0 * 0.0
    even = tl.join(
        tl.join(tl.join(slot_0, slot_8), tl.join(slot_4, slot_12)),
        tl.join(tl.join(slot_2, slot_10), tl.join(slot_6, zero)),
    )
    odd = tl.join(
        tl.join(tl.join(slot_1, slot_9), tl.join(slot_5, zero)),
        tl.join(tl.join(slot_3, slot_11), tl.join(slot_7, zero)),
    )
    slot = tl.arange(0, CHUNK_SLOTS)
    tl.store(chunk + slot, tl.reshape(tl.sum(tl.join(even, odd), 0), (CHUNK_SLOTS,)), mask=slot < SLOTS)


@triton.jit
def is_last(counter, programs):
    """Return true in the last program of a row to arrive here, which then sees what the others have stored."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") >= programs - 1


@triton.jit
def take(parts, slot, chunks, other: tl.constexpr):
    """Return a slot of each chunk (LANES,) as float64, and `other` in the lanes beyond the row's chunks.

    It reads past the first-level cache, which the stores of other programs do not reach.
    """
    lane = tl.arange(0, LANES)
    return tl.load(parts + lane * CHUNK_SLOTS + slot, mask=lane < chunks, other=other, cache_modifier=".cg").to(
        tl.float64
    )


@triton.jit
def log1p(x):
    """Return log(1 + x) of float64, exact for small x (Kahan's form, in which the rounding of 1 + x cancels)."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * x / tl.where(y == 1.0, 1.0, y - 1.0))


@triton.jit
def log_quotient(difference, below, log_above, log_below):
    """Return log(above / below) from difference = above - below where the two are near, else from their logarithms."""
    return tl.where(tl.abs(difference) < below / 2, log1p(difference / below), log_above - log_below)
