"""The mixture of a student and a teacher that rollouts are sampled from, and the weight α that it gives the teacher.

| symbol | name in code  | shape    | meaning                                                                        |
|--------|---------------|----------|--------------------------------------------------------------------------------|
| θ      | `log_theta`   | (N, V)   | the student's distribution at the sampling temperature, as log-probabilities   |
| t      | `log_teacher` | (N, V)   | the teacher's, likewise                                                        |
| ℓ      | `log_ratio`   | (N, V)   | log t − log θ, in nats                                                         |
| α      | `alpha`       | (N,)     | the weight of the teacher, in [alpha_min, alpha_max] ⊆ [0, 1]                  |
| q_α    | `log_q`       | (N, V)   | the mixture: q_α(v) = θ(v)^(1-α) t(v)^α / Z(α)                                 |
| N, V   |               |          | rows to sample; tokens that both vocabularies have                             |

q_α is the exponential family θ(v) e^(αℓ(v)) / Z(α), so that d/dα log Z = E_q[ℓ], which rises in α with slope
Var_q[ℓ] ≥ 0. Each method asks for one α in each row:

- `kl_symmetry`: KL(q‖θ) = KL(q‖t). Since KL(q‖θ) = αE_q[ℓ] − log Z and KL(q‖t) = (α−1)E_q[ℓ] − log Z, this is
  E_q[ℓ] = 0: the minimum of the convex log Z, the Chernoff point of θ and t.
- `ess_balance`: Σθ²/q = Σt²/q, equal effective sample sizes of the weights θ/q and t/q. As the two sums are
  Z·Σθe^(-αℓ) and Z·Σθe^((2-α)ℓ), the difference of their logarithms rises in α.
- `trust_region`: the largest α with KL(q‖θ) ≤ ε, a rising function of α with slope α·Var_q[ℓ]
  (Plyusov et al., "Trust-Region Behavior Blending for On-Policy Distillation", arXiv:2605.31159).
- `entropy`: α = H(θ) / (H(θ) + H(t)), a heuristic: the surer model weighs more.
- `fixed`: α = fixed_alpha.

A root is clamped to [alpha_min, alpha_max]. Where θ and t are the same distribution (their Jeffreys divergence,
E_t[ℓ] − E_θ[ℓ], is below 1e-9 nats, under which α would be rounding noise) every α is a solution of the first two: the
middle of the range is taken. α = 0 is the student alone and α = 1 the teacher alone, exactly. In between, a token
that either model gives no mass has none under q and takes no part in an expectation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .options import check_number, unknown_option

METHODS = ("kl_symmetry", "ess_balance", "trust_region", "entropy", "fixed")
SAME_DIVERGENCE = 1e-9
"""Jeffreys divergence, in nats, below which two rows count as the same distribution."""
SOLVER_STEPS = 48
"""Most passes of the solver over a row; it needs 4 to 8, and bisection from 1 to 1e-9 would need 30."""
SOLVER_TOLERANCE = 1e-9
"""The solver stops (where it can look without waiting for a device) once no α moves further than this."""


@dataclass(frozen=True)
class Mixture:
    """How α is chosen at each token.

    Args:
        method: the equation that α solves, one of `METHODS` (see the head of this module).
        alpha_min: the smallest weight of the teacher, in [0, alpha_max].
        alpha_max: the largest weight of the teacher, in [alpha_min, 1].
        fixed_alpha: α of the method `fixed`; no other method reads it.
        epsilon: the budget KL(q‖θ) ≤ ε of the method `trust_region`, in nats a token; no other method reads it.

    Raises:
        ValueError: on a method that does not exist or a number outside of its range.
    """

    method: str = "kl_symmetry"
    alpha_min: float = 0.0
    alpha_max: float = 1.0
    fixed_alpha: float = 0.5
    epsilon: float = 0.05

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(unknown_option("mixture method", self.method, METHODS))
        for name in ("alpha_min", "alpha_max", "fixed_alpha"):
            check_number("Mixture", name, getattr(self, name), 0.0, 1.0)
        check_number("Mixture", "epsilon", self.epsilon, 0.0)
        if self.alpha_min > self.alpha_max:
            raise ValueError(
                f"Mixture: `alpha_min` is {self.alpha_min} and `alpha_max` is {self.alpha_max}; "
                "wanted alpha_min <= alpha_max. Lower the first or raise the second."
            )
        if self.method == "fixed" and not self.alpha_min <= self.fixed_alpha <= self.alpha_max:
            raise ValueError(
                f"Mixture: `fixed_alpha` is {self.fixed_alpha}, outside of [alpha_min, alpha_max] = "
                f"[{self.alpha_min}, {self.alpha_max}], to which every α is clamped. Widen the range."
            )

    @classmethod
    def theta_only(cls) -> Mixture:
        """The student alone: α = 0 at every token."""
        return cls(alpha_min=0.0, alpha_max=0.0)

    @classmethod
    def teacher_only(cls) -> Mixture:
        """The teacher alone: α = 1 at every token."""
        return cls(alpha_min=1.0, alpha_max=1.0)

    @property
    def is_theta_only(self) -> bool:
        """Whether no token can be drawn from anything but the student."""
        return self.alpha_max == 0.0

    def anneal(self, share: float) -> Mixture:
        """The mixture a share of the way to the student: linear in ε for `trust_region`, in alpha_max otherwise.

        Args:
            share: 0 is this mixture, 1 the student alone.
        """
        check_number("Mixture.anneal", "share", share, 0.0, 1.0)
        if share == 1.0:
            return Mixture.theta_only()
        left = 1.0 - share
        if self.method == "trust_region":
            return replace(self, epsilon=self.epsilon * left)
        alpha_max = self.alpha_max * left
        return replace(
            self,
            alpha_max=alpha_max,
            alpha_min=min(self.alpha_min, alpha_max),
            fixed_alpha=min(self.fixed_alpha, alpha_max),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON, Parquet and the extra arguments of a request."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Mixture:
        """The mixture that `to_dict` described.

        Raises:
            ValueError: on a key that is no field of `Mixture`.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(unknown_option("field of a mixture", key, known))
        return cls(**values)


