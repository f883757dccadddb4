"""The first launch: the sums of each row at p = 0, ½ and 1, and from them α, or a first guess of it.

The logits s and t are over temperature and shifted so that each row's largest is 0; x = t - s on the tokens that both
models have, and S_k(p) = Σ x^k e^((1-p)s + pt) over them. K = log S_0 has the slope E_p[x] and the curvature Var_p[x].
At the three nodes the terms are products of e^(s/2) and e^(t/2), so that two exponentials a token give all sums. K and
its derivatives are known there, and a method's equation is a cubic between the nodes, whose root is the guess. Where
the cubic is exact enough the guess stands, and the row is done; `steps` refines the others.

A row whose α is known before it is read (`fixed`, or alpha_min = alpha_max) and a row of the methods `entropy` and
`entropy_gate` sum Σe^u and Σue^u of each model instead, which give its normaliser and its entropy. A row of
`top_k_swap` does, too, and sums what the student has outside of S.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .average import guess_average
from .layout import (
    ARITHMETIC_TRUST_REGION,
    CHUNK_SLOTS,
    ENTROPY,
    ENTROPY_GATE,
    ENTROPY_TEACHER,
    ENTROPY_THETA,
    ESS_BALANCE,
    FORM_ARITHMETIC,
    KL_SYMMETRY,
    LN_2,
    LOG2_E,
    NODE_GROWTH,
    NODE_HALF,
    NODE_MAX_BOTH,
    NODE_MAX_TEACHER,
    NODE_MAX_THETA,
    NODE_ONLY_TEACHER,
    NODE_ONLY_THETA,
    NODE_TEACHER,
    NODE_THETA,
    NOWHERE,
    ROW_ALPHA,
    ROW_ALPHA_MAX,
    ROW_ALPHA_MIN,
    ROW_ARITHMETIC,
    ROW_BOUND,
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
    SAME,
    TOP_K_SWAP,
    TRUST_REGION,
)
from .sums import fold_endings, growth, is_last, load_tile, log1p, log_quotient, store_sums, take
from .swap import is_likely


@triton.jit
def begin(
    theta, teacher, theta_stride, teacher_stride, endings, V, chunk, chunks, method, alpha_min, alpha_max, fixed_alpha,
    epsilon, form, entropy_scale, bound, temperature, method_stride, alpha_min_stride, alpha_max_stride,
    fixed_alpha_stride, epsilon_stride, form_stride, entropy_scale_stride, bound_stride, temperature_stride,
    parts, rows, arrived, theta_sum, teacher_sum,
    FOLDED: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Sum one chunk of a row; the last program of the row writes its `ROW_*` slots and the two normalisers.

    `form` is None where every row is geometric, and `bound` where none is of `top_k_swap`.
    """
    row, piece = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    chosen = tl.load(method + row * method_stride).to(tl.int32)
    low = tl.load(alpha_min + row * alpha_min_stride).to(tl.float64)
    high = tl.load(alpha_max + row * alpha_max_stride).to(tl.float64)
    inverse = tl.full((), 1.0, tl.float64)
    if temperature is not None:
        inverse = 1.0 / tl.load(temperature + row * temperature_stride).to(tl.float64)
    root = (low < high) & (chosen < ENTROPY)
    least = tl.full((), 0.0, tl.float32)
    if bound is not None:
        least = tl.load(bound + row * bound_stride).to(tl.float32)
    parts += row * chunks * CHUNK_SLOTS
    _sum_chunk(
        theta + row * theta_stride, teacher + row * teacher_stride, endings, piece * chunk, V, chunk,
        inverse.to(tl.float32), root, least, parts + piece * CHUNK_SLOTS, bound is not None, FOLDED, OUTER, INNER,
    )  # fmt: skip
    if is_last(arrived + row, chunks):
        rows += row * ROW_SLOTS
        budget = tl.load(epsilon + row * epsilon_stride).to(tl.float64)
        fixed = tl.load(fixed_alpha + row * fixed_alpha_stride).to(tl.float64)
        scale = tl.load(entropy_scale + row * entropy_scale_stride).to(tl.float64)
        is_average = False
        if form is not None:
            is_average = tl.load(form + row * form_stride).to(tl.int32) == FORM_ARITHMETIC
            tl.store(rows + ROW_ARITHMETIC, tl.where(is_average, 1.0, 0.0).to(tl.float64))
            chosen = tl.where(is_average & (chosen == TRUST_REGION), ARITHMETIC_TRUST_REGION, chosen)
        tl.store(rows + ROW_METHOD, chosen.to(tl.float64))
        tl.store(rows + ROW_ALPHA_MIN, low)
        tl.store(rows + ROW_ALPHA_MAX, high)
        tl.store(rows + ROW_EPSILON, budget)
        tl.store(rows + ROW_INVERSE_TEMPERATURE, inverse)
        if bound is not None:
            tl.store(rows + ROW_BOUND, least.to(tl.float64))
        _start(
            parts, rows, theta_sum + row, teacher_sum + row, chunks, chosen, low, high, fixed, budget, scale, inverse,
            root, is_average, form is not None, bound is not None,
        )  # fmt: skip


