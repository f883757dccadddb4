"""The solver against the identities that define each method, and the number of passes that it needs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.strategies import RANGED, ROOTS, LogitPair, inside, kl, pairs, random_pair, share
from optimal_sampling_trl.mixture import (
    FORMS,
    SAME_DIVERGENCE,
    Mixture,
    MixtureRows,
    log_distributions,
    mix,
    solve_alpha,
    solver,
)
from optimal_sampling_trl.mixture.reference import reference

LOG_Q_TOLERANCE = 1e-5


def test_same_distribution_takes_the_middle_of_the_range() -> None:
    theta, _ = random_pair(len(RANGED), 6)
    rows = [Mixture(method, 0.1, 0.5, 0.3, entropy_scale=1e-3) for method in RANGED]
    alpha, log_q = mix(theta, theta.clone(), rows)
    wanted = {
        "kl_symmetry": 0.3,
        "ess_balance": 0.3,
        "trust_region": 0.5,
        "entropy": 0.5,
        "fixed": 0.3,
        "entropy_gate": 0.5,
    }
    assert alpha.tolist() == pytest.approx([wanted[method] for method in RANGED])
    assert (log_q - torch.log_softmax(theta, -1)).abs().max() < 1e-6


@pytest.mark.parametrize("method", ["kl_symmetry", "ess_balance"])
def test_near_equal_rows_are_solved_down_to_the_stated_divergence(method: str) -> None:
    """Above `SAME_DIVERGENCE` the equation is solved, below it the middle is taken: α tells which."""
    ratio = torch.tensor([[3.0, -1.0]], dtype=torch.float64)
    theta = torch.tensor([[0.1, 0.9]], dtype=torch.float64).log()
    variance = 0.1 * 0.9 * 4.0**2  # the Jeffreys divergence of θ and θ·e^(sℓ) is s²·Var[ℓ] for small s
    for factor, solved in ((4.0, True), (0.25, False)):
        teacher = theta + math.sqrt(factor * SAME_DIVERGENCE / variance) * ratio
        alpha, _ = mix(theta, teacher, Mixture(method, alpha_max=0.2))
        assert float(alpha) == pytest.approx(0.2 if solved else 0.1)
        assert float(reference(theta, teacher, Mixture(method, alpha_max=0.2))[0]) == pytest.approx(float(alpha))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_gate_opens_with_the_entropy_of_the_student(form: str, temperature: float) -> None:
    """By hand: H of n equal tokens is log n at any temperature, and that of a certain one is 0."""
    theta = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -math.inf, -math.inf], [0.0, -math.inf, -math.inf, -math.inf]]
    )
    _, teacher = random_pair(3, 4)
    gate = Mixture("entropy_gate", form=form, entropy_scale=math.log(3))
    wanted = [1.0, math.log(2) / math.log(3), 0.0]
    for alpha, log_q in (mix(theta, teacher, gate, temperature), reference(theta, teacher, gate, temperature)):
        assert alpha.tolist() == pytest.approx(wanted, abs=1e-6)
        assert torch.allclose(log_q[0].double(), torch.log_softmax(teacher[0].double() / temperature, -1), atol=1e-6)
        assert log_q[2].exp().tolist() == [1.0, 0.0, 0.0, 0.0]
    narrow = Mixture("entropy_gate", 0.2, 0.6, form=form, entropy_scale=math.log(3))
    assert mix(theta, teacher, narrow, temperature)[0].tolist() == pytest.approx([0.6, 0.6, 0.2])


def solved_pair(mixture: Mixture, N: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log θ, log t, α and log q of N random rows in float64."""
    log_theta, log_teacher = log_distributions(*random_pair(N, 9))
    alpha = solve_alpha(log_theta, log_teacher, MixtureRows.of([mixture] * N))
    return log_theta, log_teacher, alpha, inside(log_theta, log_teacher, alpha)


def test_kl_symmetry_is_as_far_from_the_student_as_from_the_teacher() -> None:
    log_theta, log_teacher, alpha, log_q = solved_pair(Mixture())
    assert bool(((alpha > 0) & (alpha < 1)).all())
    assert (kl(log_q, log_theta) - kl(log_q, log_teacher)).abs().max() < 1e-8


