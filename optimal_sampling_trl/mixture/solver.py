"""α of each row of a batch: Newton's method in float64 on the equations at the head of `mixture`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .arithmetic import first_alpha, is_unbounded, kl_and_slope, symmetric_alpha
from .settings import SAME_DIVERGENCE, SWAP, MixtureRows
from .swap import swapped_mass

SOLVER_STEPS = 48
"""The most passes over a row. The solver needs 4 to 8; bisection from 1 to 1e-9 would need 30."""
SOLVER_TOLERANCE = 1e-9
"""The solver stops once no α moves further than this. On a GPU it makes every pass, since a look would mean a wait."""


def solve_alpha(
    log_theta: Float[Tensor, "N V"], log_teacher: Float[Tensor, "N V"], rows: MixtureRows
) -> Float[Tensor, " N"]:
    """Solve α in each row.

    Args:
        log_theta: the student's log-probabilities, in the solver's precision.
        log_teacher: the teacher's log-probabilities, likewise.
        rows: how each row's α is chosen.

    Returns:
        α in the solver's precision; NaN in a row without a solution (see `mix`). No row raises an error.
    """
    support = torch.isfinite(log_theta) & torch.isfinite(log_teacher)
    log_ratio = torch.where(support, log_teacher - log_theta, 0.0)
    middle = (rows.alpha_min + rows.alpha_max) / 2
    alpha = rows.fixed_alpha
    if "entropy" in rows.methods("geometric") | rows.methods("arithmetic"):
        theta, teacher = (torch.special.entr(row.exp()).sum(-1) for row in (log_theta, log_teacher))
        share = torch.where(theta + teacher > 0, theta / (theta + teacher), middle)
        alpha = torch.where(rows.are(method="entropy"), share, alpha)
    if "entropy_gate" in rows.methods("geometric") | rows.methods("arithmetic"):
        gate = torch.special.entr(log_theta.exp()).sum(-1) / rows.entropy_scale
        alpha = torch.where(rows.are(method="entropy_gate"), gate, alpha)
    if rows.most_swapped:
        alpha = torch.where(rows.are(method=SWAP), swapped_mass(log_theta, log_teacher, rows), alpha)
    if rows.methods("geometric") & _RESIDUALS.keys():
        family = _Family(log_theta.masked_fill(~support, -torch.inf), log_ratio)
        alpha = _solve_geometric(family, rows, alpha, middle)
    if rows.methods("arithmetic") & _RESIDUALS.keys():
        alpha = _solve_arithmetic(log_theta, log_teacher, log_ratio, rows, alpha, middle)
    alpha = alpha.clamp(rows.alpha_min, rows.alpha_max)
    alpha = torch.where(rows.alpha_min == rows.alpha_max, rows.alpha_min, alpha)
    return alpha.masked_fill(_unsolvable(log_theta, log_teacher, support, rows, alpha), torch.nan)


def _unsolvable(
    log_theta: Float[Tensor, "N V"],
    log_teacher: Float[Tensor, "N V"],
    support: Bool[Tensor, "N V"],
    rows: MixtureRows,
    alpha: Float[Tensor, " N"],
) -> Bool[Tensor, " N"]:
    """Return the rows that have a NaN, or no token with mass under q."""
    broken = log_theta.isnan().any(-1) | log_teacher.isnan().any(-1)
    nowhere = ~support.any(-1) & (alpha != 0) & (alpha != 1)
    return broken | (nowhere & rows.are(form="geometric") & ~rows.are(method=SWAP))


class _Moments(NamedTuple):
    """Hold log Σθe^(sℓ), and the mean and variance of ℓ under p_s, of each row."""

    log_sum: Float[Tensor, " N"]
    mean: Float[Tensor, " N"]
    variance: Float[Tensor, " N"]


class _Family(NamedTuple):
    """The exponential family p_s ∝ θ·e^(sℓ) on the common support: q_α is p_α, θ is p_0, t is p_1."""

    log_theta: Float[Tensor, "N V"]
    log_ratio: Float[Tensor, "N V"]

    def moments(self, power: Float[Tensor, " N"] | float) -> _Moments:
        """Return the moments at s = `power`."""
        if isinstance(power, Tensor):
            log_weights = torch.addcmul(self.log_theta, self.log_ratio, power[:, None])
        else:
            log_weights = torch.add(self.log_theta, self.log_ratio, alpha=power)
        top = log_weights.amax(-1, keepdim=True)
        weights = log_weights.sub_(top).exp_()  # in place from here on: the passes over memory are the solver's time
        total = weights.sum(-1)
        weights.mul_(self.log_ratio)
        mean = weights.sum(-1) / total
        variance = (torch.linalg.vecdot(weights, self.log_ratio) / total - mean.square()).clamp(min=0)
        return _Moments(top[:, 0] + total.log(), mean, variance)


class _Residual(NamedTuple):
    """Hold an equation's residual, a function of α that rises through 0 at the solution, and its slope in α."""

    value: Float[Tensor, " N"]
    slope: Float[Tensor, " N"]


def _kl_symmetry(family: _Family, alpha: Tensor, epsilon: Tensor) -> _Residual:
    _, mean, variance = family.moments(alpha)
    return _Residual(mean, variance)


def _ess_balance(family: _Family, alpha: Tensor, epsilon: Tensor) -> _Residual:
    theta, teacher = family.moments(-alpha), family.moments(2 - alpha)
    return _Residual(theta.log_sum - teacher.log_sum, teacher.mean - theta.mean)


