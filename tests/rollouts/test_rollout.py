"""A rollout's weights by hand, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers.rollouts import LOG, empty, rollout
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.rollouts.dense import Dense
from optimal_sampling_trl.rollouts.request import Request
from optimal_sampling_trl.rollouts.rollout import RECORDS, Rollout, UnsolvedError, check_solved


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


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("alpha", "no token has mass under both models"),
        ("log_q", "log q is NaN"),
        ("log_theta", "the student returned NaN"),
        ("log_teacher", "the teacher returned NaN"),
    ],
)
def test_a_nan_in_any_record_is_named(name: str, cause: str) -> None:
    numbers = getattr(rollout(), name).clone()
    numbers[1] = torch.nan
    with pytest.raises(UnsolvedError, match=f"request 1, token 1: {cause}") as caught:
        check_solved([rollout(), rollout(**{name: numbers})])
    assert caught.value.rollouts[1] is None
    assert caught.value.rollouts[0] is not None


def test_the_student_alone_may_lack_a_teacher() -> None:
    """Its log t may be NaN, and a student that returned NaN is named without the teacher that did not run."""
    missing = torch.full((3,), torch.nan)
    alone = rollout(mixture=Mixture.theta_only(), alpha=torch.zeros(3), log_teacher=missing)
    check_solved([alone])
    student = replace(alone, log_theta=torch.tensor([-1.0, torch.nan, -1.0]))
    teacher = replace(alone, alpha=torch.tensor([0.0, torch.nan, 0.0]))  # it ran, so that α tells
    with pytest.raises(UnsolvedError, match=r"request 0, token 1: the student ret.*request 1, token 1: the teacher"):
        check_solved([student, teacher])


def test_no_mass_under_one_model_is_a_number() -> None:
    check_solved([rollout(log_theta=torch.full((3,), -torch.inf)), empty()])


def test_its_text_is_short_and_no_markup() -> None:
    long = rollout(text="<script>" * 100)
    assert repr(long).startswith("Rollout(text '<script><script>")
    assert "tokens 3, finish stop, mean alpha 0.500, mean log_q -1.304" in repr(long)
    assert len(repr(long)) < 220
    assert "<script>" not in long._repr_html_()
    assert "tokens 0" in repr(empty())


ALONE = [Mixture.theta_only(), Mixture("fixed", fixed_alpha=0.0), Mixture("trust_region", epsilon=0.0)]
"""Mixtures by which the student samples alone, whatever says so."""


@pytest.mark.parametrize("mixture", ALONE)
def test_the_student_alone_needs_no_teacher(mixture: Mixture) -> None:
    """What an engine has for the teacher is dropped: beside itself a student has any α. A failed row is still seen."""
    request = Request([1], [1], mixture, needs_teacher=False)
    records = torch.tensor([[0.5, 0.0, torch.nan], [-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0], [-7.0, -8.0, -9.0]])
    made = Rollout.from_request(request, [2, 3, 4], records, "", "length")
    assert made.alpha.nan_to_num(9.0).tolist() == [0.0, 0.0, 9.0]
    assert (made.log_q.tolist(), made.log_theta.tolist()) == ([-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0])
    assert bool(made.log_teacher.isnan().all())
    assert records[0, 0] == 0.5


@pytest.mark.parametrize(
    ("mixture", "dense"),
    [
        (Mixture(), None),
        (Mixture("fixed"), None),
        (Mixture("trust_region", epsilon=0.0, alpha_min=0.1), None),
        (Mixture.theta_only(), Dense(("overlap",))),
    ],
)
def test_a_mixture_or_dense_records_need_the_teacher(mixture: Mixture, dense: Dense | None) -> None:
    with pytest.raises(ValueError, match=r"`needs_teacher` is False .*wanted α 0 and no dense records"):
        Request([1], [1], mixture, dense=dense, needs_teacher=False)
