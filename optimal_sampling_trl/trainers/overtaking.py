"""A warning, given once for each, when the student alone comes to earn more than the mixture, or than the teacher."""

from __future__ import annotations

import math
from collections import deque

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..losses import reaches

BATCHES = 20
"""Latest batches of training that are compared."""
LEAST = 5
"""Batches before the mixture is compared: completions of one prompt resemble each other, and few batches have few
prompts."""
FEWEST = 16
"""Rewards of each side before the two are compared: of fewer, a standard error is itself a rough estimate."""
ERRORS = 3.0
"""Standard errors by which the student's mean must lead. Every batch is a test, so two would come by luck."""
LET_GO = (
    "let go of it with the generator's `schedule` or `theta_fraction=1`, with `dense_fade` beside a dense term, or "
    "train on with TRL's own trainer."
)
"""Ends of the sentences that advise to go on without the teacher."""


class Overtaking:
    """Compares the student's rewards with the mixture's over the latest batches of training, and with the teacher's.

    Where the batches have completions of both, the student and the mixture are compared on these, which have the same
    prompts. Where the mixture samples all of them, the student's rewards are those of an evaluation.

    Attributes:
        passed: those of "mixture" and "teacher" that the student has been found ahead of; each is found once.
    """

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self._batches: deque[tuple[Tensor, Tensor]] = deque(maxlen=BATCHES)
        self._teacher: float | None = None  # its mean reward, once it is known

    def add(self, rewards: Float[Tensor, " N"], theta_rows: Bool[Tensor, " N"]) -> str | None:
        """Take a batch of training, and return the message where the student has passed the mixture with it.

        Args:
            rewards: reward of each completion of all processes; NaN where no function could score it.
            theta_rows: True where the student sampled the completion alone.
        """
        self._batches.append((_scored(rewards[theta_rows]), _scored(rewards[~theta_rows])))
        student, mixture = self._halves()
        if not self._passes({"mixture": mixture}, student):
            return None
        return (
            f"The student alone now earns more than the mixture: a mean reward of {student.mean():.3f} against "
            f"{mixture.mean():.3f} in the last {len(self._batches)} batches. {self._advice()}"
        )

    def evaluate(self, rewards: Float[Tensor, " N"], teacher: Float[Tensor, " M"] | None = None) -> str | None:
        """Take an evaluation, and return the message where it shows that the student has passed somebody.

        Args:
            rewards: reward of each completion of the student; NaN where no function could score it.
            teacher: the teacher's rewards on the same prompts; None where they were not measured.
        """
        in_training, mixture = self._halves()
        student, rivals, others = _scored(rewards), {}, []
        if teacher is not None and len(teacher := _scored(teacher)):
            rivals["teacher"], self._teacher = teacher, float(teacher.mean())
            others.append(f"{self._teacher:.3f} of the teacher alone on the same prompts")
        if not len(in_training) and len(mixture):
            rivals["mixture"] = mixture
            others.append(f"{mixture.mean():.3f} of the mixture in the last {len(self._batches)} batches of training")
        if not (ahead := self._passes(rivals, student)):
            return None
        return (
            f"The student alone now earns more than the {' and the '.join(ahead)}: in this evaluation a mean reward "
            f"of {student.mean():.3f}, against {' and '.join(others)}. {self._advice()}"
        )

    def _halves(self) -> tuple[Tensor, Tensor]:
        """Return the rewards of the student and of the mixture over the latest batches."""
        empty = torch.empty(0, dtype=torch.double)
        student, mixture = (torch.cat([empty, *(batch[half] for batch in self._batches)]) for half in (0, 1))
        return student, mixture

    def _passes(self, rivals: dict[str, Tensor], student: Tensor) -> list[str]:
        """Return those whom the student is newly found ahead of, and remember them."""
        known = [name for name in rivals if name != "mixture" or len(self._batches) >= LEAST]
        ahead = [name for name in known if name not in self.passed and leads(student, rivals[name])]
        self.passed.update(ahead)
        return ahead

    def _advice(self) -> str:
        """Return what to do, by whom the student has passed."""
        if self.passed == {"mixture", "teacher"}:
            return f"It has passed both, and the teacher costs more than it brings: {LET_GO}"
        if "teacher" in self.passed:
            if len(self._halves()[1]):
                return "It has not passed the mixture: keep its completions among the rollouts for now."
            return f"Unless the teacher is there for what the student still fails at, {LET_GO}"
        if self._teacher is None:
            return "The teacher alone was not measured. Its share in the rollouts costs more than it brings: " + LET_GO
        return (
            f"It has not passed the teacher alone, which earned {self._teacher:.3f} in the evaluation: before you let "
            "go of it, try another mixture or a larger share of the teacher (`alpha_min`)."
        )


def leads(student: Float[Tensor, " N"], other: Float[Tensor, " M"]) -> bool:
    """Return True where the student's mean reward leads by `ERRORS` standard errors, of `FEWEST` rewards or more.

    The standard error is the larger of two: by the variance of each side, and by that of both together, since a side
    whose rewards are all equal has no variance of its own, however few they are.
    """
    sizes = len(student), len(other)
    if min(sizes) < FEWEST:
        return False
    separate = float(student.var()) / sizes[0] + float(other.var()) / sizes[1]
    together = float(torch.cat([student, other]).var()) * (1 / sizes[0] + 1 / sizes[1])
    if reaches(other.mean(), float(student.mean())):  # the same, rounding aside
        return False
    return float(student.mean() - other.mean()) >= ERRORS * math.sqrt(max(separate, together))


def _scored(rewards: Tensor) -> Tensor:
    """Return the rewards that were given, on the host."""
    return rewards[~rewards.isnan()].double().cpu()
