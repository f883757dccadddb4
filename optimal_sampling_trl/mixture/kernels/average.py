"""The arithmetic form, q = (1-α)θ + αt: what its rows need in each of the launches.

`kl_symmetry` has a closed form in sums that the first launch has. `trust_region` is the root of KL(q‖θ) - ε in α,
whose derivatives `steps` takes from here. With w = q/θ = 1 - α + αe^ℓ, over the tokens that the student has,

    KL(q‖θ) = Σ θ(w log w - w + 1),

and its derivatives in α are Σ (t-θ) log w, Σ (t-θ)²/q and -Σ (t-θ)³/q². The terms of KL are not negative. They are
summed by a series where w is near 1, as float32 would lose them otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import (
    LN_2,
    LOG2_E,
    NOWHERE,
    ROW_ALPHA,
    ROW_C,
    ROW_INVERSE_TEMPERATURE,
    ROW_OFFSET,
    ROW_SUM_THETA,
    ROW_TOP_THETA,
    SAME,
    STEP_BEND,
    STEP_KL,
    STEP_SLOPE,
    STEP_THIRD,
    STEP_TOP_P,
)
from .sums import fold_endings, growth, load_tile, store_sums, take


@triton.jit
def guess_average(share_theta, m0, share_teacher, m2, c, only_teacher, low, high, epsilon, is_symmetric):
    """Return α of a row, or a guess of it, and whether it is final.

    The arguments come from `nodes._guess`: the share of each model's mass on the tokens that both have, and its E[x]
    over them. So over them Eθ[ℓ] = share_theta·(m0 - c), and Et[ℓ] = share_teacher·(m2 - c) = KL(t‖θ).
    """
    of_theta = tl.where(share_theta > 0, share_theta * (m0 - c), 0.0)
    of_teacher = tl.where(share_teacher > 0, share_teacher * (m2 - c), 0.0)
    jeffreys, middle = of_teacher - of_theta, (low + high) / 2
    symmetric = tl.where(jeffreys < SAME, middle, -of_theta / tl.where(jeffreys < SAME, 1.0, jeffreys))
    # KL(q‖θ) rises from 0 to KL(t‖θ), where its slope is the Jeffreys divergence: about as a power of α.
    part = tl.minimum(epsilon / tl.where(of_teacher > 0, of_teacher, 1.0), 1.0)
    bent = tl.exp(
        tl.log(tl.maximum(part, 1e-300)) * tl.minimum(of_teacher / tl.where(jeffreys > 0, jeffreys, 1.0), 1.0)
    )
    is_within, is_unbounded = of_teacher <= epsilon, only_teacher > 0
    region = tl.where(is_unbounded, low, tl.where(is_within, high, tl.where(epsilon > 0, bent, 0.0)))
    alpha = tl.minimum(tl.maximum(tl.where(is_symmetric, symmetric, region), low), high)
    return alpha, is_symmetric | is_unbounded | is_within


@triton.jit
def sum_divergence(
    theta, teacher, endings, first, last, V, rows, part,
    FOLDED: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Store KL(q‖θ) and its derivatives in α over the logits from `first` to `last`."""
    folded = fold_endings(teacher, endings, V, FOLDED)
    alpha = tl.load(rows + ROW_ALPHA).to(tl.float32)
    top_theta = tl.load(rows + ROW_TOP_THETA).to(tl.float32)
    offset = tl.load(rows + ROW_OFFSET).to(tl.float32)
    bits = (tl.load(rows + ROW_INVERSE_TEMPERATURE) * LOG2_E).to(tl.float32)
    c = (tl.load(rows + ROW_C) * LOG2_E).to(tl.float32)
    log_sum = (tl.log(tl.load(rows + ROW_SUM_THETA)) * LOG2_E).to(tl.float32)
    kl = tl.zeros((OUTER,), tl.float32)
    slope, bend, third = kl, kl, kl
    for start in range(first, last, OUTER * INNER):
        s, t, _ = load_tile(theta, teacher, endings, folded, start, V, FOLDED, OUTER, INNER)
        known, both = s != NOWHERE, tl.minimum(s, t) != NOWHERE
        log_p = tl.where(known, (s - top_theta) * bits - log_sum, NOWHERE)
        ratio = tl.where(both, (t - s - offset) * bits - c, NOWHERE)  # ℓ in bits
        p, r = tl.exp2(log_p), tl.exp2(log_p + ratio)  # θ and t
        grown = tl.where(both, growth(p, r, ratio), -p)  # t - θ
        q = p + alpha * grown
        near = ratio < 0.7
        near_ratio = tl.where(near & both, ratio, 0.0)
        relative = growth(1.0 + 0.0 * p, tl.exp2(near_ratio), near_ratio)  # e^ℓ - 1
        excess = alpha * tl.where(both, relative, -1.0)  # w - 1 where it is near 0
        tail = _log1p_tail(excess)
        far = (ratio + tl.log2(alpha + (1 - alpha) * tl.exp2(-tl.maximum(ratio, 0.0)))) * LN_2
        log_w = tl.where(near, excess - excess * excess * tail, far)
        term = tl.where(near, p * excess * excess * (1 - (1 + excess) * tail), q * (log_w - 1) + p)
        safe = tl.where(q > 0, q, 1.0)
        kl += tl.sum(tl.where(q > 0, term, p), 1)
        slope += tl.sum(tl.where(q > 0, grown * log_w, 0.0), 1)
        bent = grown * (grown / safe)
        bend += tl.sum(bent, 1)
        third += tl.sum(tl.abs(bent * (grown / safe)), 1)
    store_sums(
        part,
        kl, slope, bend, third,  # STEP_KL, STEP_SLOPE, STEP_BEND, STEP_THIRD
        kl, kl, kl, kl, kl, kl, kl, kl, kl, STEP_TOP_P,  # unused
    )  # fmt: skip