@triton.jit
def _sum_chunk(
    theta, teacher, endings, first, V, chunk, inverse, root, least, part,
    SWAPPED: tl.constexpr, FOLDED: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Store the sums of one chunk, relative to its largest logits: those at the nodes if `root`, else of entropies.

    If `SWAPPED`, beside the latter is what the student has on tokens whose logit under the teacher is below `least`.
    """
    folded = fold_endings(teacher, endings, V, FOLDED)
    last = tl.minimum(first + chunk, V)
    nothing = tl.full((OUTER,), NOWHERE, tl.float32)
    max_theta, max_teacher, max_both = nothing, nothing, nothing
    for start in range(first, last, OUTER * INNER):
        s, t, _ = load_tile(theta, teacher, endings, folded, start, V, FOLDED, OUTER, INNER)
        max_theta = tl.maximum(max_theta, tl.max(s, 1))
        max_teacher = tl.maximum(max_teacher, tl.max(t, 1))
        max_both = tl.maximum(max_both, tl.max(tl.minimum(s, t), 1))
    top_theta, top_teacher = tl.max(max_theta), tl.max(max_teacher)
    tl.store(part + NODE_MAX_THETA, top_theta)
    tl.store(part + NODE_MAX_TEACHER, top_teacher)
    tl.store(part + NODE_MAX_BOTH, tl.max(max_both))
    top_theta = tl.where(top_theta == NOWHERE, 0.0, top_theta)
    top_teacher = tl.where(top_teacher == NOWHERE, 0.0, top_teacher)
    offset = top_teacher - top_theta
    bits = inverse * LOG2_E
    a0 = tl.zeros((OUTER,), tl.float32)
    a1, a2, b0, b1, b2, c0, c1, c2, grown, only_theta, only_teacher = a0, a0, a0, a0, a0, a0, a0, a0, a0, a0, a0
    if root:
        for start in range(first, last, OUTER * INNER):
            s, t, _ = load_tile(theta, teacher, endings, folded, start, V, FOLDED, OUTER, INNER)
            both = tl.minimum(s, t) != NOWHERE
            x = tl.where(both, (t - s - offset) * bits, 0.0)
            a = tl.exp2((s - top_theta) * (bits * 0.5))
            b = tl.exp2((t - top_teacher) * (bits * 0.5))
            only_theta += tl.sum(tl.where(both, 0.0, a * a), 1)
            only_teacher += tl.sum(tl.where(both, 0.0, b * b), 1)
            a, b = tl.where(both, a, 0.0), tl.where(both, b, 0.0)
            ax, bx = a * x, b * x
            a0 += tl.sum(a * a, 1)
            a1 += tl.sum(a * ax, 1)
            a2 += tl.sum(ax * ax, 1)
            b0 += tl.sum(a * b, 1)
            b1 += tl.sum(a * bx, 1)
            b2 += tl.sum(ax * bx, 1)
            c0 += tl.sum(b * b, 1)
            c1 += tl.sum(b * bx, 1)
            c2 += tl.sum(bx * bx, 1)
            grown += tl.sum(growth(a * a, b * b, x), 1)
    else:
        for start in range(first, last, OUTER * INNER):
            s, t, _ = load_tile(theta, teacher, endings, folded, start, V, FOLDED, OUTER, INNER)
            u, v = (s - top_theta) * bits, (t - top_teacher) * bits
            a, b = tl.exp2(u), tl.exp2(v)
            a0 += tl.sum(tl.where(u == 0.0, 1.0, 0.0), 1)
            a1 += tl.sum(tl.where(u == 0.0, 0.0, a), 1)
            a2 += tl.sum(tl.where(u == NOWHERE, 0.0, a * u), 1)
            b0 += tl.sum(tl.where(v == 0.0, 1.0, 0.0), 1)
            b1 += tl.sum(tl.where(v == 0.0, 0.0, b), 1)
            b2 += tl.sum(tl.where(v == NOWHERE, 0.0, b * v), 1)
            if SWAPPED:
                only_theta += tl.sum(tl.where(is_likely(t, least), 0.0, a), 1)
    store_sums(
        part,
        a0, a1, a2,  # NODE_THETA, or ENTROPY_THETA
        b0, b1, b2,  # NODE_HALF, or ENTROPY_TEACHER
        c0, c1, c2,  # NODE_TEACHER
        grown,  # NODE_GROWTH
        only_theta,  # NODE_ONLY_THETA
        only_teacher,  # NODE_ONLY_TEACHER
        a0,  # unused: the largest logits are in the slots behind it
        NODE_MAX_THETA - 1,
    )  # fmt: skip


@triton.jit
def _start(
    parts, rows, theta_sum, teacher_sum, chunks, method, low, high, fixed, epsilon, scale, inverse, root,
    is_average, ARITHMETIC: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """Join the chunks of a row and store its normalisers, its α or a guess of it, and the state of the search."""
    max_theta, max_teacher = (
        take(parts, NODE_MAX_THETA, chunks, NOWHERE),
        take(parts, NODE_MAX_TEACHER, chunks, NOWHERE),
    )
    common = tl.max(take(parts, NODE_MAX_BOTH, chunks, NOWHERE)) > NOWHERE
    top_theta, top_teacher = tl.max(max_theta), tl.max(max_teacher)
    # A chunk without a finite logit has no sums: any finite number will do.
    down = tl.where(max_theta == NOWHERE, 0.0, (max_theta - top_theta) * inverse)
    up = tl.where(max_teacher == NOWHERE, 0.0, (max_teacher - top_teacher) * inverse)
    # Exactly 0 in the chunk of the row's largest logit; `down + shift` may round, as a GPU fuses products and sums.
    entropy_up = up
    # The difference of the largest logits as `_sum_chunk` subtracts it, rounded to float32.
    offset = (top_teacher.to(tl.float32) - top_theta.to(tl.float32)).to(tl.float64)
    shift = ((max_teacher.to(tl.float32) - max_theta.to(tl.float32)).to(tl.float64) - offset) * inverse
    up = tl.where(tl.abs(shift) < float("inf"), down + shift, up)
    middle = (low + high) / 2
    alpha = tl.where(low == high, low, tl.minimum(tl.maximum(fixed, low), high))
    done = alpha == alpha
    if root:
        whole_theta, whole_teacher, alpha, done = _guess(
            parts, rows, down, up, chunks, method, low, high, epsilon, offset, inverse, is_average, ARITHMETIC
        )
    else:
        whole_theta, entropy_theta = _sum_and_entropy(parts, ENTROPY_THETA, down, chunks)
        whole_teacher, entropy_teacher = _sum_and_entropy(parts, ENTROPY_TEACHER, entropy_up, chunks)
        both = entropy_theta + entropy_teacher
        share = tl.where(both > 0, entropy_theta / tl.where(both > 0, both, 1.0), middle)
        if (method == ENTROPY) & (low < high):
            alpha = tl.minimum(tl.maximum(share, low), high)
        if (method == ENTROPY_GATE) & (low < high):
            alpha = tl.minimum(tl.maximum(entropy_theta / scale, low), high)
        if SWAPPED:  # noqa: SIM102  (this one is settled when the kernel is compiled)
            if method == TOP_K_SWAP:
                outside = tl.sum(take(parts, NODE_ONLY_THETA, chunks, 0.0) * tl.exp(down))
                alpha = tl.minimum(outside / whole_theta, high)
    sum_theta, sum_teacher = tl.log(whole_theta) + top_theta * inverse, tl.log(whole_teacher) + top_teacher * inverse
    finite = (tl.abs(sum_theta) < float("inf")) & (tl.abs(sum_teacher) < float("inf"))
    solvable = finite & (common | ((root == 0) & ((alpha == 0) | (alpha == 1))))
    if ARITHMETIC:
        solvable |= finite & is_average
    if SWAPPED:
        solvable |= finite & (method == TOP_K_SWAP)
    tl.store(rows + ROW_ALPHA, tl.where(solvable, alpha, float("nan")))
    tl.store(rows + ROW_DONE, tl.where(done | (solvable == 0), 1.0, 0.0).to(tl.float64))
    tl.store(rows + ROW_TOP_THETA, top_theta)
    tl.store(rows + ROW_BRACKET_LOW, low)
    tl.store(rows + ROW_BRACKET_HIGH, high)
    tl.store(rows + ROW_LAST_STEP, high - low)
    tl.store(rows + ROW_END_UNTRIED, (low * 0 + 1))
    tl.store(theta_sum, sum_theta.to(tl.float32))
    tl.store(teacher_sum, sum_teacher.to(tl.float32))


@triton.jit
def _sum_and_entropy(parts, slot, down, chunks):
    """Return Σe^u of one model's row, relative to its largest logit, and its entropy in nats.

    `down` is each chunk's largest exponent less the row's. The row's largest terms are counted, and log1p takes the
    others: log Σ of a row that is nearly sure of a token is the logarithm of 1 + little.
    """
    count, rest = take(parts, slot, chunks, 0.0), take(parts, slot + 1, chunks, 0.0)
    scale = tl.exp(down)
    number = tl.sum(tl.where(down == 0, count, 0.0))
    others = tl.sum(tl.where(down == 0, rest, (count + rest) * scale))
    mean = tl.sum((take(parts, slot + 2, chunks, 0.0) * LN_2 + down * (count + rest)) * scale) / (number + others)
    return number + others, tl.log(number) + log1p(others / number) - mean


@triton.jit
def _join(parts, slot, scale, shift, chunks):
    """Return S_0, E_p[x] and Var_p[x] of a row at a node.

    `scale` is the logarithm of what each chunk's sums are relative to, `shift` what its x are.
    """
    factor = tl.exp(scale)
    zero, one = take(parts, slot, chunks, 0.0), take(parts, slot + 1, chunks, 0.0) * LN_2
    two = take(parts, slot + 2, chunks, 0.0) * (LN_2 * LN_2)
    s0 = tl.sum(zero * factor)
    mean = tl.sum((one + shift * zero) * factor) / s0
    shift -= mean
    return s0, mean, tl.sum((two + 2 * shift * one + shift * shift * zero) * factor) / s0


@triton.jit
def _guess(
    parts, rows, down, up, chunks, method, low, high, epsilon, offset, inverse, is_average, ARITHMETIC: tl.constexpr
):
    """Return Σe^s and Σe^t of a row, α on the cubics through the nodes, and whether it stands.

    f0, f1 and f2 are the residual of the row's equation at p = 0, ½ and 1, and d0, d1 and d2 its slopes.
    """
    shift = up - down
    s0, m0, v0 = _join(parts, NODE_THETA, down, shift, chunks)
    s1, m1, v1 = _join(parts, NODE_HALF, (down + up) / 2, shift, chunks)
    s2, m2, v2 = _join(parts, NODE_TEACHER, up, shift, chunks)
    at_theta, at_teacher = tl.exp(down), tl.exp(up)
    only_theta = tl.sum(take(parts, NODE_ONLY_THETA, chunks, 0.0) * at_theta)
    only_teacher = tl.sum(take(parts, NODE_ONLY_TEACHER, chunks, 0.0) * at_teacher)
    grown = at_teacher * take(parts, NODE_GROWTH, chunks, 0.0)
    row_growth = tl.sum(grown + (at_teacher - at_theta) * take(parts, NODE_THETA, chunks, 0.0))  # S_0(1) - S_0(0)
    whole_theta, whole_teacher = s0 + only_theta, s2 + only_teacher
    log_theta = tl.log(whole_theta)
    c = log_quotient(row_growth + only_teacher - only_theta, whole_theta, tl.log(whole_teacher), log_theta)
    # From here on K is relative to log Σe^s.
    k0, k1 = tl.log(s0 / whole_theta), tl.log(s1 / whole_theta)
    k2 = log_quotient(row_growth - only_theta, whole_theta, tl.log(s2), log_theta)
    # kl_symmetry; the two others replace it.
    f0, f1, f2, d0, d1, d2 = m0 - c, m1 - c, m2 - c, v0, v1, v2
    flattest = tl.minimum(v0, tl.minimum(v1, v2))
    smooth = tl.abs((m0 + m2) / 2 + (v0 - v2) / 8 - m1) < 1e-4 * flattest
    smooth &= tl.abs(m2 - m0 - (v0 + 4 * v1 + v2) / 6) < 1e-3 * flattest  # a symmetric row passes the first
    stands = (method == KL_SYMMETRY) & smooth  # a quarter of the width divides the cubic's error by 16
    if method == TRUST_REGION:
        f0, f1, f2 = -k0 - epsilon, m1 / 2 - k1 - epsilon, m2 - k2 - epsilon
        d0, d1, d2 = 0.0 * v0, v1 / 2, v2
        stands = (f2 <= 0) & (high == 1)
    if method == ESS_BALANCE:  # on the parabolas of K at 0 and 1, extended
        f0, f1 = k0 - k2 - m2 - v2 / 2 + 2 * c, k0 - k2 - (m0 + m2) / 2 + (v0 - v2) / 8 + 2 * c
        f2 = k0 - k2 - m0 + v0 / 2 + 2 * c
        d0, d1, d2 = m2 - m0 + v2, m2 - m0 + (v0 + v2) / 2, m2 - m0 + v0
    middle = (low + high) / 2
    alpha = tl.minimum(tl.maximum(_root_on_cubics(f0, f1, f2, d0, d1, d2), low), high)
    same = (m2 - m0 < SAME) & (method != TRUST_REGION)
    far = tl.minimum(s0, tl.minimum(s1, s2)) < 1e-15
    alpha = tl.where(same | (alpha != alpha), middle, tl.where(stands & (method == TRUST_REGION), high, alpha))
    # The steps subtract from x its likely value at the root too, so that moments about 0 are nearly central ones.
    centre = tl.where(method == TRUST_REGION, m0, c)
    moved = (offset + tl.where(tl.abs(centre) < float("inf"), centre, 0.0) / inverse).to(tl.float32).to(tl.float64)
    tl.store(rows + ROW_OFFSET, moved)
    tl.store(rows + ROW_C, c - (moved - offset) * inverse)
    tl.store(rows + ROW_SUM_THETA, whole_theta)
    tl.store(rows + ROW_ONLY_THETA, only_theta)
    tl.store(rows + ROW_FAR, tl.where(far | (method == ESS_BALANCE), 1.0, 0.0).to(tl.float64))
    done = same | (stands & (far == 0))
    if ARITHMETIC:
        averaged, averaged_done = guess_average(
            s0 / whole_theta, m0, s2 / whole_teacher, m2, c, only_teacher, low, high, epsilon, method == KL_SYMMETRY
        )
        alpha, done = tl.where(is_average, averaged, alpha), tl.where(is_average, averaged_done, done)
    return whole_theta, whole_teacher, alpha, done


@triton.jit
def _root_on_cubics(f0, f1, f2, d0, d1, d2):
    """Return the root of a rising function on the cubic with its values f and slopes d at 0 and ½, or at ½ and 1."""
    upper = f1 < 0
    start = tl.where(upper, 0.5, 0.0)
    begin, end = tl.where(upper, f1, f0), tl.where(upper, f2, f1)
    slope_begin, slope_end = tl.where(upper, d1, d0), tl.where(upper, d2, d1)
    secant = (end - begin) * 2.0
    r2, r3 = (3 * secant - 2 * slope_begin - slope_end) * 2.0, (slope_begin + slope_end - 2 * secant) * 4.0
    low, high = 0.0 * begin, 0.5 + 0.0 * begin
    for _ in range(22):
        tau = (low + high) / 2
        rising = begin + tau * (slope_begin + tau * (r2 + tau * r3)) < 0
        low, high = tl.where(rising, tau, low), tl.where(rising, high, tau)
    return start + (low + high) / 2
