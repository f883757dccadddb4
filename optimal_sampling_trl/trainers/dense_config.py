"""Settings of losses that read dense records: the dense term beside a reward, and the dense loss of distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..divergences import DIVERGENCES
from ..options import check_choice, check_number, check_whole
from ..rollouts.dense import Dense

TOP_K = 32
"""Likeliest tokens of each model that a dense loss reads, unless the user says otherwise."""
DISTANCE = "kl_theta_teacher"
"""Exact KL(θ‖t) of each token, which is asked for beside the likeliest tokens and logged."""
CONFIDENCE = "entropy_teacher"
"""Exact H(t) of each token, by which routed credit weighs the term."""


@dataclass
class DenseTermConfig:
    """Settings of the dense term beside the loss of a reward: a coefficient times the mean divergence.

    The divergence is `divergences.union_divergence` of the dense records that the rollouts then carry.

    Raises:
        ValueError: on an unknown divergence, a number out of range, or a detail of the term without its coefficient.
    """

    dense_coefficient: float = field(
        default=0.0,
        metadata={
            "help": "Adds this times the divergence of the student from the teacher, a mean over all tokens, to the "
            "loss. The rollouts carry what it reads, so no teacher is in the trainer; 0 is the reward alone."
        },
    )
    dense_divergence: str = field(
        default="reverse",
        metadata={"help": "Divergence of the dense term: 'reverse' KL(theta||t), 'forward' KL(t||theta), or 'js'."},
    )
    dense_fade: float | None = field(
        default=None,
        metadata={
            "help": "Share of training, in (0, 1], over which the coefficient falls linearly to 0; by default it "
            "stays."
        },
    )
    dense_top_k: int = field(
        default=TOP_K,
        metadata={
            "help": "Likeliest tokens of each model in the dense term, or all of a small vocabulary; the others "
            "count together."
        },
    )

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_number(owner, "dense_coefficient", self.dense_coefficient, 0.0)
        check_choice("dense_divergence", self.dense_divergence, DIVERGENCES)
        if self.dense_fade is not None:
            share = "Pass a share of training, or None to keep the term."
            check_number(owner, "dense_fade", self.dense_fade, high=1.0, above=0.0, advice=share)
        check_whole(owner, "dense_top_k", self.dense_top_k, 1)
        for name in ("dense_divergence", "dense_fade", "dense_top_k"):
            value = getattr(self, name)
            if self.dense_coefficient == 0 and value != getattr(DenseTermConfig, name):
                raise ValueError(
                    f"`{name}` is {value!r} and `dense_coefficient` 0, so that nothing reads it. Drop it, or set the "
                    "coefficient."
                )
        super().__post_init__()  # type: ignore[misc]


@dataclass
class DenseLossConfig:
    """Settings of the dense loss of distillation; TRL's `beta` picks its divergence.

    Raises:
        ValueError: on a number of tokens below 1.
    """

    dense_top_k: int = field(
        default=TOP_K,
        metadata={
            "help": "Likeliest tokens of each model in the loss 'dense', or all of a small vocabulary; the others "
            "count together."
        },
    )

    def __post_init__(self) -> None:
        check_whole(type(self).__name__, "dense_top_k", self.dense_top_k, 1)
        super().__post_init__()  # type: ignore[misc]


def dense_of(args: Any) -> Dense | None:
    """Return the dense records that the loss of a configuration reads; None where it reads none, as TRL's do."""
    if getattr(args, "dense_coefficient", 0.0) == 0 and getattr(args, "loss", None) != "dense":
        return None
    routed = getattr(args, "credit", None) == "routed"
    return Dense(scalars=(DISTANCE, CONFIDENCE) if routed else (DISTANCE,), top_k=args.dense_top_k)


def joined(one: Dense | None, other: Dense | None) -> Dense | None:
    """Return a `Dense` that asks for all that either of two asks for."""
    if one is None or other is None:
        return one or other
    return Dense(tuple(dict.fromkeys((*one.scalars, *other.scalars))), max(one.top_k, other.top_k))


def coefficient_at(args: Any, progress: float) -> float:
    """Return the coefficient of the dense term at a share of training in [0, 1]; 0 without such a term."""
    coefficient = float(getattr(args, "dense_coefficient", 0.0))
    fade = getattr(args, "dense_fade", None)
    return coefficient if fade is None else coefficient * max(0.0, 1 - progress / fade)
