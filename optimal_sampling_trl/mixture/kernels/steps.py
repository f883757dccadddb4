"""The launches that refine α: the moments of each row at its α, and a step of third order in a bracket.

The logits s and t are over temperature and shifted so that each row's largest is 0; x = t - s less an offset, on the
tokens that both models have, and S_k(p) = Σ x^k e^((1-p)s + pt) over them. `kl_symmetry` reads the sums at q = α, the
other two equations at two powers p and q: 0 and α for `trust_region`, -α and 2-α for `ess_balance`. A row is done when
the next order of its step is small; a program whose row is done returns at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..solver import SOLVER_STEPS
from .average import join_divergence, sum_divergence, third_order_growth
from .layout import (
    ARITHMETIC_TRUST_REGION,
    CHUNK_SLOTS,
    ESS_BALANCE,
    KL_SYMMETRY,
    LN_2,
    LOG2_E,
    NOWHERE,
    ROW_ALPHA,
    ROW_ALPHA_MAX,
    ROW_ALPHA_MIN,
    ROW_BRACKET_HIGH,
    ROW_BRACKET_LOW,
    ROW_C,
    ROW_DONE,
    ROW_END_UNTRIED,
    ROW_EPSILON,
    ROW_FAR,
    ROW_INVERSE_TEMPERATURE,
    ROW_LAST_STEP,
    ROW_METHOD,
    ROW_OFFSET,
    ROW_ONLY_THETA,
    ROW_SLOTS,
    ROW_SUM_THETA,
    ROW_TOP_THETA,
    STEP_GROWTH,
    STEP_P,
    STEP_Q,
    STEP_TOP_P,
    STEP_TOP_Q,
    TRUST_REGION,
)
from .sums import fold_endings, growth, is_last, load_tile, log_quotient, store_sums, take

PASSES = tl.constexpr(SOLVER_STEPS)
ALPHA_ERROR = tl.constexpr(2e-5)
"""The error of α, estimated by the next order, below which a row is done."""
VARIATION_ERROR = tl.constexpr(2e-6)
"""A row is also done where a step moves q by less than about this in total variation."""
NEAR_BITS = tl.constexpr(32.0)
"""Sums at p and q whose exponents differ by fewer bits share one scale, so that their difference can be summed."""


@triton.jit
def step(
    theta, teacher, theta_stride, teacher_stride, endings, V, chunk, chunks, parts, rows, arrived, finish,
    ARITHMETIC: tl.constexpr, FOLDED: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Sum one chunk of a row at its α; the last program of the row makes the step.

    If `finish`, that program goes on alone until the row is done, and reads the whole row in every further pass.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # what was read last is still in the cache
    row, piece = (program // chunks).to(tl.int64), program % chunks
    rows += row * ROW_SLOTS
    passes = tl.where(tl.load(rows + ROW_DONE) == 0, 1, 0)
    theta += row * theta_stride
    teacher += row * teacher_stride
    parts += row * chunks * CHUNK_SLOTS
    first, last, programs = piece * chunk, tl.minimum(piece * chunk + chunk, V), chunks
    while passes > 0:
        part = parts + piece * CHUNK_SLOTS
        if ARITHMETIC:
            if tl.load(rows + ROW_METHOD) == ARITHMETIC_TRUST_REGION:
                sum_divergence(theta, teacher, endings, first, last, V, rows, part, FOLDED, OUTER, INNER)
            else:
                _sum_powers(theta, teacher, endings, first, last, V, rows, part, FOLDED, OUTER, INNER)
        else:
            _sum_powers(theta, teacher, endings, first, last, V, rows, part, FOLDED, OUTER, INNER)
        if is_last(arrived + row, chunks):
            done = _advance(parts, programs, rows, ARITHMETIC)
            passes = tl.where(done | (finish == 0) | (passes == PASSES), 0, passes + 1)
            first, last, programs, piece = 0, V, chunks * 0 + 1, piece * 0
            tl.debug_barrier()
        else:
            passes = 0


@triton.jit
def _sum_powers(
    theta, teacher, endings, first, last, V, rows, part,
    FOLDED: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Store S_0 to S_3 of the logits from `first` to `last` at q, and at p with S_0(q) - S_0(p) where p is read."""
    folded = fold_endings(teacher, endings, V, FOLDED)
    method, alpha = tl.load(rows + ROW_METHOD), tl.load(rows + ROW_ALPHA).to(tl.float32)
    p = tl.where(method == ESS_BALANCE, -alpha, 0.0)
    q = tl.where(method == ESS_BALANCE, 2 - alpha, alpha)
    top_theta = tl.load(rows + ROW_TOP_THETA).to(tl.float32)
    offset = tl.load(rows + ROW_OFFSET).to(tl.float32)
    bits = (tl.load(rows + ROW_INVERSE_TEMPERATURE) * LOG2_E).to(tl.float32)
    top_p, top_q = 0.0, 0.0
    if tl.load(rows + ROW_FAR) != 0:  # the exponents may be above 0, or all far below
        tops_p, tops_q = tl.full((OUTER,), NOWHERE, tl.float32), tl.full((OUTER,), NOWHERE, tl.float32)
        for start in range(first, last, OUTER * INNER):
            s, t, _ = load_tile(theta, teacher, endings, folded, start, V, FOLDED, OUTER, INNER)
            both = tl.minimum(s, t) != NOWHERE
            u, x = (s - top_theta) * bits, (t - s - offset) * bits
            tops_p = tl.maximum(tops_p, tl.max(tl.where(both, u + p * x, NOWHERE), 1))
            tops_q = tl.maximum(tops_q, tl.max(tl.where(both, u + q * x, NOWHERE), 1))
        top_p, top_q = tl.max(tops_p), tl.max(tops_q)
        if tl.abs(top_p - top_q) < NEAR_BITS:
            top_p = tl.maximum(top_p, top_q)
            top_q = top_p
    tl.store(part + STEP_TOP_P, top_p)
    tl.store(part + STEP_TOP_Q, top_q)
    # The sums of a chunk without a common token are 0, whatever they are relative to.
    top_p, top_q = tl.where(top_p == NOWHERE, 0.0, top_p), tl.where(top_q == NOWHERE, 0.0, top_q)
    a0 = tl.zeros((OUTER,), tl.float32)
    a1, a2, a3, b0, b1, b2, b3, grown = a0, a0, a0, a0, a0, a0, a0, a0
    for start in range(first, last, OUTER * INNER):
        s, t, _ = load_tile(theta, teacher, endings, folded, start, V, FOLDED, OUTER, INNER)
        both = tl.minimum(s, t) != NOWHERE
        u = tl.where(both, (s - top_theta) * bits, NOWHERE)
        x = tl.where(both, (t - s - offset) * bits, 0.0)
        b = tl.exp2(u + q * x - top_q)
        b0 += tl.sum(b, 1)
        bx = b * x
        b1 += tl.sum(bx, 1)
        bxx = bx * x
        b2 += tl.sum(bxx, 1)
        b3 += tl.sum(bxx * x, 1)
        if method != KL_SYMMETRY:
            a = tl.exp2(u + p * x - top_p)
            grown += tl.sum(growth(a, b, (q - p) * x), 1)
            a0 += tl.sum(a, 1)
            ax = a * x
            a1 += tl.sum(ax, 1)
            axx = ax * x
            a2 += tl.sum(axx, 1)
            a3 += tl.sum(axx * x, 1)
    store_sums(
        part,
        a0, a1, a2, a3,  # STEP_P
        b0, b1, b2, b3,  # STEP_Q
        grown,  # STEP_GROWTH
        a0, a0, a0, a0, STEP_TOP_P,  # unused up to the tops
    )  # fmt: skip


