"""Reward functions of a user: a wrong call or result is told in words, in each trainer that takes them."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.training import make_trainer, make_untrained_pair
from optimal_sampling_trl.trainers.reward_functions import check_reward_funcs, checked, rewards_of


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_untrained_pair(tmp_path_factory.mktemp("pair"))


def length(completions: list[str], unit: float = 1.0, **_: Any) -> list[float]:
    return [len(text) * unit for text in completions]


async def length_later(completions: list[str], **_: Any) -> list[float]:
    return length(completions)


class Length:
    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return length(completions)


@pytest.mark.parametrize("function", [length, partial(length, unit=1.0), Length(), lambda completions, **_: [1, 2]])
def test_a_good_function_is_called_as_before(function: Any) -> None:
    assert checked(function, "length")(prompts=["p", "p"], completions=["a", "bc"]) == [1, 2]


def test_an_asynchronous_function_stays_one() -> None:
    assert asyncio.run(checked(length_later, "length")(prompts=["p"], completions=["abc"])) == [3]
    with pytest.raises(ValueError, match=r"'length' cannot be called as TRL calls it: missing a required argument"):
        asyncio.run(checked(length_later, "length")(prompts=["p"]))


def test_a_model_is_left_to_trl() -> None:
    model = torch.nn.Linear(1, 1)
    assert checked(model, "model") is model


@pytest.mark.parametrize(
    "rewards", [[1, 0.5, None, True], (1.0,), torch.ones(2), np.ones(2), [np.float32(1), np.bool_(True)], []]
)
def test_rewards_are_numbers_of_any_kind(rewards: Any) -> None:
    assert len(rewards_of(rewards, "right", len(rewards))) == len(rewards)


@pytest.mark.parametrize(
    ("rewards", "told"),
    [
        (None, r"returned None \(NoneType\); wanted a list with a number for each completion"),
        (1.0, r"returned 1\.0 \(float\); wanted a list"),
        ([1.0], r"returned a list of 1; wanted 2 numbers, one for each completion"),
        ([1.0, None, 0.0], r"returned a list of 3; wanted 2 numbers"),
        (["1", "1"], r"returned '1' \(str\) for completion 0; wanted a number, or None"),
        ([1.0, [1.0]], r"returned \[1\.0\] \(list\) for completion 1; wanted a number"),
        (torch.ones(2, 1), r"returned tensor\(\[1\.\]\) \(Tensor\) for completion 0; wanted a number"),
    ],
)
def test_what_is_no_reward_is_refused(rewards: Any, told: str) -> None:
    with pytest.raises(ValueError, match=rf"^The reward function 'right' {told}"):
        rewards_of(rewards, "right", 2)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "raft"])
def test_a_trainer_says_it(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    def unsure(completions: list[str], **_: Any) -> list[str]:
        return ["yes" for _ in completions]

    def solved(completions: list[str], solution: list[str]) -> list[float]:
        return [0.0 for _ in completions]

    def mean(completions: list[str], **_: Any) -> list[float]:
        return [1.0]

    refused = (
        (unsure, "'unsure' returned 'yes'"),
        (mean, "'mean' returned a list of 1; wanted 8 numbers"),
        (solved, "'solved' cannot be called as TRL calls it"),
    )
    for function, told in refused:
        trainer = make_trainer(kind, pair, tmp_path, trainer={"reward_funcs": function})
        with pytest.raises(ValueError, match=f"The reward function {told}"):
            trainer.train()
    with pytest.raises(ValueError, match=r"`reward_funcs` has 1\.0 \(float\); wanted a function"):
        make_trainer(kind, pair, tmp_path, trainer={"reward_funcs": [length, 1.0]})
    check_reward_funcs([length, "folder/of/a/model", Length()])
