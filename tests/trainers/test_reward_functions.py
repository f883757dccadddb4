"""Reward functions of a user: a wrong call or result is told in words, in each trainer that takes them."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from helpers.training import TEXTS, make_trainer, make_untrained_pair, one_batch
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
    "rewards",
    [
        *([1, 0.5, None, True], (1.0,), torch.ones(2), np.ones(2), [np.float32(1), np.bool_(True)], []),
        *([float("nan"), 3.4e38], torch.tensor([torch.nan, -3.4e38])),
    ],
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
        ([1.0, float("inf")], r"returned inf \(float\) for completion 1; wanted a finite number .* or None .* worst"),
        ([None, -float("inf")], r"returned -inf \(float\) for completion 1; wanted a finite number"),
        (
            np.array([0, np.inf], np.float32),
            r"returned np\.float32\(inf\) \(float32\) for completion 1; wanted a finite",
        ),
        (torch.tensor([-torch.inf, 0.0]), r"returned tensor\(-inf\) \(Tensor\) for completion 0; wanted a finite"),
        ([1e39, 0.0], r"returned 1e\+39 \(float\) for completion 0; wanted a finite number \(at most 3\.4e38 in size"),
        ([0, -(10**400)], r"returned -10{150}.* \(int\) for completion 1; wanted a finite number"),
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

    def worst(completions: list[str], **_: Any) -> list[float]:
        return [float("-inf") if row % 2 else 1.0 for row in range(len(completions))]

    refused = (
        (worst, r"'worst' returned -inf \(float\) for completion 1; wanted a finite number"),
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


@pytest.mark.parametrize("kind", ["grpo", "rloo", "raft"])
def test_a_completion_without_a_reward_teaches_nothing(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """NaN is None; the others of a group are taught as if the completion were not there."""

    def first(completions: list[str], **_: Any) -> list[float | None]:
        return [None, float("nan"), 1.0, float("nan")] * (len(completions) // 4)

    def second(completions: list[str], **_: Any) -> list[float | None]:
        return [float("nan"), None, None, -0.5] * (len(completions) // 4)

    given = {"reward_funcs": [first, second]}
    settings = {} if kind == "raft" else {"positive_only": "none"}
    settings |= {"num_generations": 4, "reward_weights": [1.0, 2.0]}
    trainer = make_trainer(kind, pair, tmp_path, trainer=given, **settings)
    batch = one_batch(trainer, TEXTS[:1] * 4)
    assert torch.equal(trainer.rewards.isnan(), torch.tensor([True, True, False, False]))
    assert trainer.rewards[2:].tolist() == [1.0, -1.0]
    assert trainer._metrics["train"]["reward"] == [0.0]
    if kind == "raft":
        assert batch["imitation_weights"].tolist() == [0.0, 0.0, 1.0, 0.0]
        return
    advantages = batch["advantages"].view(4, -1)
    assert not advantages[:2].any()
    assert bool((advantages[2] > 0).all())
    assert bool((advantages[3] < 0).all())


class Model(torch.nn.Module):
    """A reward model of fixed scores."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = torch.tensor(scores)

    def forward(self, **_: Any) -> Any:
        return SimpleNamespace(logits=self.scores[:, None])


def test_a_total_that_is_infinite_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    """A model's reward, which TRL reads by itself, and what the weights make of finite ones."""
    model: Any = Model([1.0, 1.0, -torch.inf, 1.0])
    model.config = SimpleNamespace(_name_or_path="judge")
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    given = {"reward_funcs": [length, model], "reward_processing_classes": [None, tokenizer]}
    trainer = make_trainer("rloo", pair, tmp_path, trainer=given, num_generations=4)
    with pytest.raises(ValueError, match=r"completion 2 is -inf: 'length' \S+ × 1 \+ 'judge' -inf × 1; wanted a"):
        one_batch(trainer, TEXTS[:1] * 4)

    def large(completions: list[str], **_: Any) -> list[float]:
        return [3e38] * len(completions)

    for weights, told in (([10.0], r"is inf: 'large' 3e\+38 × 10; .*`rew"), ([10.0, -10.0], "is nan: 'large' 3e")):
        given = {"reward_funcs": [large] * len(weights)}
        trainer = make_trainer("grpo", pair, tmp_path, trainer=given, reward_weights=weights)
        with pytest.raises(ValueError, match=f"The total reward of completion 0 {told}"):
            one_batch(trainer, TEXTS[:1] * 8)