@triton.jit
def _moments(parts, slot, tops, chunks):
    """Return log S_0, mean, variance and third central moment of x, and a bound of its fourth cumulant's size.

    The bound comes from the moments below it; third²/variance is the fourth moment of two masses. `tops` is what each
    chunk's sums are relative to, in bits.
    """
    top = tl.max(tops)
    factor = tl.exp((tops - top) * LN_2)
    s0 = tl.sum(take(parts, slot, chunks, 0.0) * factor)
    mean = tl.sum(take(parts, slot + 1, chunks, 0.0) * factor) / s0 * LN_2
    square = tl.sum(take(parts, slot + 2, chunks, 0.0) * factor) / s0 * (LN_2 * LN_2)
    cube = tl.sum(take(parts, slot + 3, chunks, 0.0) * factor) / s0 * (LN_2 * LN_2 * LN_2)
    variance, third = square - mean * mean, cube - 3 * mean * square + 2 * mean * mean * mean
    variance = tl.where(variance > 1e-5 * mean * mean, variance, float("nan"))  # the rounding of float32
    fourth = third * third / variance + 3 * variance * variance
    return tl.log(s0) + top * LN_2, mean, variance, third, fourth


@triton.jit
def _join_growth(parts, tops_p, tops_q, base, chunks):
    """Return S_0(q) - S_0(p) of a row, relative to 2^base."""
    scale_p, scale_q = tl.exp((tops_p - base) * LN_2), tl.exp((tops_q - base) * LN_2)
    subtracted = take(parts, STEP_Q, chunks, 0.0) * scale_q - take(parts, STEP_P, chunks, 0.0) * scale_p
    return tl.sum(tl.where(tops_p == tops_q, take(parts, STEP_GROWTH, chunks, 0.0) * scale_p, subtracted))


