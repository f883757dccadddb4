"""α of each row of a batch: Newton's method in float64 on the equations that stand at the head of `mixture`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .settings import METHODS, SAME_DIVERGENCE

if TYPE_CHECKING:
    from .settings import MixtureRows

SOLVER_STEPS = 48
"""Most passes of the solver over a row; it needs 4 to 8, and bisection from 1 to 1e-9 would need 30."""
SOLVER_TOLERANCE = 1e-9
"""The solver stops (where it can look without waiting for a device) once no α moves further than this."""


def solve_alpha(
    log_theta: Float[Tensor, "N V"], log_teacher: Float[Tensor, "N V"], rows: MixtureRows
) -> Float[Tensor, " N"]:
    """α of each row; NaN where a row has no solution (see `mix`), never an error on the device."""
    support = torch.isfinite(log_theta) & torch.isfinite(log_teacher)
    log_ratio = torch.where(support, log_teacher - log_theta, 0.0)
    family = _Family(log_theta.masked_fill(~support, -torch.inf), log_ratio)
    middle = (rows.alpha_min + rows.alpha_max) / 2
    alpha = rows.fixed_alpha
    if "entropy" in rows.present:
        theta, teacher = (torch.special.entr(row.exp()).sum(-1) for row in (log_theta, log_teacher))
        share = torch.where(theta + teacher > 0, theta / (theta + teacher), middle)
        alpha = torch.where(rows.method == METHODS.index("entropy"), share, alpha)
    if rows.present & _RESIDUALS.keys():
        alpha = _solve_roots(family, rows, alpha, middle)
    alpha = alpha.clamp(rows.alpha_min, rows.alpha_max)
    alpha = torch.where(rows.alpha_min == rows.alpha_max, rows.alpha_min, alpha)
    return alpha.masked_fill(_unsolvable(log_theta, log_teacher, support, alpha), torch.nan)


def _unsolvable(
    log_theta: Float[Tensor, "N V"],
    log_teacher: Float[Tensor, "N V"],
    support: Bool[Tensor, "N V"],
    alpha: Float[Tensor, " N"],
) -> Bool[Tensor, " N"]:
    broken = log_theta.isnan().any(-1) | log_teacher.isnan().any(-1)
    return broken | (~support.any(-1) & (alpha != 0) & (alpha != 1))


class _Moments(NamedTuple):
    log_sum: Float[Tensor, " N"]
    mean: Float[Tensor, " N"]
    variance: Float[Tensor, " N"]


class _Family(NamedTuple):
    """The exponential family p_s ∝ θ·e^(sℓ) on the common support: q_α is p_α, θ is p_0, t is p_1."""

    log_theta: Float[Tensor, "N V"]
    log_ratio: Float[Tensor, "N V"]

    def moments(self, power: Float[Tensor, " N"] | float) -> _Moments:
        """log Σθe^(sℓ), and the mean and variance of ℓ under p_s, at s = `power`."""
        if isinstance(power, Tensor):
            log_weights = torch.addcmul(self.log_theta, self.log_ratio, power[:, None])
        else:
            log_weights = torch.add(self.log_theta, self.log_ratio, alpha=power)
        top = log_weights.amax(-1, keepdim=True)
        weights = log_weights.sub_(top).exp_()  # in place from here: the solver's time is that of its passes
        total = weights.sum(-1)
        weights.mul_(self.log_ratio)
        mean = weights.sum(-1) / total
        variance = (torch.linalg.vecdot(weights, self.log_ratio) / total - mean.square()).clamp(min=0)
        return _Moments(top[:, 0] + total.log(), mean, variance)


class _Residual(NamedTuple):
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
"""For each equation a function of α that rises through 0 at the solution, and its slope."""


def _solve_roots(family: _Family, rows: MixtureRows, alpha: Tensor, middle: Tensor) -> Float[Tensor, " N"]:
    """The roots of the rows whose method is an equation; the other rows keep their `alpha`."""
    theta, teacher = family.moments(0.0), family.moments(1.0)
    divergence = teacher.mean - theta.mean
    for name in sorted(rows.present & _RESIDUALS.keys()):
        if name == "trust_region":  # KL(q‖θ) = α²Var/2 near 0
            start = torch.sqrt(2 * rows.epsilon / theta.variance)
        else:  # the secant of E_q[ℓ]
            start = -theta.mean / divergence
        start = torch.where(start.isfinite(), start, middle).clamp(rows.alpha_min, rows.alpha_max)
        root = _find_root(_RESIDUALS[name], family, rows, start)
        if name != "trust_region":
            root = torch.where(divergence < SAME_DIVERGENCE, middle, root)
        alpha = torch.where(rows.method == METHODS.index(name), root, alpha)
    return alpha


def _find_root(
    residual: Callable[[_Family, Tensor, Tensor], _Residual], family: _Family, rows: MixtureRows, alpha: Tensor
) -> Float[Tensor, " N"]:
    """Newton's method from `alpha` in the bracket [alpha_min, alpha_max]; bisection where a step does not halve the
    last one. A step beyond an end of the range tries that end, once, which is the answer where the root lies outside:
    bisection would only creep towards it, and α = 1 - 1e-9 has another support than 1. A row that is solved stays
    where it is while others go on: its last step is rounding, which the next need not halve."""
    low, high = rows.alpha_min.clone(), rows.alpha_max.clone()
    last = high - low
    untried = torch.ones_like(low, dtype=torch.bool)
    tolerance = max(SOLVER_TOLERANCE, 4 * torch.finfo(alpha.dtype).eps)  # float32, on Metal, rounds coarser
    for _ in range(SOLVER_STEPS):
        value, slope = residual(family, alpha, rows.epsilon)
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