def test_ess_balance_gives_both_weights_one_effective_sample_size() -> None:
    log_theta, log_teacher, alpha, log_q = solved_pair(Mixture("ess_balance"))
    inverse_theta, inverse_teacher = ((2 * row - log_q).exp().sum(-1) for row in (log_theta, log_teacher))
    inner = (alpha > 0) & (alpha < 1)
    assert inner.sum() >= 30
    assert (inverse_theta / inverse_teacher - 1)[inner].abs().max() < 1e-8
    # At an end the root lies beyond it: the sums still differ, in the direction that the end is for.
    assert bool((inverse_theta > inverse_teacher)[alpha == 0].all())
    assert bool((inverse_theta < inverse_teacher)[alpha == 1].all())


@pytest.mark.parametrize("epsilon", [1e-4, 0.05, 1.0, 5.0])
def test_trust_region_spends_its_budget_or_is_the_teacher(epsilon: float) -> None:
    log_theta, _, alpha, log_q = solved_pair(Mixture("trust_region", epsilon=epsilon))
    spent = kl(log_q, log_theta)
    assert (spent - epsilon)[alpha < 1].abs().max() < 1e-8 if bool((alpha < 1).any()) else epsilon == 5.0
    assert bool((spent[alpha == 1] <= epsilon).all())


def test_trust_region_rises_with_its_budget() -> None:
    pair = random_pair(20, 9)
    budgets = [0.0, 1e-6, 1e-3, 0.01, 0.05, 0.2, 1.0, 3.0, 50.0]
    alphas = torch.stack([mix(*pair, Mixture("trust_region", epsilon=epsilon))[0] for epsilon in budgets])
    assert bool((alphas.diff(dim=0) >= 0).all())
    assert alphas[0].max() < 1e-6
    assert bool((alphas[-1] == 1).all())
    assert bool((alphas[4] > alphas[2]).all())


@settings(max_examples=60)
@given(pairs(kinds=("random",), scale=3.0), st.sampled_from(["kl_symmetry", "ess_balance", "entropy"]), share, share)
def test_teacher_and_student_change_places(pair: LogitPair, method: str, one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    alpha, log_q = mix(pair.theta, pair.teacher, Mixture(method, low, high))
    swapped, swapped_log_q = mix(pair.teacher, pair.theta, Mixture(method, 1 - high, 1 - low))
    assert (alpha - (1 - swapped)).abs().max() < 1e-6
    assert (log_q - swapped_log_q).abs().max() < LOG_Q_TOLERANCE


@pytest.mark.parametrize("method", RANGED)
def test_a_root_outside_of_the_range_is_its_nearer_end(method: str) -> None:
    pair = random_pair(20, 9)
    free = mix(*pair, Mixture(method))[0]
    for low, high in ((0.0, 0.01), (0.99, 1.0), (0.4, 0.6), (0.3, 0.3)):
        fixed = min(max(0.5, low), high)
        alpha, _ = mix(*pair, Mixture(method, low, high, fixed))
        assert (alpha - free.clamp(low, high)).abs().max() < 1e-6
        assert bool((alpha[free < low] == torch.tensor(low)).all())
        assert bool((alpha[free > high] == torch.tensor(high)).all())


@pytest.mark.parametrize("method", ROOTS)
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.5, 1.0), (0.0, 0.2)])
def test_the_solver_takes_few_passes(method: str, low: float, high: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the root lies outside of the range, to whose end bisection would creep in 30, and where a row is
    solved long before others, which it must not leave again (a GPU makes a fixed number of passes)."""
    passes, residual_of = 0, solver._RESIDUALS[method]

    def counted(*arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        return residual_of(*arguments)

    monkeypatch.setitem(solver._RESIDUALS, method, counted)
    for scale in (0.3, 2.0, 8.0):
        for epsilon in (0.05, 2.0):
            passes = 0
            mix(*random_pair(200, 50, scale=scale), Mixture(method, low, high, high, epsilon))
            assert 1 <= passes <= 16