class MixtureRows(NamedTuple):
    """The mixtures of N rows, as tensors on the device that solves them.

    `present` says on the host which methods occur, so that none is computed in vain and nothing is read back.
    """

    present: frozenset[str]
    method: Int[Tensor, " N"]
    alpha_min: Float[Tensor, " N"]
    alpha_max: Float[Tensor, " N"]
    fixed_alpha: Float[Tensor, " N"]
    epsilon: Float[Tensor, " N"]

    @classmethod
    def of(cls, mixtures: Sequence[Mixture], device: torch.device | str = "cpu") -> MixtureRows:
        """One row for each of `mixtures`."""
        numbers = torch.tensor(
            [[m.alpha_min, m.alpha_max, m.fixed_alpha, m.epsilon] for m in mixtures], dtype=precision(device)
        ).reshape(len(mixtures), 4)
        method = torch.tensor([METHODS.index(m.method) for m in mixtures], dtype=torch.int64)
        return cls(frozenset(m.method for m in mixtures), method.to(device), *numbers.to(device).unbind(1))

    def rows(self, index: Int[Tensor, " K"]) -> MixtureRows:
        """The rows at `index`."""
        return MixtureRows(self.present, *(column[index] for column in self[1:]))


def precision(device: torch.device | str) -> torch.dtype:
    """What α is solved in: float64, for near-equal distributions drown in float32's rounding; Metal has none."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def mix(
    theta_logits: Float[Tensor, "N V_theta"],
    teacher_logits: Float[Tensor, "N V_teacher"],
    mixture: Mixture | Sequence[Mixture] | MixtureRows,
    temperature: float | Float[Tensor, " N"] = 1.0,
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
    """Solve α in each row and return the mixture.

    The vocabularies of one family are padded to different sizes: V is the smaller, and both models are taken as
    distributions over those first V tokens. The inputs may be of any float type; the solution is computed in
    float64. Reads both logits about ten times; waits for no device but the CPU.

    Args:
        theta_logits: the student's raw logits; -inf where a token is masked.
        teacher_logits: the teacher's raw logits; `fold_eos` comes before, where the two models end differently.
        mixture: one for all rows, or one for each.
        temperature: above 0, one for all rows or one for each; acts on both models before α is solved.

    Returns:
        alpha: (N,) float32; NaN in a row without a solution: a NaN among its logits, or no token with mass under both.
        log_q: (N, V) float32, normalised; NaN throughout a row without a solution.

    Raises:
        ValueError: on a temperature that is not above 0, or numbers of rows and mixtures that differ.
    """
    _check_rows(theta_logits, teacher_logits, mixture, temperature)
    log_theta, log_teacher = log_distributions(theta_logits, teacher_logits, temperature)
    if isinstance(mixture, Mixture):
        mixture = [mixture] * log_theta.shape[0]
    rows = mixture if isinstance(mixture, MixtureRows) else MixtureRows.of(mixture, log_theta.device)
    alpha = solve_alpha(log_theta, log_teacher, rows)
    log_q = torch.log_softmax(blend(log_theta, log_teacher, alpha), dim=-1)
    return alpha.float(), log_q.float()


def _check_rows(
    theta_logits: Tensor, teacher_logits: Tensor, mixture: Mixture | Sequence[Mixture] | MixtureRows, temperature: Any
) -> None:
    """Refuse what would broadcast, or solve a wrong problem, without a word; looks at nothing on a device."""
    N = len(theta_logits)
    if len(teacher_logits) != N:
        raise ValueError(
            f"mix: {N} rows of the student's logits and {len(teacher_logits)} of the teacher's; wanted equal."
        )
    M = N if isinstance(mixture, Mixture) else len(mixture.method if isinstance(mixture, MixtureRows) else mixture)
    if M != N:
        raise ValueError(f"mix: {M} mixtures for {N} rows of logits; wanted one for all rows or one for each.")
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(
            f"mix: `temperature` is {temperature!r}; wanted a number above 0. "
            "For the likeliest token solve at 1 and take the argmax of log_q."
        )


def log_distributions(
    theta_logits: Float[Tensor, "N V_theta"],
    teacher_logits: Float[Tensor, "N V_teacher"],
    temperature: float | Float[Tensor, " N"] = 1.0,
) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N V"]]:
    """log θ and log t over the common vocabulary at the sampling temperature, in the solver's precision."""
    V = min(theta_logits.shape[-1], teacher_logits.shape[-1])
    dtype = precision(theta_logits.device)
    scale = temperature[:, None].to(dtype) if isinstance(temperature, Tensor) else temperature
    log_theta = torch.log_softmax(theta_logits[:, :V].to(dtype) / scale, dim=-1)
    log_teacher = torch.log_softmax(teacher_logits[:, :V].to(dtype) / scale, dim=-1)
    return log_theta, log_teacher


