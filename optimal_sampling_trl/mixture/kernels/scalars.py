"""The scalars of dense records on a GPU, those of `mixture.dense`, all at once.

With log p, log r and log q of a row in bits, each scalar is a sum over the vocabulary. Two launches read the logits:

1. `scan` finds each distribution's normaliser, and the largest logits of groups of tokens for `likeliest`.
2. `sum_scalars` sums all scalars at once.

q is read from the mixed logits that the sampler draws from, so that both forms, a grammar and rows without a solution
are what was drawn from. The sums are float32 in a thread and a chunk, and joined in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import (
    CHUNK_SLOTS,
    LN_2,
    LOG2_E,
    LOWEST,
    NOWHERE,
    SCALAR_SLOTS,
    TOTAL_MIXED,
    TOTAL_TEACHER,
    TOTAL_THETA,
)
from .sums import fold_endings, is_last, load_tile, store_sums, take


@triton.jit
def scan(
    theta, teacher, mixed, theta_stride, teacher_stride, mixed_stride, rows, temperature, temperature_stride, endings,
    V, chunk, chunks, parts, maxima, model_stride,
    FOLDED: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Store the normalisers of one chunk of a row, and each thread's largest logit of both models.

    `rows` are the rows to measure; None is all. `mixed` is None where no scalar is asked for, and `maxima` where no
    likely token is. The tokens that lie in one thread are a group, whose largest logit is never below `LOWEST`. A
    group beyond V has -inf.
    """
    row, piece = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    source = source_of(rows, row)
    theta += source * theta_stride
    teacher += source * teacher_stride
    part = parts + (row * chunks + piece) * CHUNK_SLOTS
    folded = fold_endings(teacher, endings, V, FOLDED)
    bits = inverse_temperature(temperature, source * temperature_stride) * LOG2_E
    nothing, zero = tl.full((OUTER,), NOWHERE, tl.float32), tl.zeros((OUTER,), tl.float32)
    top_theta, top_teacher, top_mixed = nothing, nothing, nothing
    total_theta, total_teacher, total_mixed = zero, zero, zero
    first = piece * chunk
    for start in range(first, tl.minimum(first + chunk, V), OUTER * INNER):
        s, t, index = load_tile(theta, teacher, endings, folded, start, V, FOLDED, OUTER, INNER)
        top_theta, total_theta = _accumulate(s, top_theta, total_theta, bits)
        top_teacher, total_teacher = _accumulate(t, top_teacher, total_teacher, bits)
        if mixed is not None:
            x = tl.load(mixed + source * mixed_stride + index, mask=index < V, other=NOWHERE).to(tl.float32)
            top_mixed, total_mixed = _accumulate(x, top_mixed, total_mixed, bits)
    _store_total(part + TOTAL_THETA, top_theta, total_theta, bits)
    _store_total(part + TOTAL_TEACHER, top_teacher, total_teacher, bits)
    if mixed is not None:
        _store_total(part + TOTAL_MIXED, top_mixed, total_mixed, bits)
    if maxima is not None:
        thread = tl.arange(0, OUTER)
        group = maxima + (row * chunks + piece) * OUTER + thread
        holds = first + thread * INNER < V
        tl.store(group, tl.where(holds, tl.maximum(top_theta, LOWEST), NOWHERE))
        tl.store(group + model_stride, tl.where(holds, tl.maximum(top_teacher, LOWEST), NOWHERE))


@triton.jit
def source_of(rows, row):
    """Return the row of the logits that is measured as the row of this number; the same where `rows` is None."""
    source = row
    if rows is not None:
        source = tl.load(rows + row).to(tl.int64)
    return source


@triton.jit
def inverse_temperature(temperature, place):
    """Return 1 / temperature of a row in float32; 1 where `temperature` is None."""
    inverse = tl.full((), 1.0, tl.float32)
    if temperature is not None:
        inverse = (1.0 / tl.load(temperature + place).to(tl.float64)).to(tl.float32)
    return inverse


@triton.jit
def _accumulate(x, top, total, bits):
    """Take a tile into the largest logit and Σ 2^((x - top)·bits) of each thread."""
    new = tl.maximum(top, tl.max(x, 1))
    safe = tl.where(new == NOWHERE, 0.0, new)
    return new, total * tl.exp2((top - safe) * bits) + tl.sum(tl.exp2((x - safe[:, None]) * bits), 1)


