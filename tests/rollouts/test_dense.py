"""Dense records by hand, and what a wish for them refuses."""

from __future__ import annotations

import pytest
import torch

from helpers.rollouts import rollout
from optimal_sampling_trl.rollouts.dense import SCALARS, Dense, DenseRecords


def by_hand() -> DenseRecords:
    """Three tokens with two likeliest tokens of each model: all different, one in common, all in common."""
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 1, 2], [0, 1, 1, 0]])
    theta = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    teacher = torch.tensor([0.0, 0.25, 0.5, 0.125])
    return DenseRecords({"overlap": torch.tensor([0.5, 1.0, 0.25])}, ids, theta[ids].log(), teacher[ids].log())


def test_tails_count_a_token_once() -> None:
    assert by_hand().is_first.tolist() == [[True] * 4, [True, True, False, True], [True, True, False, False]]
    assert by_hand().tail_theta.tolist() == pytest.approx([0.0625, 0.125, 0.25])
    assert by_hand().tail_teacher.tolist() == pytest.approx([0.125, 0.25, 0.75])


def test_a_tail_is_not_below_0() -> None:
    ids, log_half = torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.5]]).log()
    assert DenseRecords({}, ids, log_half, log_half).tail_theta.tolist() == [0.0]


def test_without_likeliest_tokens_the_tail_is_all() -> None:
    nothing = torch.zeros(2, 0)
    assert DenseRecords({}, nothing.long(), nothing, nothing).tail_teacher.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, r"`scalars` is empty and `top_k` is 0, which asks for nothing.*Pass None"),
        ({"scalars": ("kl_theta",)}, r"Unknown dense scalar 'kl_theta'. Known: entropy_teacher, .*Did you mean"),
        ({"scalars": ("overlap", "overlap")}, "wanted each name once"),
        ({"scalars": "overlap"}, r"`scalars` is 'overlap'; wanted a tuple of names"),
        ({"scalars": (["overlap"],)}, "Unknown dense scalar"),
        ({"top_k": -1}, "`top_k` is -1; wanted a whole number of at least 0. 0 is none."),
        ({"top_k": 2.0}, "`top_k` is 2.0; wanted a whole number"),
        ({"top_k": True}, "`top_k` is True; wanted a whole number"),
    ],
)
def test_a_bad_wish_is_refused(settings: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Dense(**settings)


def test_a_wish_is_a_value() -> None:
    assert Dense(scalars=list(SCALARS)) == Dense(scalars=SCALARS)
    assert len({Dense(top_k=2), Dense(("overlap",)), Dense(top_k=2)}) == 2


def test_more_tokens_than_the_models_share_are_refused() -> None:
    Dense(top_k=300).check_vocabulary(300)
    with pytest.raises(ValueError, match=r"`top_k` is 301; wanted a whole number from 0 to 300\. Both models share"):
        Dense(top_k=301).check_vocabulary(300)


def test_records_of_other_shapes_are_refused() -> None:
    ids, numbers = torch.zeros(3, 2).long(), torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"`log_teacher` has shape \(3, 1\) and `ids` \(3, 2\)"):
        DenseRecords({}, ids, numbers, numbers[:, :1])
    with pytest.raises(ValueError, match=r"`overlap` has shape \(2,\); wanted one entry for each of the 3 tokens"):
        DenseRecords({"overlap": torch.zeros(2)}, ids, numbers, numbers)
    with pytest.raises(ValueError, match="Unknown dense scalar 'overlaps'"):
        DenseRecords({"overlaps": torch.zeros(3)}, ids, numbers, numbers)
    with pytest.raises(ValueError, match="as many tokens of each model in K"):
        DenseRecords({}, ids[:, :1], numbers[:, :1], numbers[:, :1])
    with pytest.raises(ValueError, match="`dense` has records of 2 tokens; wanted one for each of the 3"):
        rollout(dense=DenseRecords({}, ids[:2], numbers[:2], numbers[:2]))
