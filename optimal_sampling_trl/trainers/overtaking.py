"""A warning, given once, when the student's own completions come to earn more than the mixture's."""

from __future__ import annotations

import math
from collections import deque

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BATCHES = 20
"""Latest batches that are compared."""
LEAST = 5
"""Batches before the first warning: a half whose few rewards are all equal has no standard error to go by."""
ERRORS = 3.0
"""Standard errors by which the student's mean must lead. Every batch is a test, so two would come by luck."""


class Overtaking:
    """Compares the rewards of the student's completions and the mixture's over the latest batches.

    Attributes:
        told: True once `add` has found the student ahead; it then finds nothing more.
    """

    def __init__(self) -> None:
        self.told = False
        self._halves: deque[tuple[Tensor, Tensor]] = deque(maxlen=BATCHES)

    def add(self, rewards: Float[Tensor, " N"], theta_rows: Bool[Tensor, " N"]) -> str | None:
        """Take a batch, and return the message where the student has come ahead with it.

        Args:
            rewards: reward of each completion of all processes; NaN where no function could score it.
            theta_rows: True where the student sampled the completion alone.
        """
        scored = ~rewards.isnan()
        self._halves.append(
            (rewards[scored & theta_rows].double().cpu(), rewards[scored & ~theta_rows].double().cpu())
        )
        student, mixture = (torch.cat(half) for half in zip(*self._halves))
        if self.told or len(self._halves) < LEAST or min(len(student), len(mixture)) < 2:
            return None
        lead = float(student.mean() - mixture.mean())
        error = math.sqrt(float(student.var() / len(student) + mixture.var() / len(mixture)))
        if lead <= 0 or lead < ERRORS * error:
            return None
        self.told = True
        return (
            f"The student alone now earns more than the mixture: {student.mean():.3f} against {mixture.mean():.3f} in "
            f"the last {len(self._halves)} batches. The teacher's share in the rollouts costs more than it brings: "
            "let go of it with the generator's `schedule` or `theta_fraction=1`, or train on with TRL's own trainer."
        )
