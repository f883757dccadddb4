"""The word that the student has passed the mixture: when it comes, that it comes once, and what it needs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.training import make_trainer
from optimal_sampling_trl.trainers.overtaking import BATCHES, LEAST, Overtaking

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
    assert watch.told
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
