"""The settings of a mixture: as a user writes them, and as the columns that a batch of rows is solved from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import reduce
from operator import and_
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..options import check_number, check_whole, suggest_arguments, unknown_option
from .presets import published

METHODS = ("kl_symmetry", "ess_balance", "trust_region", "entropy", "fixed", "entropy_gate", "top_k_swap")
SWAP = "top_k_swap"
"""The method that says what q is, and not α alone."""
OWN = {"fixed_alpha": "fixed", "epsilon": "trust_region", "entropy_scale": "entropy_gate", "swap_top_k": SWAP}
"""The fields that one method alone reads, and that method. The other fields hold for every method."""
FORMS = ("geometric", "arithmetic")
CHOICES = {"method": METHODS, "form": FORMS}
"""The fields of a mixture whose value is a word, with the words that each may have."""
MOST_SWAPPED = 1 << 24
"""The largest K of `top_k_swap`, beyond any vocabulary: an engine's tables hold it in float32."""
SAME_DIVERGENCE = 1e-9
"""Jeffreys divergence, in nats, below which two rows count as the same distribution."""
CERTAIN_LOGIT = 1e4
"""The logit of the end-of-sequence token in a row without a solution, whose other logits are 0.

Sampling then ends that sequence at any temperature: the number is certain, and stays finite when it is divided."""


