"""How α is chosen, as a user sets it and as a batch of rows reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..options import check_number, unknown_option

METHODS = ("kl_symmetry", "ess_balance", "trust_region", "entropy", "fixed")
SAME_DIVERGENCE = 1e-9
"""Jeffreys divergence, in nats, below which two rows count as the same distribution."""


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
