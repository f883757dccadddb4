"""The settings of a mixture: as a user writes them, and as the columns that a batch of rows is solved from."""

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
CERTAIN_LOGIT = 1e4
"""The logit of the end-of-sequence token in a row without a solution, whose other logits are 0.

Sampling then ends that sequence at any temperature: the number is certain, and stays finite when it is divided."""


@dataclass(frozen=True)
class Mixture:
    """Say how α is chosen at each token.

    The order of the fields and their defaults stand here alone: `FIELDS` and `Mixture()` hand them on.

    Args:
        method: the equation that α solves, one of `METHODS` (see the head of `mixture`).
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
        """Return the student alone: α = 0 at every token."""
        return cls(alpha_min=0.0, alpha_max=0.0)

    @classmethod
    def teacher_only(cls) -> Mixture:
        """Return the teacher alone: α = 1 at every token."""
        return cls(alpha_min=1.0, alpha_max=1.0)

    @property
    def is_theta_only(self) -> bool:
        """True if every token is drawn from the student alone."""
        no_budget = self.method == "trust_region" and self.epsilon == 0
        no_weight = self.method == "fixed" and self.fixed_alpha == 0
        return self.alpha_max == 0.0 or (self.alpha_min == 0.0 and (no_budget or no_weight))

    def anneal(self, share: float) -> Mixture:
        """Return the mixture at a share of the way to the student alone.

        `trust_region` is annealed in ε and alpha_min, every other method in the range of α; both linearly.

        Args:
            share: 0 is this mixture, 1 the student alone.

        Raises:
            ValueError: where `share` is no number in [0, 1].
        """
        check_number("Mixture.anneal", "share", share, 0.0, 1.0)
        if share == 1.0:
            return Mixture.theta_only()
        rest = 1.0 - share
        if self.method == "trust_region":  # alpha_min overrules the budget, so it shrinks with it
            return replace(self, epsilon=self.epsilon * rest, alpha_min=self.alpha_min * rest)
        return replace(
            self,
            alpha_min=self.alpha_min * rest,
            alpha_max=self.alpha_max * rest,
            fixed_alpha=self.fixed_alpha * rest,
        )

    def numbers(self) -> tuple[float, ...]:
        """Return the fields in the order of `FIELDS` as numbers; the method as its place in `METHODS`."""
        return tuple(METHODS.index(self.method) if name == "method" else getattr(self, name) for name in FIELDS)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON, Parquet and the extra arguments of a request."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Mixture:
        """Return the mixture that `to_dict` described.

        Raises:
            ValueError: on a key that is no field of `Mixture`.
        """
        for key in values:
            if key not in FIELDS:
                raise ValueError(unknown_option("field of a mixture", key, FIELDS))
        return cls(**values)


FIELDS = tuple(field.name for field in fields(Mixture))
"""The names of a mixture's fields, in the order in which every table of mixtures has its columns."""


class MixtureRows(NamedTuple):
    """The mixtures of N rows: one column a field, on the device that solves them.

    `present` holds the methods that occur. It is kept on the host, so that no other method is computed and nothing is
    read back from the device.
    """

    present: frozenset[str]
    method: Int[Tensor, " N"] | Float[Tensor, " N"]
    alpha_min: Float[Tensor, " N"]
    alpha_max: Float[Tensor, " N"]
    fixed_alpha: Float[Tensor, " N"]
    epsilon: Float[Tensor, " N"]

    @classmethod
    def of(cls, mixtures: Sequence[Mixture], device: torch.device | str = "cpu") -> MixtureRows:
        """Return one row for each of `mixtures`."""
        numbers = torch.tensor([mixture.numbers() for mixture in mixtures], dtype=precision(device))
        rows = cls.from_table(numbers.reshape(len(mixtures), len(FIELDS)).to(device))
        return rows._replace(present=frozenset(mixture.method for mixture in mixtures), method=rows.method.long())

    @classmethod
    def from_table(cls, numbers: Float[Tensor, "N F"]) -> MixtureRows:
        """Return the rows of a table of `Mixture.numbers`; any method may be present."""
        return cls(frozenset(METHODS), **dict(zip(FIELDS, numbers.unbind(1), strict=True)))

    def rows(self, index: Int[Tensor, " K"]) -> MixtureRows:
        """Return the rows at `index`."""
        return self._replace(**{name: getattr(self, name)[index] for name in FIELDS})


def precision(device: torch.device | str) -> torch.dtype:
    """Return the type that α is solved in.

    That is float64, because float32 cannot resolve nearly equal distributions; float32 on Metal, which has no float64.
    """
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