@triton.jit
def _store_total(slot, top, total, bits):
    """Store the largest logit of a chunk, and behind it the sum relative to that."""
    highest = tl.max(top)
    safe = tl.where(highest == NOWHERE, 0.0, highest)
    tl.store(slot, highest)
    tl.store(slot + 1, tl.sum(total * tl.exp2((top - safe) * bits)))


@triton.jit
def normaliser(parts, slot, chunks, bits):
    """Return a row's largest logit, and log2 Σ 2^((x - largest)·bits); a broken row has no finite pair."""
    tops = take(parts, slot, chunks, NOWHERE)
    top = tl.max(tops)
    top = tl.where(top == NOWHERE, 0.0, top)
    total = tl.sum(take(parts, slot + 1, chunks, 0.0) * tl.exp((tops - top) * bits * LN_2))
    return top.to(tl.float32), (tl.log(total) * LOG2_E).to(tl.float32)


@triton.jit
def sum_scalars(
    theta, teacher, mixed, theta_stride, teacher_stride, mixed_stride, rows, temperature, temperature_stride, endings,
    V, chunk, chunks, parts, arrived, out,
    FOLDED: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Sum the scalars over one chunk of a row; the last program of the row writes them to `out` (N, SCALAR_SLOTS)."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # what was read last is still in the cache
    row, piece = (program // chunks).to(tl.int64), program % chunks
    source = source_of(rows, row)
    theta += source * theta_stride
    teacher += source * teacher_stride
    mixed += source * mixed_stride
    parts += row * chunks * CHUNK_SLOTS
    folded = fold_endings(teacher, endings, V, FOLDED)
    bits = inverse_temperature(temperature, source * temperature_stride) * LOG2_E
    top_theta, sum_theta = normaliser(parts, TOTAL_THETA, chunks, bits)
    top_teacher, sum_teacher = normaliser(parts, TOTAL_TEACHER, chunks, bits)
    top_mixed, sum_mixed = normaliser(parts, TOTAL_MIXED, chunks, bits)
    theta_teacher = tl.zeros((OUTER,), tl.float32)
    teacher_theta, q_theta, q_teacher = theta_teacher, theta_teacher, theta_teacher
    entropy_theta, entropy_teacher, overlap = theta_teacher, theta_teacher, theta_teacher
    for start in range(piece * chunk, tl.minimum(piece * chunk + chunk, V), OUTER * INNER):
        s, t, index = load_tile(theta, teacher, endings, folded, start, V, FOLDED, OUTER, INNER)
        x = tl.load(mixed + index, mask=index < V, other=NOWHERE).to(tl.float32)
        log_p = (s - top_theta) * bits - sum_theta
        log_r = (t - top_teacher) * bits - sum_teacher
        log_q = (x - top_mixed) * bits - sum_mixed
        p, r, q = tl.exp2(log_p), tl.exp2(log_r), tl.exp2(log_q)
        theta_teacher += tl.sum(_divergence(p, log_p, log_r), 1)
        teacher_theta += tl.sum(_divergence(r, log_r, log_p), 1)
        q_theta += tl.sum(_divergence(q, log_q, log_p), 1)
        q_teacher += tl.sum(_divergence(q, log_q, log_r), 1)
        entropy_theta -= tl.sum(tl.where(log_p == NOWHERE, 0.0, p * log_p), 1)
        entropy_teacher -= tl.sum(tl.where(log_r == NOWHERE, 0.0, r * log_r), 1)
        overlap += tl.sum(tl.where(p < q, p, q) + 0.0 * p, 1)  # NaN where either is
    store_sums(
        parts + piece * CHUNK_SLOTS,
        theta_teacher, teacher_theta, q_theta, q_teacher, entropy_theta, entropy_teacher, overlap,
        overlap, overlap, overlap, overlap, overlap, overlap, SCALAR_SLOTS,  # unused
    )  # fmt: skip
    if is_last(arrived + row, chunks):
        out += row * SCALAR_SLOTS
        for slot in tl.static_range(SCALAR_SLOTS - 1):
            value = tl.sum(take(parts, slot, chunks, 0.0)) * LN_2
            tl.store(out + slot, tl.where(value < 0, 0.0, value).to(tl.float32))
        tl.store(out + SCALAR_SLOTS - 1, tl.sum(take(parts, SCALAR_SLOTS - 1, chunks, 0.0)).to(tl.float32))


@triton.jit
def _divergence(p, log_p, log_r):
    """Return the terms of KL(p‖r) in bits: 0 where p has no mass, +inf where r alone has none."""
    term = tl.where(log_r == NOWHERE, float("inf"), p * (log_p - log_r))
    return tl.where(log_p == NOWHERE, 0.0, term)