def blend(
    theta: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], alpha: Float[Tensor, " N"]
) -> Float[Tensor, "N V"]:
    """(1-α)·θ + α·t of logits or log-probabilities: log q up to a constant. At α = 0 and 1 one model's row, exactly.

    Of raw logits it is what an engine's own sampler divides by the temperature: θ^((1-α)/T) t^(α/T) is q_α at T.
    """
    weight = alpha[:, None].to(theta.dtype)
    mixed = (1 - weight) * theta + weight * teacher
    return torch.where(weight == 0, theta, torch.where(weight == 1, teacher, mixed))  # 0·(-inf) is NaN


def fold_eos(teacher_logits: Float[Tensor, "N V"], teacher_eos: Sequence[int], theta_eos: int) -> Float[Tensor, "N V"]:
    """Count the mass that the teacher gives to its own end-of-sequence tokens for the student's.

    Models of one family may end with different tokens (Qwen3 and Qwen3-Base). Unfolded, the two distributions never
    agree that a sequence is over. Acts on raw logits, before the temperature.

    Args:
        teacher_logits: the teacher's raw logits.
        teacher_eos: the teacher's end-of-sequence ids that are none of the student's.
        theta_eos: the student's end-of-sequence id that takes their mass.
    """
    if not teacher_eos:
        return teacher_logits
    folded = teacher_logits.clone()
    folded[:, theta_eos] = torch.logsumexp(teacher_logits[:, [theta_eos, *teacher_eos]], dim=-1)
    folded[:, list(teacher_eos)] = -torch.inf
    return folded


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
    for _ in range(SOLVER_STEPS):
        value, slope = residual(family, alpha, rows.epsilon)
        low, high = torch.where(value < 0, alpha, low), torch.where(value > 0, alpha, high)
        newton = torch.clamp(alpha - value / slope, low, high)
        end = untried & ((newton == rows.alpha_min) | (newton == rows.alpha_max))
        accept = end | ((newton - alpha).abs() <= (last / 2).clamp(min=SOLVER_TOLERANCE))
        step = torch.where(value == 0, alpha, torch.where(accept, newton, (low + high) / 2)) - alpha
        untried &= ~end
        alpha, last = alpha + step, step.abs()
        if alpha.device.type == "cpu" and not bool((last > SOLVER_TOLERANCE).any()):
            break
    return alpha


