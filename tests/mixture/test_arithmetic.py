"""The arithmetic form, q = (1-α)θ + αt: by hand, by the identities of its methods, and as raw logits for an engine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from helpers.strategies import RANGED, inside, kl, random_pair
from optimal_sampling_trl.mixture import (
    Mixture,
    MixtureRows,
    log_distributions,
    mix,
    mix_at,
    solve_alpha,
    solver,
)
from optimal_sampling_trl.mixture.reference import reference

ARITHMETIC = [Mixture(method, form="arithmetic") for method in RANGED if method != "ess_balance"]
LOG_HALVES, LOG_FIFTHS = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.8, 0.2]]).log()
BY_HAND = {
    # θ = (1/2, 1/2) and t = (4/5, 1/5): Eθ[ℓ] = log(8/5 · 2/5)/2 and Et[ℓ] = log(8/5)·4/5 + log(2/5)/5
    "kl_symmetry": (
        Mixture(form="arithmetic"),
        -math.log(0.64) / 2 / (0.8 * math.log(1.6) + 0.2 * math.log(0.4) - math.log(0.64) / 2),
    ),
    # the ε of q = (3/5, 2/5), which is a third of the way from 1/2 to 4/5
    "trust_region": (
        Mixture("trust_region", epsilon=0.6 * math.log(1.2) + 0.4 * math.log(0.8), form="arithmetic"),
        1 / 3,
    ),
    "fixed": (Mixture("fixed", fixed_alpha=0.25, form="arithmetic"), 0.25),
}


@pytest.mark.parametrize("method", BY_HAND)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_two_tokens_by_hand(method: str, temperature: float) -> None:
    mixture, want = BY_HAND[method]
    logits = (temperature * LOG_HALVES + 3.0, temperature * LOG_FIFTHS - 5.0)
    for alpha, log_q in (mix(*logits, mixture, temperature), reference(*logits, mixture, temperature)):
        assert float(alpha) == pytest.approx(want, abs=1e-6)
        assert log_q.exp()[0].tolist() == pytest.approx([0.5 + 0.3 * want, 0.5 - 0.3 * want], abs=1e-6)


@pytest.mark.parametrize("temperature", [0.75, 1.0, 1.3])
@pytest.mark.parametrize("epsilon", [1e-4, 0.05, 20.0])
def test_equal_models_never_spend_the_budget(temperature: float, epsilon: float) -> None:
    """KL(q‖θ) is 0 or rounding at any α, of either sign: the answer is the end of the range."""
    logits = torch.tensor([[0.1543, -0.0293], [-1.0, 3.0], [0.0, 0.0]])
    mixture = Mixture("trust_region", alpha_max=0.9, epsilon=epsilon, form="arithmetic")
    assert mix(logits, logits.clone(), mixture, temperature)[0].tolist() == pytest.approx([0.9] * 3)


@pytest.mark.parametrize("seed", range(5))
def test_ess_balance_is_a_half_whatever_the_models(seed: int) -> None:
    """Why it is refused: Σθ²/q = Σt²/q at α = 1/2, also where the two have other tokens."""
    theta, teacher = (row.double().softmax(-1) for row in random_pair(4, 9, seed))
    theta[:, 3], teacher[:, 5] = 0.0, 0.0
    theta, teacher = theta / theta.sum(-1, keepdim=True), teacher / teacher.sum(-1, keepdim=True)
    q = (theta + teacher) / 2
    assert torch.allclose((theta.square() / q).sum(-1), (teacher.square() / q).sum(-1), rtol=1e-12)


def test_tokens_of_one_model_alone() -> None:
    """They are in q, and in no equation of `kl_symmetry`; the student's lack of one spends any budget."""
    theta = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).log()
    teacher = torch.tensor([[0.2, 0.5, 0.0, 0.3]]).log()
    ratio = torch.tensor([math.log(0.4), math.log(5 / 3)])
    of_theta, of_teacher = (torch.tensor(p) @ ratio for p in ([0.5, 0.3], [0.2, 0.5]))
    for solve in (mix, reference):
        alpha, log_q = solve(theta, teacher, Mixture(form="arithmetic"))
        assert float(alpha) == pytest.approx(float(-of_theta / (of_teacher - of_theta)), abs=1e-6)
        assert bool(log_q.isfinite().all())
        assert float(log_q.exp().sum()) == pytest.approx(1)
        alpha, _ = solve(theta, teacher, Mixture("trust_region", alpha_min=0.1, epsilon=5.0, form="arithmetic"))
        assert float(alpha) == pytest.approx(0.1)
        alpha, _ = solve(teacher[:, :3], theta[:, :3], Mixture("trust_region", epsilon=5.0, form="arithmetic"))
        assert float(alpha) == 0.0


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.5, 1.0), (0.0, 0.2)])
def test_the_solver_takes_few_passes(low: float, high: float, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, kl_and_slope = 0, solver.kl_and_slope

    def counted(*arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        return kl_and_slope(*arguments)

    monkeypatch.setattr(solver, "kl_and_slope", counted)
    for scale in (0.3, 2.0, 8.0):
        for epsilon in (1e-4, 0.05, 2.0):
            passes = 0
            mix(*random_pair(200, 50, scale=scale), Mixture("trust_region", low, high, high, epsilon, "arithmetic"))
            assert 1 <= passes <= 16


@pytest.mark.parametrize("epsilon", [1e-4, 0.05, 1.0, 5.0])
def test_trust_region_spends_its_budget_or_is_the_teacher(epsilon: float) -> None:
    mixture = Mixture("trust_region", epsilon=epsilon, form="arithmetic")
    log_theta, log_teacher = log_distributions(*random_pair(40, 9))
    alpha = solve_alpha(log_theta, log_teacher, MixtureRows.of([mixture] * 40))
    spent = kl(inside(log_theta, log_teacher, alpha, "arithmetic"), log_theta)
    assert (spent - epsilon)[alpha < 1].abs().max() < 1e-8 if bool((alpha < 1).any()) else epsilon == 5.0
    assert bool((spent[alpha == 1] <= epsilon).all())


def test_trust_region_steps_back_from_the_teacher() -> None:
    """At α = 1 the slope of KL(q‖θ) is infinite where the teacher lacks a token; the root lies just before it."""
    theta, teacher = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.9, 0.1, 0.0]]).log()
    most = float(kl(teacher, theta))
    for part in (0.5, 0.9, 0.99, 1 - 1e-4, 1 - 1e-6, 1 + 1e-6):
        mixture = Mixture("trust_region", epsilon=part * most, form="arithmetic")
        alpha, want = mix(theta, teacher, mixture)[0], reference(theta, teacher, mixture)[0]
        assert float(alpha) == pytest.approx(float(want), abs=1e-6)
        assert (float(alpha) == 1.0) == (part > 1)