@triton.jit
def _log1p_tail(w):
    """Return R with log(1 + w) = w - w²R, by its series where |w| is small."""
    series = 0.5 + w * (-1 / 3 + w * (0.25 + w * (-0.2 + w * (1 / 6 + w * (-1 / 7 + w * (0.125 - w / 9))))))
    square = tl.where(tl.abs(w) < 0.1, 1.0, w * w)
    return tl.where(tl.abs(w) < 0.1, series, (w - tl.log(1 + w)) / square)


@triton.jit
def join_divergence(parts, chunks):
    """Return KL(q‖θ) of a row, its first two derivatives in α, and a bound of the third's size."""
    return (
        tl.sum(take(parts, STEP_KL, chunks, 0.0)),
        tl.sum(take(parts, STEP_SLOPE, chunks, 0.0)),
        tl.sum(take(parts, STEP_BEND, chunks, 0.0)),
        tl.sum(take(parts, STEP_THIRD, chunks, 0.0)),
    )


@triton.jit
def third_order_growth(alpha, target):
    """Return how much the third derivative may grow from α to `target`: q falls by no more than α or 1 - α does."""
    low = tl.maximum(tl.minimum(target, 1 - target), 1e-300)
    growth = tl.maximum(alpha / tl.maximum(target, low), (1 - alpha) / tl.maximum(1 - target, low))
    return growth * growth


@triton.jit
def average(s, t, alpha, theta_sum, teacher_sum, inverse):
    """Return T·(log q + (1-α)·log Σe^(s/T) + α·log Σe^(t/T)) of raw logits s and t, which is continuous in α.

    `inverse` is 1/T. α is float32, as it is recorded: where it is near 1, another one would be another mixture.
    """
    exact = alpha.to(tl.float64)
    of_theta = tl.log(1.0 - exact).to(tl.float32) + (s * inverse - theta_sum)
    of_teacher = tl.log(exact).to(tl.float32) + (t * inverse - teacher_sum)
    return log_sum_to_logits(of_theta, of_teacher, alpha, theta_sum, teacher_sum, inverse)


@triton.jit
def log_sum_to_logits(of_theta, of_teacher, alpha, theta_sum, teacher_sum, inverse):
    """Return the raw logits of q from the logarithms of its two terms."""
    top, low = tl.maximum(of_theta, of_teacher), tl.minimum(of_theta, of_teacher)
    log_q = top + tl.log(1.0 + tl.exp(low - tl.where(top == NOWHERE, 0.0, top)))
    return (log_q + ((1 - alpha) * theta_sum + alpha * teacher_sum)) / inverse
