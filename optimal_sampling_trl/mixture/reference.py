"""The oracle: the mixture in float64, one row at a time, by bisection on the equations at the head of `mixture`.

The solver and the kernels are tested against it, so it shares no line with them. From this package it imports only the
settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .settings import SAME_DIVERGENCE, Mixture


def reference(
    theta_logits: Float[Tensor, "N V_theta"],
    teacher_logits: Float[Tensor, "N V_teacher"],
    mixture: Mixture | Iterable[Mixture],
    temperature: float = 1.0,
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
    """Return what `mix` must return, in float64: bisection to 1e-12 on the defining equation of each row.

    Args:
        theta_logits: the student's raw logits; -inf where a token is masked.
        teacher_logits: the teacher's raw logits.
        mixture: one for all rows, or one for each.
        temperature: above 0; acts on both models before α is solved.

    Returns:
        alpha: (N,) float64; NaN in a row without a solution.
        log_q: (N, V) float64, normalised; NaN throughout a row without a solution.
    """
    V = min(theta_logits.shape[-1], teacher_logits.shape[-1])
    mixtures = [mixture] * len(theta_logits) if isinstance(mixture, Mixture) else list(mixture)
    solved = [
        _reference_row(
            torch.log_softmax(theta[:V].double() / temperature, -1),
            torch.log_softmax(teacher[:V].double() / temperature, -1),
            row_mixture,
        )
        for theta, teacher, row_mixture in zip(theta_logits, teacher_logits, mixtures, strict=True)
    ]
    alpha = torch.tensor([row[0] for row in solved], dtype=torch.float64)
    log_q = torch.stack([row[1] for row in solved]) if solved else torch.zeros(0, V, dtype=torch.float64)
    return alpha, log_q


def reference_dense(
    theta_logits: Float[Tensor, "N V_theta"],
    teacher_logits: Float[Tensor, "N V_teacher"],
    mixture: Mixture | Iterable[Mixture],
    temperature: float = 1.0,
) -> dict[str, Float[Tensor, " N"]]:
    """Return each of `dense.SCALARS` of each row by its definition, in float64, at the α of `reference`."""
    V = min(theta_logits.shape[-1], teacher_logits.shape[-1])
    log_q = reference(theta_logits, teacher_logits, mixture, temperature)[1]
    rows = []
    for theta, teacher, q in zip(theta_logits, teacher_logits, log_q, strict=True):
        log_theta, log_teacher = (torch.log_softmax(row[:V].double() / temperature, -1) for row in (theta, teacher))
        rows.append(
            {
                "kl_theta_teacher": _kl_of_supports(log_theta, log_teacher),
                "kl_teacher_theta": _kl_of_supports(log_teacher, log_theta),
                "kl_q_theta": _kl_of_supports(q, log_theta),
                "kl_q_teacher": _kl_of_supports(q, log_teacher),
                "entropy_theta": float(torch.special.entr(log_theta.exp()).sum()),
                "entropy_teacher": float(torch.special.entr(log_teacher.exp()).sum()),
                "overlap": float(torch.minimum(log_theta.exp(), q.exp()).sum()),
            }
        )
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in (rows[0] if rows else ())}


def _kl_of_supports(log_p: Float[Tensor, " V"], log_other: Float[Tensor, " V"]) -> float:
    """Return KL(p‖other) where p may lack tokens, and infinity where it has one that the other lacks."""
    has = log_p != -torch.inf
    return float("inf") if bool((log_other[has] == -torch.inf).any()) else _kl(log_p[has], log_other[has])


def _reference_row(
    log_theta: Float[Tensor, " V"], log_teacher: Float[Tensor, " V"], mixture: Mixture
) -> tuple[float, Float[Tensor, " V"]]:
    if log_theta.isnan().any() or log_teacher.isnan().any():
        return float("nan"), torch.full_like(log_theta, torch.nan)
    if mixture.method == "top_k_swap":
        return _swapped(log_theta, log_teacher, mixture.swap_top_k)
    alpha = _reference_alpha(log_theta, log_teacher, mixture)
    if alpha == 0.0:
        return 0.0, log_theta
    if alpha == 1.0:
        return 1.0, log_teacher
    log_q = _log_mixture(log_theta, log_teacher, alpha, mixture.form)
    return (float("nan") if log_q.isnan().any() else alpha), log_q


def _swapped(
    log_theta: Float[Tensor, " V"], log_teacher: Float[Tensor, " V"], K: int
) -> tuple[float, Float[Tensor, " V"]]:
    """Return the probability that a token of the student is swapped, and log q.

    A token is kept where the teacher has it and fewer than K tokens are likelier.
    """
    likelier = torch.searchsorted(log_teacher.neg().sort().values, log_teacher.neg())
    kept = (likelier < K) & (log_teacher > -torch.inf)
    swapped = min(math.fsum(log_theta[~kept].exp().tolist()), 1.0)
    log_drawn = log_teacher + (math.log(swapped) if swapped > 0 else -math.inf)
    return swapped, torch.where(kept, torch.logaddexp(log_theta, log_drawn), log_drawn)


def _log_mixture(
    log_theta: Float[Tensor, " V"], log_teacher: Float[Tensor, " V"], alpha: float, form: str
) -> Float[Tensor, " V"]:
    """Return log q at an α between 0 and 1; NaN throughout where no token has mass under q."""
    if form == "arithmetic":
        return torch.logaddexp(math.log(1 - alpha) + log_theta, math.log(alpha) + log_teacher)
    return torch.log_softmax((1 - alpha) * log_theta + alpha * log_teacher, -1)


def _reference_alpha(log_theta: Float[Tensor, " V"], log_teacher: Float[Tensor, " V"], mixture: Mixture) -> float:
    low, high = mixture.alpha_min, mixture.alpha_max
    if low == high:
        return low
    if mixture.method == "fixed":
        return mixture.fixed_alpha
    if mixture.method == "entropy":
        entropy_theta, entropy_teacher = (float(torch.special.entr(p.exp()).sum()) for p in (log_theta, log_teacher))
        total = entropy_theta + entropy_teacher
        return min(max(entropy_theta / total, low), high) if total > 0 else (low + high) / 2
    if mixture.method == "entropy_gate":
        entropy = -sum(p * log_p for p, log_p in zip(log_theta.exp().tolist(), log_theta.tolist()) if p > 0)
        return min(max(entropy / mixture.entropy_scale, low), high)
    both = torch.isfinite(log_theta) & torch.isfinite(log_teacher)
    if mixture.form == "arithmetic":
        return _arithmetic_root(log_theta, log_teacher, both, mixture)
    return _geometric_root(log_theta[both], log_teacher[both], mixture)


def _geometric_root(theta: Float[Tensor, " U"], teacher: Float[Tensor, " U"], mixture: Mixture) -> float:
    """Return α of a row whose method is an equation; both models on the U tokens with mass under both."""
    if not len(theta):
        return float("nan")

    def too_large(alpha: float) -> bool:
        log_q = torch.log_softmax((1 - alpha) * theta + alpha * teacher, -1)
        if mixture.method == "kl_symmetry":
            return _kl(log_q, theta) > _kl(log_q, teacher)
        if mixture.method == "ess_balance":
            return float(torch.logsumexp(2 * theta - log_q, -1) - torch.logsumexp(2 * teacher - log_q, -1)) > 0
        return _kl(log_q, theta) > mixture.epsilon

    p, r, ratio = theta.softmax(-1), teacher.softmax(-1), teacher - theta
    if mixture.method != "trust_region" and float((r * ratio).sum() - (p * ratio).sum()) < SAME_DIVERGENCE:
        return (mixture.alpha_min + mixture.alpha_max) / 2
    return _bisect(too_large, mixture.alpha_min, mixture.alpha_max)


def _arithmetic_root(
    log_theta: Float[Tensor, " V"], log_teacher: Float[Tensor, " V"], both: Bool[Tensor, " V"], mixture: Mixture
) -> float:
    """Return α of a row whose method is an equation; `both` are the tokens with mass under both models."""
    theta, teacher, ratio = log_theta.exp()[both], log_teacher.exp()[both], (log_teacher - log_theta)[both]
    if mixture.method == "kl_symmetry":
        if float(((teacher - theta) * ratio).sum()) < SAME_DIVERGENCE:
            return (mixture.alpha_min + mixture.alpha_max) / 2
        return _bisect(
            lambda alpha: float((((1 - alpha) * theta + alpha * teacher) * ratio).sum()) > 0,
            mixture.alpha_min,
            mixture.alpha_max,
        )
    known = log_theta > -torch.inf
    if bool((log_teacher[~known] > -torch.inf).any()):  # KL(q‖θ) is infinite at any α > 0
        return mixture.alpha_min

    def too_large(alpha: float) -> bool:
        q = (1 - alpha) * log_theta.exp()[known] + alpha * log_teacher.exp()[known]
        return _kl(q[q > 0].log(), log_theta[known][q > 0]) > mixture.epsilon

    return _bisect(too_large, mixture.alpha_min, mixture.alpha_max)


def _kl(log_p: Float[Tensor, " U"], log_other: Float[Tensor, " U"]) -> float:
    return float((log_p.exp() * (log_p - log_other)).sum())


def _bisect(too_large: Callable[[float], bool], low: float, high: float) -> float:
    """Return where a condition that holds above its root begins to hold, or the end of the range nearest to it."""
    if too_large(low):
        return low
    if not too_large(high):
        return high
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (low, middle) if too_large(middle) else (middle, high)
    return (low + high) / 2
