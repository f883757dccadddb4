"""The method `top_k_swap`, q = θ·1[S] + α·t: by hand, by the two draws that define it, and in raw logits."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.strategies import random_pair
from optimal_sampling_trl.mixture import Mixture, MixtureRows, mix, mix_at
from optimal_sampling_trl.mixture.reference import reference

THETA, TEACHER = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log(), torch.tensor([[0.1, 0.2, 0.6, 0.1]]).log()
BY_HAND = {
    # S is the third token alone, where the student has 1/10
    1: (0.9, [0.09, 0.18, 0.1 + 0.54, 0.09]),
    # and the second
    2: (0.6, [0.06, 0.3 + 0.12, 0.1 + 0.36, 0.06]),
    # the first and the last tie as the third likeliest
    3: (0.0, [0.5, 0.3, 0.1, 0.1]),
    4: (0.0, [0.5, 0.3, 0.1, 0.1]),
    100: (0.0, [0.5, 0.3, 0.1, 0.1]),
}


@pytest.mark.parametrize("K", BY_HAND)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_four_tokens_by_hand(K: int, temperature: float) -> None:
    want, q = BY_HAND[K]
    logits = (temperature * THETA + 3.0, temperature * TEACHER - 5.0)
    mixture = Mixture("top_k_swap", swap_top_k=K)
    for alpha, log_q in (mix(*logits, mixture, temperature), reference(*logits, mixture, temperature)):
        assert float(alpha) == pytest.approx(want, abs=1e-6)
        assert log_q.exp()[0].tolist() == pytest.approx(q, abs=1e-6)


def test_it_is_the_two_draws() -> None:
    """A draw of the student, and one of the teacher in its place where it is not in S: how often each token comes."""
    N, V, K = 400_000, 12, 4
    theta, teacher = random_pair(1, V)
    generator = torch.Generator().manual_seed(0)
    drawn, instead = (
        torch.multinomial(row[0].double().softmax(-1), N, replacement=True, generator=generator)
        for row in (theta, teacher)
    )
    is_kept = torch.isin(drawn, teacher[0].topk(K).indices)
    seen = torch.bincount(torch.where(is_kept, drawn, instead), minlength=V) / N
    alpha, log_q = mix(theta, teacher, Mixture("top_k_swap", swap_top_k=K))
    error = (log_q[0].exp() * (1 - log_q[0].exp()) / N).sqrt()
    assert bool(((seen - log_q[0].exp()).abs() < 5 * error).all())
    assert float(alpha) == pytest.approx(float((~is_kept).double().mean()), abs=5 / math.sqrt(N))


def test_tokens_that_the_teacher_rules_out() -> None:
    """They are not in S, however few are left; q has none of them, and their mass is drawn by the teacher."""
    theta = torch.zeros(1, 4)
    teacher = torch.tensor([[1.0, 0.0, -torch.inf, -torch.inf]])
    t = teacher.softmax(-1)[0]
    for K in (2, 3, 9):
        for solve in (mix, reference):
            alpha, log_q = solve(theta, teacher, Mixture("top_k_swap", swap_top_k=K))
            assert float(alpha) == pytest.approx(0.5)
            wanted = [0.25 + 0.5 * float(t[0]), 0.25 + 0.5 * float(t[1]), 0.0, 0.0]
            assert log_q.exp()[0].tolist() == pytest.approx(wanted)


def test_without_a_common_token_the_teacher_draws() -> None:
    theta, teacher = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([[-torch.inf, -torch.inf, 2.0]])
    for solve in (mix, reference):
        alpha, log_q = solve(theta, teacher, Mixture("top_k_swap", swap_top_k=2))
        assert float(alpha) == 1.0
        assert log_q[0].tolist() == [-math.inf, -math.inf, 0.0]


def test_ties_in_a_low_precision_are_all_kept() -> None:
    theta, teacher = (row.bfloat16() for row in random_pair(50, 300))
    teacher = (teacher / 2).round() * 2  # a handful of values
    alpha, log_q = mix(theta, teacher, Mixture("top_k_swap", swap_top_k=5))
    p, r = (row.double().softmax(-1) for row in (theta, teacher))
    kept = teacher >= teacher.topk(5).values[:, -1:]
    assert bool((kept.sum(-1) > 5).any())
    assert torch.allclose(alpha.double(), (p * ~kept).sum(-1), atol=1e-6)
    assert torch.allclose(log_q.double().exp(), p * kept + alpha.double()[:, None] * r, atol=1e-6)


def test_a_little_outside_is_as_exact_as_much() -> None:
    """α = 1 - θ(S) would be 0 or rounding where the student has 1e-20 outside of S."""
    theta, teacher = torch.tensor([[0.0, -46.0, -50.0]]), torch.tensor([[3.0, 0.0, 1.0]])
    alpha, log_q = mix(theta, teacher, Mixture("top_k_swap", swap_top_k=1))
    want = math.exp(-46) + math.exp(-50)
    assert float(alpha) == pytest.approx(want, rel=1e-6)
    log_teacher = teacher.log_softmax(-1)[0]
    assert log_q[0, 1:].tolist() == pytest.approx((math.log(want) + log_teacher[1:]).tolist(), rel=1e-6)


def test_each_row_has_its_k_and_other_methods_none() -> None:
    theta, teacher = random_pair(6, 30)
    rows = [Mixture("top_k_swap", swap_top_k=K) for K in (1, 7, 30, 500)]
    rows = [Mixture(), *rows[:2], Mixture("fixed", form="arithmetic"), *rows[2:]]
    together = mix(theta, teacher, rows)
    for n, mixture in enumerate(rows):
        alone = mix(theta[n : n + 1], teacher[n : n + 1], mixture)
        for one, other in zip(alone, together):
            assert torch.allclose(one[0], other[n], atol=1e-6)


def test_padding_of_either_vocabulary_is_not_among_the_likeliest() -> None:
    theta, teacher = random_pair(4, 9)
    mixture, padded = Mixture("top_k_swap", swap_top_k=2), torch.full((4, 3), 1e4)
    want = mix(theta, teacher, mixture)
    for sides in ((torch.cat([theta, padded], 1), teacher), (theta, torch.cat([teacher, padded], 1))):
        for got, wanted in zip(mix(*sides, mixture), want):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_raw_logits_are_the_mixture_at_the_temperature(temperature: float) -> None:
    """And where nothing is swapped, the student's own: a penalty on repetition reads the sign of a logit."""
    theta, teacher = random_pair(20, 9)
    mixture = Mixture("top_k_swap", swap_top_k=3)
    alpha, log_q = mix(theta, teacher, mixture, temperature)
    raw = mix_at(theta, teacher, alpha, MixtureRows.of([mixture] * 20), torch.full((20,), temperature))
    assert (torch.softmax(raw / temperature, -1) - log_q.exp()).abs().max() < 1e-5
    all_of_them = MixtureRows.of([Mixture("top_k_swap", swap_top_k=9)] * 20)
    whole = mix_at(theta, teacher, torch.zeros(20), all_of_them, temperature)
    assert (whole - theta).abs().max() < 1e-5
