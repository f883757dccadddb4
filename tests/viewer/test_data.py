"""The data of the page: numbers that JSON can hold, texts of tokens, and what the models would have preferred."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from helpers.pages import byte_tokenizer, text_rollout
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.rollouts.rollout import Rollout
from optimal_sampling_trl.viewer.data import _piece, page_data


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def data_of(*rollouts: Rollout, **changes: Any) -> dict[str, Any]:
    """The data as a page holds it: through JSON and back."""
    nothing = [None] * len(rollouts)
    lists = {"rewards": nothing, "advantages": nothing, "steps": nothing} | changes
    return json.loads(json.dumps(page_data(rollouts, byte_tokenizer(), **lists), allow_nan=False))


def test_numbers_have_four_digits(tokenizer):
    ids = tokenizer.encode(" 24 + 48 = 72")
    alpha = [0.123456, -1e-9, math.nan, math.inf] + [0.5] * (len(ids) - 4)
    data = data_of(text_rollout(" 24 + 48 = 72", alpha), rewards=[-math.inf], advantages=[1 / 3])
    (row,) = data["rollouts"]
    assert row["alpha"][:4] == [0.1235, 0.0, None, "inf"]
    assert (row["reward"], row["advantage"], row["step"]) == ("-inf", 0.3333, None)


def test_a_first_token_keeps_its_space(tokenizer):
    """SentencePiece drops it in `decode`; the page must not."""
    sentencepiece = SimpleNamespace(decode=lambda ids, **_: "".join([" a"] * len(ids)).removeprefix(" "))
    assert _piece(sentencepiece, 7) == " a"
    assert _piece(tokenizer, tokenizer.encode(" 24")[0]) == tokenizer.decode(tokenizer.encode(" 24")[:1])


def test_each_rollout_has_its_acceptance():
    """Mean of min(1, θ/q): θ/q is exp(-0.5) at each token, or above 1; at temperature 0 there is none."""
    rollouts = [text_rollout("We add"), text_rollout("We add", temperature=0.0)]
    rollouts.append(text_rollout("We add", log_q=torch.full((len(rollouts[0].completion_ids),), -3.0)))
    assert [row["acceptance"] for row in data_of(*rollouts)["rollouts"]] == [pytest.approx(0.6065), None, 1.0]


def test_a_group_is_the_completions_of_one_prompt_at_one_step(tokenizer):
    other = tokenizer.encode("Be brief.")
    rollouts = [
        text_rollout(" 24"),
        text_rollout(" 48", 0.0, mixture=Mixture.theta_only()),
        text_rollout(" 24", theta_prompt_ids=other),
        text_rollout(" 24"),
    ]
    rows = data_of(*rollouts, steps=[1, 1, 1, 2])["rollouts"]
    assert [row["group"] for row in rows] == [0, 0, 1, 2]
    assert [row["half"] for row in rows] == ["mixture", "student", "mixture", "mixture"]
    assert [row["prompt"] for row in rows] == [0, 0, 0, 0]


def test_likely_tokens_are_the_best_three_of_each_model():
    """A token that both models name stands once; a missing id and a token without mass are left out."""
    one = text_rollout("We")
    T = len(one.completion_ids)
    ids = torch.tensor([[9, 5, 7, 5, 8, -1]]).expand(T, 6)
    theta = torch.tensor([[0.1, 0.5, 0.2, 0.5, 0.15, 0.9]]).log().expand(T, 6)
    teacher = torch.tensor([[0.7, 0.0, 0.2, 0.0, 0.0, 0.9]]).log().expand(T, 6)
    dense = SimpleNamespace(ids=ids, log_theta=theta, log_teacher=teacher)
    data = data_of(SimpleNamespace(**vars(one), dense=dense))
    assert data["rollouts"][0]["likely"] == {
        "theta": {"ids": [5, 7, 8] * T, "probabilities": [0.5, 0.2, 0.15] * T},
        "teacher": {"ids": [9, 7, None] * T, "probabilities": [0.7, 0.2, 0.0] * T},
    }
    assert {"5", "7", "8", "9"} <= set(data["pieces"])
    without = SimpleNamespace(**vars(one), dense=SimpleNamespace(ids=None, log_theta=None, log_teacher=None))
    assert "likely" not in data_of(without)["rollouts"][0]
