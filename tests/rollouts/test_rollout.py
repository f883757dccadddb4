"""A rollout's weights by hand, what it refuses, and its way to a dataset and a Parquet file and back, without loss."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.strategies import EDGES, assert_same, rollouts
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.rollouts.rollout import RECORDS, Rollout, check_solved, features, from_dataset, to_dataset

LOG = {share: math.log(share) for share in (0.1, 0.2, 0.25, 0.4, 0.5, 0.8)}


def rollout(**fields: Any) -> Rollout:
    """Three tokens with θ = (0.2, 0.25, 0.4), t = (0.8, 0.25, 0.1) and q = (0.4, 0.25, 0.2)."""
    values: dict[str, Any] = {
        "prompt_ids": [5, 6],
        "theta_prompt_ids": [7],
        "completion_ids": [1, 2, 3],
        "alpha": torch.tensor([0.5, 0.0, 1.0]),
        "log_q": torch.tensor([LOG[0.4], LOG[0.25], LOG[0.2]]),
        "log_theta": torch.tensor([LOG[0.2], LOG[0.25], LOG[0.4]]),
        "log_teacher": torch.tensor([LOG[0.8], LOG[0.25], LOG[0.1]]),
        "text": "abc",
        "finish_reason": "stop",
        "mixture": Mixture(),
    }
    return Rollout(**(values | fields))


def empty() -> Rollout:
    return rollout(completion_ids=[], text="", **{name: torch.zeros(0) for name in RECORDS})


@settings(max_examples=100)
@given(st.lists(rollouts(), max_size=3))
def test_dataset_and_back_loses_nothing(wanted: list[Rollout]) -> None:
    dataset = to_dataset(wanted)
    assert dataset.features == features()
    found = from_dataset(dataset)
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted):
        assert_same(got, want)


def test_parquet_and_back_loses_nothing(tmp_path: Path) -> None:
    from datasets import Dataset

    edges = torch.tensor(EDGES)
    tokens = list(range(len(EDGES)))
    wanted = [
        rollout(
            text="“ein\n\0🦜 Satz\u200d”", mixture=Mixture("trust_region", 0.1, 1 / 3, 0.2, 1e-9), temperature=0.1
        ),
        empty(),
        rollout(completion_ids=tokens, **{name: edges.roll(n) for n, name in enumerate(RECORDS)}),
        rollout(completion_ids=[9], **{name: torch.tensor([torch.nan]) for name in RECORDS}),
    ]
    path = str(tmp_path / "rollouts.parquet")
    to_dataset(wanted).to_parquet(path)
    dataset = Dataset.from_parquet(path, cache_dir=str(tmp_path / "cache"))
    assert dataset.features == features()
    for got, want in zip(from_dataset(dataset), wanted, strict=True):
        assert_same(got, want)


def test_no_rollouts_are_a_dataset_too() -> None:
    dataset = to_dataset([])
    assert dataset.features == features()
    assert from_dataset(dataset) == []


def test_a_dataset_without_a_column_is_refused() -> None:
    dataset = to_dataset([rollout()]).remove_columns(["log_theta", "temperature"])
    with pytest.raises(
        ValueError, match=r"lacks log_theta, temperature; it has prompt_ids, .* that `to_dataset` writes"
    ):
        from_dataset(dataset)


def test_a_dataset_with_another_mixture_is_refused() -> None:
    row = to_dataset([rollout()])[0]
    row["mixture"]["alpha_minimum"] = 0.5
    with pytest.raises(ValueError, match=r"Unknown field of a mixture 'alpha_minimum'.*Did you mean 'alpha_min'"):
        from_dataset([row])


def test_weights_by_hand() -> None:
    assert rollout().weight_theta.tolist() == pytest.approx([0.2 / 0.4, 1.0, 0.4 / 0.2])
    assert rollout().weight_teacher.tolist() == pytest.approx([0.8 / 0.4, 1.0, 0.1 / 0.2])
    assert rollout().mixing_weights.tolist() == [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]
    impossible = rollout(log_theta=torch.tensor([-torch.inf, LOG[0.25], LOG[0.4]]))
    assert impossible.weight_theta.tolist() == pytest.approx([0.0, 1.0, 2.0])


def test_effective_sample_size_by_hand() -> None:
    assert rollout().effective_sample_size == pytest.approx((0.5 + 1 + 2) ** 2 / (0.25 + 1 + 4))
    alike = rollout(log_q=rollout().log_theta + 3.0)
    assert alike.effective_sample_size == pytest.approx(3.0)
    one = rollout(log_theta=torch.tensor([-torch.inf, LOG[0.25], -torch.inf]))
    assert one.effective_sample_size == pytest.approx(1.0)


def test_effective_sample_size_of_nothing_is_nothing() -> None:
    assert empty().effective_sample_size == 0.0
    assert empty().mixing_weights.shape == (0, 2)
    assert rollout(log_theta=torch.full((3,), -torch.inf)).effective_sample_size == 0.0


@pytest.mark.parametrize("shift", [-500.0, -100.0, 80.0, 500.0])
def test_effective_sample_size_has_no_scale(shift: float) -> None:
    """Weights of e^±500 are beyond any float: a student that hates all of the teacher's tokens, or the reverse."""
    shifted = rollout(log_theta=rollout().log_theta + shift)
    assert shifted.effective_sample_size == pytest.approx(3.5**2 / 5.25, rel=1e-4)


@pytest.mark.parametrize("name", ["weight_theta", "weight_teacher", "effective_sample_size"])
def test_temperature_0_has_no_weights(name: str) -> None:
    with pytest.raises(ValueError, match=r"temperature 0 has no importance weights.*Sample at a temperature above 0"):
        getattr(rollout(temperature=0.0), name)
    assert rollout(temperature=0.0).mixing_weights.shape == (3, 2)


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), (0,)])
def test_a_record_of_another_length_is_refused(name: str, shape: tuple[int, ...]) -> None:
    text = rf"Rollout: `{name}` has shape \({shape[0]},.*\); wanted one entry for each of the 3 tokens of `completion"
    with pytest.raises(ValueError, match=text):
        rollout(**{name: torch.zeros(shape)})


def test_tokens_without_a_solution_are_named() -> None:
    nan = torch.nan
    check_solved([rollout(), empty()])
    student = replace(rollout(), alpha=torch.tensor([0.5, nan, nan]), log_theta=torch.tensor([-1.0, nan, nan]))
    both = replace(student, log_teacher=torch.tensor([-1.0, nan, -1.0]))
    # The first token is to blame, not the NaN that follows from it.
    neither = replace(rollout(), alpha=torch.tensor([nan, nan, 0.5]), log_theta=torch.tensor([-1.0, nan, -1.0]))
    with pytest.raises(ValueError, match=r"no solution in 3 request\(s\)") as error:
        check_solved([student, rollout(), both, neither])
    for text in (
        "request 0, token 1: the student returned NaN;",
        "request 2, token 1: the student and the teacher returned NaN;",
        "request 3, token 0: no token has mass under both models.",
        "look at the model's checkpoint and dtype",
    ):
        assert text in str(error.value)
