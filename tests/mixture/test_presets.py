"""The published mixtures: what each draws from, by hand, and names that are none."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.strategies import random_pair
from optimal_sampling_trl import Mixture, mix
from optimal_sampling_trl.mixture.presets import PUBLISHED

THETA, TEACHER = (row.double() for row in random_pair(30, 12))
P, R = THETA.softmax(-1), TEACHER.softmax(-1)


def test_mentor_is_the_average_by_the_students_entropy() -> None:
    """q = θ + w(t-θ) with w = min(1, H(θ)/γ), as its sampler modifies the teacher's probabilities; γ is 1.5."""
    weight = (-(P * P.log()).sum(-1) / 1.5).clamp(max=1)
    assert 0 < int((weight < 1).sum()) < 30
    alpha, log_q = mix(THETA, TEACHER, Mixture.preset("mentor"))
    assert torch.allclose(alpha.double(), weight, atol=1e-6)
    assert torch.allclose(log_q.double().exp(), P + weight[:, None] * (R - P), atol=1e-6)


def test_logit_fusion_averages_the_logits() -> None:
    _, log_q = mix(THETA, TEACHER, Mixture.preset("logit-fusion"))
    assert torch.allclose(log_q.double(), ((THETA + TEACHER) / 2).log_softmax(-1), atol=1e-5)


def test_minillm_is_the_teacher_once_in_five_tokens() -> None:
    _, log_q = mix(THETA, TEACHER, Mixture.preset("minillm"))
    assert torch.allclose(log_q.double().exp(), 0.8 * P + 0.2 * R, atol=1e-6)


def test_trb_spends_its_budget() -> None:
    alpha, log_q = mix(THETA, TEACHER, Mixture.preset("trb"))
    spent = (log_q.double().exp() * (log_q.double() - P.log())).sum(-1)
    assert bool((alpha < 1).all())
    assert spent.tolist() == pytest.approx([0.01] * 30, abs=1e-5)


def test_skd_swaps_what_is_not_among_the_teachers_25_likeliest() -> None:
    theta, teacher = random_pair(20, 60)
    p, r = (row.double().softmax(-1) for row in (theta, teacher))
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(1, r.topk(25).indices, True)
    alpha, log_q = mix(theta, teacher, Mixture.preset("skd"))
    swapped = 1 - (p * kept).sum(-1)
    assert torch.allclose(alpha.double(), swapped, atol=1e-6)
    assert torch.allclose(log_q.double().exp(), p * kept + swapped[:, None] * r, atol=1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_sets_its_mixture_and_nothing_else(name: str) -> None:
    assert Mixture.preset(name) == Mixture(**PUBLISHED[name])
    assert math.isfinite(sum(Mixture.preset(name).numbers()))


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^Unknown preset 'mentr'\. Known: .*Did you mean 'mentor'\?"):
        Mixture.preset("mentr")