def test_kl_symmetry_is_as_far_from_the_student_as_from_the_teacher() -> None:
    log_theta, log_teacher = log_distributions(*random_pair(40, 9))
    alpha = solve_alpha(log_theta, log_teacher, MixtureRows.of([Mixture(form="arithmetic")] * 40))
    log_q = inside(log_theta, log_teacher, alpha, "arithmetic")
    assert bool(((alpha > 0) & (alpha < 1)).all())
    assert (kl(log_q, log_theta) - kl(log_q, log_teacher)).abs().max() < 1e-8


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_averaged_raw_logits_are_the_mixture_at_the_temperature(temperature: float) -> None:
    """The arithmetic mean is taken at the temperature, and the temperature is multiplied in for the engine."""
    theta, teacher = random_pair(20, 9)
    for mixture in ARITHMETIC:
        rows = MixtureRows.of([mixture] * 20)
        alpha, log_q = mix(theta, teacher, mixture, temperature)
        raw = mix_at(theta.double(), teacher.double(), alpha.double(), rows, torch.full((20,), temperature))
        assert (torch.softmax(raw / temperature, -1) - log_q.exp()).abs().max() < 1e-6
        p, r = ((row.double() / temperature).softmax(-1) for row in (theta, teacher))
        weight = alpha.double()[:, None]
        assert (log_q.exp() - ((1 - weight) * p + weight * r)).abs().max() < 1e-6


def test_averaged_raw_logits_are_continuous_at_the_ends() -> None:
    theta, teacher = random_pair(4, 9)
    rows = MixtureRows.of([Mixture(form="arithmetic")] * 4)
    for end, side in ((0.0, theta), (1.0, teacher)):
        assert torch.equal(mix_at(theta, teacher, torch.full((4,), end), rows, 0.7), side)
        near = torch.full((4,), abs(end - 1e-12), dtype=torch.float64)
        assert (mix_at(theta.double(), teacher.double(), near, rows, 0.7) - side).abs().max() < 1e-5
