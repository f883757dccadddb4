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

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .options import check_number, unknown_option
from .solver import METHODS, solve_alpha


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

    Example:
        ```python
        Mixture()  # the default: as far from the student as from the teacher
        Mixture("trust_region", epsilon=0.05)  # near the student
        Mixture(alpha_min=0.5)  # leaning towards the teacher
        ```
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
        spent = (self.method == "trust_region" and self.epsilon == 0) or (
            self.method == "fixed" and not self.fixed_alpha
        )
        return self.alpha_max == 0.0 or (spent and self.alpha_min == 0.0)

    def anneal(self, share: float) -> Mixture:
        """The mixture a share of the way to the student: linear in ε and alpha_min for `trust_region`, in the range of
        α otherwise.

        Args:
            share: 0 is this mixture, 1 the student alone.
        """
        check_number("Mixture.anneal", "share", share, 0.0, 1.0)
        if share == 1.0:
            return Mixture.theta_only()
        left = 1.0 - share
        if self.method == "trust_region":  # alpha_min overrules the budget, so it goes along
            return replace(self, epsilon=self.epsilon * left, alpha_min=self.alpha_min * left)
        return replace(
            self,
            alpha_min=self.alpha_min * left,
            alpha_max=self.alpha_max * left,
            fixed_alpha=self.fixed_alpha * left,
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
    float64, on a GPU by the kernels (α within 1e-4). Waits for no device but the CPU.

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

    Example:
        ```python
        theta_logits, teacher_logits = torch.randn(2, 100), torch.randn(2, 100)
        alpha, log_q = mix(theta_logits, teacher_logits, Mixture())
        assert alpha.shape == (2,) and log_q.shape == (2, 100)
        ```
    """
    _check_rows(theta_logits, teacher_logits, mixture, temperature)
    if isinstance(mixture, Mixture):
        mixture = [mixture] * len(theta_logits)
    rows = mixture if isinstance(mixture, MixtureRows) else MixtureRows.of(mixture, theta_logits.device)
    if theta_logits.is_cuda and find_spec("triton"):
        return _mix_on_a_gpu(theta_logits, teacher_logits, rows, temperature)
    log_theta, log_teacher = log_distributions(theta_logits, teacher_logits, temperature)
    alpha = solve_alpha(log_theta, log_teacher, rows)
    log_q = torch.log_softmax(blend(log_theta, log_teacher, alpha), dim=-1)
    return alpha.float(), log_q.float()


def _mix_on_a_gpu(
    theta_logits: Tensor, teacher_logits: Tensor, rows: MixtureRows, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    from .kernels import mix_logits

    if not isinstance(temperature, Tensor):
        temperature = torch.full((len(theta_logits),), temperature, device=theta_logits.device)
    mixed = mix_logits(theta_logits, teacher_logits, *rows[1:], temperature)
    V = min(theta_logits.shape[1], teacher_logits.shape[1])
    log_q = torch.log_softmax(mixed.logits[:, :V] / temperature[:, None], dim=-1)
    return mixed.alpha, log_q.masked_fill(mixed.alpha.isnan()[:, None], torch.nan)


def _check_rows(
    theta_logits: Tensor, teacher_logits: Tensor, mixture: Mixture | Sequence[Mixture] | MixtureRows, temperature: Any
) -> None:
    """Refuse what would broadcast, or solve a wrong problem, without a word; looks at nothing on a device."""
    N = len(theta_logits)
    if len(teacher_logits) != N:
        raise ValueError(
            f"mix: {N} rows of the student's logits and {len(teacher_logits)} of the teacher's; wanted equal. "
            "Pass both models' logits of the same tokens."
        )
    M = N if isinstance(mixture, Mixture) else len(mixture.method if isinstance(mixture, MixtureRows) else mixture)
    if M != N:
        raise ValueError(
            f"mix: {M} mixtures for {N} rows of logits; wanted one for all rows or one for each. Pass either."
        )
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
