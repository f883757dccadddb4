"""The word that the student has passed the mixture or the teacher: when it comes, that it comes once, and what it
says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.training import make_trainer
from optimal_sampling_trl.trainers.overtaking import BATCHES, LEAST, Overtaking, leads

HALVES = torch.arange(8) < 4
AHEAD = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 1])
"""Rewards of eight completions, of which the student's stand first: three of four are right, and one of four."""


def batches_until_told(watch: Overtaking, rewards: torch.Tensor, most: int = 50) -> int | None:
    return next((number for number in range(1, most) if watch.add(rewards, HALVES)), None)


def test_it_tells_once_and_not_by_luck() -> None:
    watch = Overtaking()
    told = batches_until_told(watch, AHEAD)
    assert told is not None
    assert LEAST <= told <= 2 * LEAST
    assert watch.passed == {"mixture"}
    assert batches_until_told(watch, AHEAD) is None
    for rewards in (AHEAD.flip(0), torch.zeros(8), torch.ones(8), torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0])):
        assert batches_until_told(Overtaking(), rewards) is None


def test_the_latest_batches_count() -> None:
    """A student that was behind for long is ahead soon after."""
    watch = Overtaking()
    assert batches_until_told(watch, AHEAD.flip(0), 10 * BATCHES) is None
    told = batches_until_told(watch, AHEAD)
    assert told is not None
    assert told <= BATCHES


def test_rows_that_nobody_scores_and_a_missing_half() -> None:
    unscored = torch.where(torch.arange(8) % 2 == 0, AHEAD, torch.nan)
    assert batches_until_told(Overtaking(), unscored) is not None
    for half in (torch.ones(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool)):
        watch = Overtaking()
        assert not any(watch.add(AHEAD, half) for _ in range(2 * LEAST))


def shares(right: int, number: int) -> torch.Tensor:
    """Rewards of so many completions, of which some are right."""
    return (torch.arange(number) < right).float()


def test_few_completions_that_are_all_right_prove_nothing() -> None:
    """Their own variance is 0. At nine tenths of right ones 16 in a row are likely, and 128 are not."""
    often = shares(900, 1000)
    assert not leads(shares(16, 16), often)
    assert leads(shares(128, 128), often)
    assert not leads(shares(15, 15), shares(0, 15))
    assert leads(shares(20, 20), shares(0, 20))
    assert not leads(shares(1, 1), shares(0, 20))
    assert not leads(shares(0, 0), shares(0, 20))
    assert not leads(often, often)
    below, above = torch.full((2, 64), 1.0) + torch.tensor([[-6e-8], [1.2e-7]])
    assert below.lt(1).all()
    assert above.gt(1).all()
    assert not leads(above.double(), below.double())  # the same total, rounded down and up


def test_a_side_whose_rewards_scatter_more_is_not_hidden_by_the_other() -> None:
    """Together the variance is small, since the other side is large and even."""
    student, mixture = 10 * (shares(20, 32) - 0.5), 0.01 * (shares(1000, 2000) - 0.5)
    together = torch.cat([student, mixture]).std() * (1 / 32 + 1 / 2000) ** 0.5
    assert student.mean() > 3 * together
    assert not leads(student, mixture)


def watching(right: int | None, batches: int = BATCHES) -> Overtaking:
    """After batches of eight completions of the mixture, of which so many are right; None is no batch."""
    watch = Overtaking()
    for _ in range(0 if right is None else batches):
        assert watch.add(shares(right or 0, 8), torch.zeros(8, dtype=torch.bool)) is None
    return watch


@pytest.mark.parametrize(
    ("mixture", "teacher", "passed", "words"),
    [
        (4, 64, {"mixture", "teacher"}, "It has passed both, and the teacher costs more than it brings: let go of it"),
        (4, 120, {"mixture"}, "It has not passed the teacher alone, which earned 0.938 in the evaluation: before"),
        (4, None, {"mixture"}, "Its share in the rollouts costs more than it brings: let go of it with"),
        (8, 64, {"teacher"}, "It has not passed the mixture: keep its completions among the rollouts for now."),
        (None, 64, {"teacher"}, "Unless the teacher is there for what the student still fails at, let go of it with"),
        (8, 120, set(), None),
        (8, None, set(), None),
        (None, None, set(), None),
    ],
)
def test_an_evaluation_tells_whom_the_student_has_passed(
    mixture: int | None, teacher: int | None, passed: set[str], words: str | None
) -> None:
    """112 of 128 are right: more than half of them, and no more than 120 or all."""
    watch = watching(mixture)
    others = None if teacher is None else shares(teacher, 128)
    told = watch.evaluate(shares(112, 128), others)
    assert watch.passed == passed
    if words is None:
        assert told is None
        return
    assert told is not None
    assert words in told
    assert "a mean reward of 0.875, against" in told
    assert ("0.500 of the mixture in the last 20 batches of training" in told) == (mixture == 4)
    assert (teacher is not None) == ("of the teacher alone on the same prompts" in told)
    assert watch.evaluate(shares(112, 128), others) is None  # once


def test_one_after_the_other() -> None:
    """The mixture in training, then the teacher in an evaluation: both are named as passed."""
    watch = Overtaking()
    assert batches_until_told(watch, AHEAD) is not None
    assert watch.evaluate(shares(60, 128), shares(64, 128)) is None
    told = watch.evaluate(shares(112, 128), shares(64, 128))
    assert told is not None
    assert told.startswith("The student alone now earns more than the teacher: in this evaluation")
    assert "It has passed both" in told


def test_in_training_the_teacher_of_the_last_evaluation_is_named() -> None:
    watch = Overtaking()
    assert watch.evaluate(shares(60, 128), shares(120, 128)) is None
    told = next(filter(None, (watch.add(AHEAD, HALVES) for _ in range(50))))
    assert "0.750 against 0.250" in told
    assert "It has not passed the teacher alone, which earned 0.938 in the evaluation" in told


def test_an_evaluation_and_few_batches_of_training() -> None:
    assert watching(0, LEAST - 1).evaluate(shares(128, 128)) is None
    assert watching(0, LEAST).evaluate(shares(128, 128)) is not None


def test_where_training_has_both_an_evaluation_does_not_compare_with_the_mixture() -> None:
    """Its prompts are others, and may be easier."""
    watch = Overtaking()
    assert batches_until_told(watch, AHEAD.flip(0)) is None
    assert watch.evaluate(torch.ones(128)) is None


@pytest.mark.parametrize("kind", ["grpo", "raft"])
def test_a_trainer_says_it_in_training(
    pair: tuple[str, str], tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The rows of a group that the student samples stand first, and are the ones that are rewarded."""

    def own(completions: list[str], **columns: Any) -> list[float]:
        return [float(row % 4 < 2) + 0.001 * len(text) for row, text in enumerate(completions)]

    given = {
        "generator": {"theta_fraction": 0.5},
        "trainer": {"reward_funcs": own},
        "num_generations": 4,
        "max_steps": 7,
    }
    with caplog.at_level(logging.WARNING, logger="optimal_sampling_trl.trainers.rewarded"):
        make_trainer(kind, pair, tmp_path, **given).train()
    (message,) = [record.getMessage() for record in caplog.records if "earns more than the mixture" in record.message]
    assert "`schedule`" in message