@suggest_arguments(alpha_method="method=", mixture_epsilon="epsilon=", mixture_form="form=")
@dataclass(frozen=True)
class Mixture:
    """Say how α is chosen at each token.

    The order of the fields and their defaults are written here only. All else reads `FIELDS` and `Mixture()`.

    Args:
        method: the equation that α solves, one of `METHODS` (see the head of `mixture`).
        alpha_min: the smallest weight of the teacher, in [0, alpha_max].
        alpha_max: the largest weight of the teacher, in [alpha_min, 1].
        fixed_alpha: α of the method `fixed`; no other method reads it.
        epsilon: the budget KL(q‖θ) ≤ ε of the method `trust_region`, in nats a token; no other method reads it.
        form: `geometric` for q ∝ θ^(1-α) t^α, `arithmetic` for q = (1-α)θ + αt.
        entropy_scale: the entropy H(θ), in nats and above 0, from which on α of the method `entropy_gate` is 1; no
            other method reads it.
        swap_top_k: K of the method `top_k_swap`: a token of the student is kept where it is among the teacher's K
            likeliest, with all that tie with the K-th; no other method reads it.

    Raises:
        ValueError: on a method or form that does not exist, a number outside of its range, `ess_balance` of the
            arithmetic form, whose α is 1/2 whatever the models, or a form or bounds of α beside `top_k_swap`.

    Example:
        ```python
        Mixture()  # the default: as far from the student as from the teacher
        Mixture("trust_region", epsilon=0.05)  # near the student
        Mixture(alpha_min=0.5)  # leaning towards the teacher
        Mixture("fixed", fixed_alpha=0.2, form="arithmetic")  # each token is the teacher's with probability 0.2
        Mixture("entropy_gate", entropy_scale=1.5, form="arithmetic")  # the teacher helps where the student is unsure
        Mixture("top_k_swap", swap_top_k=25)  # the teacher draws anew what it would not have among its likeliest 25
        ```
    """

    method: str = "kl_symmetry"
    alpha_min: float = 0.0
    alpha_max: float = 1.0
    fixed_alpha: float = 0.5
    epsilon: float = 0.05
    form: str = "geometric"
    entropy_scale: float = 1.0
    swap_top_k: int = 25

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(unknown_option(f"mixture {name}", getattr(self, name), known))
        if self.form == "arithmetic" and self.method == "ess_balance":
            raise ValueError(
                "Mixture: `method` is 'ess_balance' and `form` is 'arithmetic', whose solution is 1/2 whatever the "
                "models: Σ(θ²-t²)/q = 2Σ(θ-t) = 0 there. Use Mixture('fixed', fixed_alpha=0.5, form='arithmetic')."
            )
        for name in ("alpha_min", "alpha_max", "fixed_alpha"):
            check_number("Mixture", name, getattr(self, name), 0.0, 1.0)
        check_number("Mixture", "epsilon", self.epsilon, 0.0)
        alone = "An entropy, in nats, is divided by it; for the teacher alone use Mixture.teacher_only()."
        check_number("Mixture", "entropy_scale", self.entropy_scale, above=0.0, advice=alone)
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
        whole = check_whole("Mixture", "swap_top_k", self.swap_top_k, 1, high=MOST_SWAPPED)
        object.__setattr__(self, "swap_top_k", whole)
        if self.method == SWAP:
            self._check_swap()

    def _check_swap(self) -> None:
        """Refuse what `top_k_swap` cannot have: its q is of no form, and follows from K alone."""
        if self.form != "geometric":
            raise ValueError(
                f"Mixture: `method` is {SWAP!r} and `form` is {self.form!r}; wanted none, since q = θ·1[S] + α·t is a "
                "form of its own. Drop `form`."
            )
        if (self.alpha_min, self.alpha_max) != (0, 1):
            raise ValueError(
                f"Mixture: `method` is {SWAP!r} with `alpha_min` {self.alpha_min} and `alpha_max` {self.alpha_max}; "
                "wanted 0 and 1, since its α is what the student has outside of the teacher's K likeliest tokens, and "
                "bounds would leave no distribution. Drop them; `swap_top_k` says how much is swapped."
            )

    @classmethod
    def theta_only(cls) -> Mixture:
        """Return the student alone: α = 0 at every token."""
        return cls(alpha_min=0.0, alpha_max=0.0)

    @classmethod
    def teacher_only(cls) -> Mixture:
        """Return the teacher alone: α = 1 at every token."""
        return cls(alpha_min=1.0, alpha_max=1.0)

    @classmethod
    def preset(cls, name: str) -> Mixture:
        """Return a mixture that others have published: `mentor`, `logit-fusion`, `trb`, `minillm` or `skd`.

        docs/presets.md has their settings and sources. The field `preset` of a trainer's configuration sets the
        mixture and everything else that the publication sets.

        Raises:
            ValueError: on another name.
        """
        return cls(**published(name))

    @property
    def is_theta_only(self) -> bool:
        """True if every token is drawn from the student alone."""
        no_budget = self.method == "trust_region" and self.epsilon == 0
        no_weight = self.method == "fixed" and self.fixed_alpha == 0
        return self.alpha_max == 0.0 or (self.alpha_min == 0.0 and (no_budget or no_weight))

    def own(self) -> dict[str, Any]:
        """Return the field that this method alone reads, with its value; nothing where it has none."""
        return {name: getattr(self, name) for name, method in OWN.items() if method == self.method}

    def unread(self) -> dict[str, str]:
        """Return the fields that are set and that this method does not read, each with the method that does."""
        set_ones = {name: method for name, method in OWN.items() if getattr(self, name) != getattr(Mixture, name)}
        return {name: method for name, method in set_ones.items() if method != self.method}

    def check_read(self, owner: str) -> None:
        """Refuse a field that is set and that the method does not read.

        It is called where a user's settings come in. The constructor takes such a field, since rollouts that earlier
        versions stored have one.

        Args:
            owner: what takes the mixture, for the error.

        Raises:
            ValueError: naming the field, and the method that reads it.
        """
        if unread := self.unread():
            name, method = next(iter(unread.items()))
            raise ValueError(
                f"{owner}: `{name}` is {getattr(self, name)!r}, and the method {self.method!r} does not read it; "
                f"wanted it with {method!r}. Drop it, or choose that method."
            )

    def anneal(self, share: float) -> Mixture:
        """Return the mixture at a share of the way to the student alone.

        `trust_region` is annealed in ε and alpha_min, every other method in the range of α; both linearly.

        Args:
            share: 0 is this mixture, 1 the student alone.

        Raises:
            ValueError: where `share` is no number in [0, 1], or lies between with `top_k_swap`, whose α has no range.
        """
        check_number("Mixture.anneal", "share", share, 0.0, 1.0)
        if share in (0, 1):
            return Mixture.theta_only() if share else self
        if self.method == SWAP:
            raise ValueError(
                f"Mixture.anneal: `method` is {SWAP!r}, whose α has no range to shrink; wanted a `share` of 0 or 1, "
                "or another method. Keep the mixture as it is, or change `swap_top_k`."
            )
        rest = 1.0 - share
        if self.method == "trust_region":  # alpha_min overrules the budget, so it shrinks with it
            return replace(self, epsilon=self.epsilon * rest, alpha_min=self.alpha_min * rest)
        fixed_alpha = self.fixed_alpha * (rest if self.method == "fixed" else 1.0)  # unread, it stays as it is
        return replace(self, alpha_min=self.alpha_min * rest, alpha_max=self.alpha_max * rest, fixed_alpha=fixed_alpha)

    def numbers(self) -> tuple[float, ...]:
        """Return the fields in the order of `FIELDS` as numbers; a word as its place among its `CHOICES`."""
        values = {name: getattr(self, name) for name in FIELDS}
        return tuple(CHOICES[name].index(value) if name in CHOICES else value for name, value in values.items())

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON, Parquet and the extra arguments of a request."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Mixture:
        """Return the mixture that `to_dict` described. Fields that older versions did not write have their defaults.

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
    """The mixtures of N rows: one column per field, on the device that solves them.

    `present` holds the pairs of form and method that occur, and `most_swapped` the largest K of a row of `top_k_swap`,
    0 where there is none. Both are kept on the host, so that nothing else is computed and nothing is read back from
    the device.
    """

    present: frozenset[tuple[str, str]]
    most_swapped: int
    method: Int[Tensor, " N"] | Float[Tensor, " N"]
    alpha_min: Float[Tensor, " N"]
    alpha_max: Float[Tensor, " N"]
    fixed_alpha: Float[Tensor, " N"]
    epsilon: Float[Tensor, " N"]
    form: Int[Tensor, " N"] | Float[Tensor, " N"]
    entropy_scale: Float[Tensor, " N"]
    swap_top_k: Float[Tensor, " N"]

    @classmethod
    def of(cls, mixtures: Sequence[Mixture], device: torch.device | str = "cpu") -> MixtureRows:
        """Return one row for each of `mixtures`."""
        numbers = torch.tensor([mixture.numbers() for mixture in mixtures], dtype=precision(device))
        rows = cls.from_table(numbers.reshape(len(mixtures), len(FIELDS)).to(device))
        present = frozenset((mixture.form, mixture.method) for mixture in mixtures)
        most = max((mixture.swap_top_k for mixture in mixtures if mixture.method == SWAP), default=0)
        return rows._replace(present=present, most_swapped=most, method=rows.method.long(), form=rows.form.long())

    @classmethod
    def from_table(
        cls, numbers: Float[Tensor, "N F"], forms: Collection[str] = FORMS, most_swapped: int = 0
    ) -> MixtureRows:
        """Return the rows of a table of `Mixture.numbers`; any other method than `top_k_swap` may be present.

        Args:
            numbers: a row for each mixture, a column for each of `FIELDS`.
            forms: the forms that may be present.
            most_swapped: the largest K of a row of `top_k_swap`; 0 where there is none.
        """
        methods = [method for method in METHODS if most_swapped or method != SWAP]
        present = frozenset((form, method) for form in forms for method in methods)
        return cls(present, most_swapped, **dict(zip(FIELDS, numbers.unbind(1), strict=True)))

    def methods(self, form: str) -> frozenset[str]:
        """Return the methods that occur in the rows of a form."""
        return frozenset(method for other, method in self.present if other == form)

    def are(self, **words: str) -> Bool[Tensor, " N"]:
        """Return the rows of a `method`, of a `form`, or of both."""
        return reduce(and_, (getattr(self, name) == CHOICES[name].index(word) for name, word in words.items()))

    def at(self, index: Int[Tensor, " K"]) -> MixtureRows:
        """Return the rows at `index`."""
        return self._replace(**{name: getattr(self, name)[index] for name in FIELDS})


def precision(device: torch.device | str) -> torch.dtype:
    """Return the type that α is solved in.

    That is float64, because float32 cannot resolve nearly equal distributions; float32 on Metal, which has no float64.
    """
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