@triton.jit
def _advance(parts, chunks, rows, ARITHMETIC: tl.constexpr):
    """Make a step of a row from its sums, and return whether the row is done."""
    alpha, method = tl.load(rows + ROW_ALPHA), tl.load(rows + ROW_METHOD)
    low, high, c = tl.load(rows + ROW_ALPHA_MIN), tl.load(rows + ROW_ALPHA_MAX), tl.load(rows + ROW_C)
    tops_p, tops_q = take(parts, STEP_TOP_P, chunks, NOWHERE), take(parts, STEP_TOP_Q, chunks, NOWHERE)
    log_s0, mean, variance, third, fourth = _moments(parts, STEP_Q, tops_q, chunks)
    value, slope, bend, next_order = mean - c, variance, third, fourth
    if method != KL_SYMMETRY:
        if method == TRUST_REGION:
            whole = tl.load(rows + ROW_SUM_THETA)
            difference = _join_growth(parts, tops_p, tops_q, 0.0, chunks) - tl.load(rows + ROW_ONLY_THETA)
            divergence = alpha * mean - log_quotient(difference, whole, log_s0, tl.log(whole))
            value = divergence - tl.load(rows + ROW_EPSILON)
            slope, bend = alpha * variance, variance + alpha * third
            next_order = 2 * tl.abs(third) + alpha * fourth
        else:
            log_p, mean_p, variance_p, _, fourth_p = _moments(parts, STEP_P, tops_p, chunks)
            top = tl.max(tops_p)
            difference, sum_p = _join_growth(parts, tops_p, tops_q, top, chunks), tl.exp(log_p - top * LN_2)
            value = 2 * c - log_quotient(difference, sum_p, log_s0, log_p)
            slope, bend, next_order = mean - mean_p, variance_p - variance, fourth + fourth_p
            variance = tl.maximum(variance, variance_p)
    if ARITHMETIC:  # noqa: SIM102  (this one is settled when the kernel is compiled)
        if method == ARITHMETIC_TRUST_REGION:
            value, slope, bend, next_order = join_divergence(parts, chunks)
            value -= tl.load(rows + ROW_EPSILON)
            variance = 0.0 * alpha + 1.0  # Δα moves q by no more than |Δα| in total variation
    bracket_low = tl.where(value < 0, alpha, tl.load(rows + ROW_BRACKET_LOW))
    bracket_high = tl.where(value > 0, alpha, tl.load(rows + ROW_BRACKET_HIGH))
    # The root of value + slope·δ + bend·δ²/2 that is nearer to 0, in the form that does not cancel.
    steepness = slope * slope - 2 * value * bend
    root_slope = tl.sqrt(tl.maximum(steepness, 0.0))  # Newton's step where the parabola has no root
    delta = -2 * value / (slope + tl.where(steepness > 0, root_slope, slope))
    target, untried = alpha + delta, tl.load(rows + ROW_END_UNTRIED)
    end = (untried != 0) & (((bracket_low == low) & (target <= low)) | ((bracket_high == high) & (target >= high)))
    inside = (target > bracket_low) & (target < bracket_high)
    accept = end | (inside & (tl.abs(delta) <= tl.load(rows + ROW_LAST_STEP) / 2))
    target = tl.minimum(tl.maximum(target, low), high)
    error = tl.abs(delta * delta * delta) * next_order / (6 * tl.minimum(slope, root_slope))
    if ARITHMETIC:  # noqa: SIM102
        if method == ARITHMETIC_TRUST_REGION:
            error *= third_order_growth(alpha, target)
    certain = (error < tl.maximum(ALPHA_ERROR, tl.abs(alpha + delta - target) / 4)) | (
        tl.abs(delta) * tl.sqrt(tl.maximum(variance, 0.0)) < VARIATION_ERROR
    )
    outside = (value == 0) | ((alpha == low) & (value > 0)) | ((alpha == high) & (value < 0))
    done = (accept & certain) | outside | (bracket_high - bracket_low < ALPHA_ERROR)
    target = tl.where(outside, alpha, tl.where(accept, target, (bracket_low + bracket_high) / 2))
    tl.debug_barrier()  # slower warps still read what is replaced here
    tl.store(rows + ROW_ALPHA, target)
    tl.store(rows + ROW_DONE, tl.where(done, 1.0, 0.0).to(tl.float64))
    tl.store(rows + ROW_BRACKET_LOW, bracket_low)
    tl.store(rows + ROW_BRACKET_HIGH, bracket_high)
    tl.store(rows + ROW_LAST_STEP, tl.abs(target - alpha))
    tl.store(rows + ROW_END_UNTRIED, tl.where(end, 0.0, untried))
    return done