def _trust_region(family: _Family, alpha: Tensor, epsilon: Tensor) -> _Residual:
    log_sum, mean, variance = family.moments(alpha)
    return _Residual(alpha * mean - log_sum - epsilon, alpha * variance)


_RESIDUALS: dict[str, Callable[[_Family, Tensor, Tensor], _Residual]] = {
    "kl_symmetry": _kl_symmetry,
    "ess_balance": _ess_balance,
    "trust_region": _trust_region,
}
"""The methods that are an equation, and the residual of each in the geometric form."""


def _solve_geometric(family: _Family, rows: MixtureRows, alpha: Tensor, middle: Tensor) -> Float[Tensor, " N"]:
    """Return the roots of the geometric rows whose method is an equation, and `alpha` of the other rows."""
    theta, teacher = family.moments(0.0), family.moments(1.0)
    divergence = teacher.mean - theta.mean
    for name in sorted(rows.methods("geometric") & _RESIDUALS.keys()):
        if name == "trust_region":  # KL(q‖θ) = α²Var/2 near 0
            start = torch.sqrt(2 * rows.epsilon / theta.variance)
        else:  # the secant of E_q[ℓ]
            start = -theta.mean / divergence
        start = torch.where(start.isfinite(), start, middle).clamp(rows.alpha_min, rows.alpha_max)
        root = _find_root(partial(_RESIDUALS[name], family), rows, start)
        if name != "trust_region":
            root = torch.where(divergence < SAME_DIVERGENCE, middle, root)
        alpha = torch.where(rows.are(form="geometric", method=name), root, alpha)
    return alpha


def _solve_arithmetic(
    log_theta: Float[Tensor, "N V"],
    log_teacher: Float[Tensor, "N V"],
    log_ratio: Float[Tensor, "N V"],
    rows: MixtureRows,
    alpha: Tensor,
    middle: Tensor,
) -> Float[Tensor, " N"]:
    """Return the roots of the arithmetic rows whose method is an equation, and `alpha` of the other rows."""
    if "kl_symmetry" in rows.methods("arithmetic"):
        root, jeffreys = symmetric_alpha(log_theta, log_teacher, log_ratio)
        root = torch.where(jeffreys < SAME_DIVERGENCE, middle, root)
        alpha = torch.where(rows.are(form="arithmetic", method="kl_symmetry"), root, alpha)
    if "trust_region" in rows.methods("arithmetic"):
        start = first_alpha(log_theta, log_teacher, rows.epsilon)
        start = torch.where(start.isfinite(), start, middle).clamp(rows.alpha_min, rows.alpha_max)
        root = _find_root(partial(_power_residual, log_theta, log_teacher), rows, start)
        root = torch.where(is_unbounded(log_theta, log_teacher), rows.alpha_min, root)
        alpha = torch.where(rows.are(form="arithmetic", method="trust_region"), root, alpha)
    return alpha


def _power_residual(log_theta: Tensor, log_teacher: Tensor, alpha: Tensor, epsilon: Tensor) -> _Residual:
    """Return KL(q‖θ) - ε of the arithmetic form, and the slope of the secant to where a power of α would reach ε.

    KL is nearly a power of α, with an exponent αKL'/KL that falls from 2 at α = 0 and is not below 1. Between models
    that are equal up to rounding KL is 0, or just below. There the exponent's range and a positive KL send α to the
    end of its range.
    """
    value, slope = kl_and_slope(log_theta, log_teacher, alpha)
    positive = value.clamp(min=torch.finfo(value.dtype).tiny)
    exponent = (alpha * slope / positive).clamp(1, 2)
    target = alpha * (epsilon / positive) ** (1 / exponent)
    return _Residual(value - epsilon, (value - epsilon) / (alpha - target))


def _find_root(
    residual: Callable[[Tensor, Tensor], _Residual], rows: MixtureRows, alpha: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Find the root in [alpha_min, alpha_max] by Newton's method from `alpha`.

    A step that does not halve the last one is replaced by a bisection of the bracket. The first step beyond an end of
    the range tries that end, which is the answer where the root lies outside: bisection would only creep towards it,
    and α = 1 - 1e-9 has another support than α = 1. A solved row does not move while others go on: steps below the
    tolerance are accepted, though rounding need not halve from one to the next.
    """
    low, high = rows.alpha_min.clone(), rows.alpha_max.clone()
    last = high - low
    untried = torch.ones_like(low, dtype=torch.bool)
    tolerance = max(SOLVER_TOLERANCE, 4 * torch.finfo(alpha.dtype).eps)  # float32, on Metal, rounds coarser
    for _ in range(SOLVER_STEPS):
        value, slope = residual(alpha, rows.epsilon)
        low, high = torch.where(value < 0, alpha, low), torch.where(value > 0, alpha, high)
        newton = torch.clamp(alpha - value / slope, low, high)
        end = untried & ((newton == rows.alpha_min) | (newton == rows.alpha_max))
        accept = end | ((newton - alpha).abs() <= (last / 2).clamp(min=tolerance))
        step = torch.where(value == 0, alpha, torch.where(accept, newton, (low + high) / 2)) - alpha
        untried &= ~end
        alpha, last = alpha + step, step.abs()
        if alpha.device.type == "cpu" and not bool((last > tolerance).any()):
            break
    return alpha