def reference(
    theta_logits: Float[Tensor, "N V_theta"],
    teacher_logits: Float[Tensor, "N V_teacher"],
    mixture: Mixture | Iterable[Mixture],
    temperature: float = 1.0,
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
    """What `mix` must return, in float64: each row by itself, bisection to 1e-12 on the defining equation.

    Slow, and the only oracle: every faster path is tested against it.
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


def _reference_row(
    log_theta: Float[Tensor, " V"], log_teacher: Float[Tensor, " V"], mixture: Mixture
) -> tuple[float, Float[Tensor, " V"]]:
    nowhere = torch.full_like(log_theta, -torch.inf)
    both = torch.isfinite(log_theta) & torch.isfinite(log_teacher)
    if log_theta.isnan().any() or log_teacher.isnan().any():
        return float("nan"), nowhere * torch.nan
    alpha = _reference_alpha(log_theta, log_teacher, log_theta[both], log_teacher[both], mixture)
    if alpha == 0.0:
        return 0.0, log_theta
    if alpha == 1.0:
        return 1.0, log_teacher
    if alpha != alpha or not both.any():
        return float("nan"), nowhere * torch.nan
    nowhere[both] = torch.log_softmax((1 - alpha) * log_theta[both] + alpha * log_teacher[both], -1)
    return alpha, nowhere


def _reference_alpha(
    full_theta: Tensor, full_teacher: Tensor, theta: Tensor, teacher: Tensor, mixture: Mixture
) -> float:
    """α of one row; `theta` and `teacher` are the log-probabilities of the tokens that have mass under both."""
    low, high = mixture.alpha_min, mixture.alpha_max
    if low == high:
        return low
    if mixture.method == "fixed":
        return mixture.fixed_alpha
    if mixture.method == "entropy":
        entropy_theta, entropy_teacher = (float(torch.special.entr(p.exp()).sum()) for p in (full_theta, full_teacher))
        total = entropy_theta + entropy_teacher
        return min(max(entropy_theta / total, low), high) if total > 0 else (low + high) / 2
    if not len(theta):
        return float("nan")

    def kl(log_p: Tensor, log_other: Tensor) -> float:
        return float((log_p.exp() * (log_p - log_other)).sum())

    def too_large(alpha: float) -> bool:
        log_q = torch.log_softmax((1 - alpha) * theta + alpha * teacher, -1)
        if mixture.method == "kl_symmetry":
            return kl(log_q, theta) > kl(log_q, teacher)
        if mixture.method == "ess_balance":
            return float(torch.logsumexp(2 * theta - log_q, -1) - torch.logsumexp(2 * teacher - log_q, -1)) > 0
        return kl(log_q, theta) > mixture.epsilon

    p, r, ratio = theta.softmax(-1), teacher.softmax(-1), teacher - theta
    if mixture.method != "trust_region" and float((r * ratio).sum() - (p * ratio).sum()) < SAME_DIVERGENCE:
        return (low + high) / 2
    if too_large(low):
        return low
    if not too_large(high):
        return high
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (low, middle) if too_large(middle) else (middle, high)
    return (low + high) / 2
