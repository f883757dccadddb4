"""The mixture against its float64 reference, against identities of the mathematics, and against arithmetic by hand.

Both `mix` and `reference` turn the same values into float64 first, so that bfloat16 logits get float32's tolerances:
α within 1e-5 and log q within 1e-5 plus float32's own rounding of it (6e-8 of its size).

Where an equation is flat (three tokens 60 nats apart: the mixture is one token over most of the range), float64 does
not define α to 1e-5. There the residual of the equation at the returned α must vanish, and the two mixtures must be
one distribution: as d(residual)/dα = Var_q[ℓ], residuals below r leave a total variation of at most √(2r)/2.
"""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.strategies import (
    ADVERSARIAL,
    BROKEN,
    ROOTS,
    Pair,
    inside,
    make_row,
    mixtures,
    pairs,
    random_pair,
    share,
    temperatures,
)
from optimal_sampling_trl.mixture import (
    METHODS,
    SAME_DIVERGENCE,
    Mixture,
    MixtureRows,
    blend,
    fold_eos,
    log_distributions,
    mix,
    solve_alpha,
    solver,
)
from optimal_sampling_trl.mixture.reference import reference

ALPHA_TOLERANCE = 1e-5
LOG_Q_TOLERANCE = 1e-5
FLOAT32_ROUNDING = 6e-8
RESIDUAL_TOLERANCE = 1e-12
"""Of the largest |ℓ|, log θ or log t of the row (at least 1): what float64 leaves of a sum that should be 0."""


def kl(log_p: Tensor, log_other: Tensor) -> Tensor:
    """KL(p‖other) of rows; a token without mass under p adds nothing."""
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_other), 0.0).sum(-1)


def ess_inverse(log_target: Tensor, log_q: Tensor) -> Tensor:
    """log Σ target²/q over the tokens that q has: the inverse effective sample size of the weights target/q."""
    return torch.logsumexp(torch.where(log_q > -torch.inf, 2 * log_target - log_q, -torch.inf), -1)


def residual(mixture: Mixture, log_theta: Tensor, log_teacher: Tensor, alpha: Tensor) -> Tensor:
    """What the method's equation, written as it is defined, leaves at `alpha` in each row; rises in α."""
    log_q = inside(log_theta, log_teacher, alpha)
    if mixture.method == "kl_symmetry":
        return kl(log_q, log_theta) - kl(log_q, log_teacher)
    if mixture.method == "ess_balance":
        return ess_inverse(log_theta, log_q) - ess_inverse(log_teacher, log_q)
    return kl(log_q, log_theta) - mixture.epsilon


def assert_row(
    theta: Tensor, teacher: Tensor, mixture: Mixture, temperature: float, got: tuple[Tensor, Tensor]
) -> str:
    """One row (1, V) of `mix` against the reference; returns which criterion it met."""
    alpha, log_q = (value.double() for value in got)
    want_alpha, want_log_q = reference(theta, teacher, mixture, temperature)
    if want_alpha.isnan():
        assert alpha.isnan()
        assert log_q.isnan().all()
        return "no solution"
    assert mixture.alpha_min - 1e-7 <= alpha <= mixture.alpha_max + 1e-7
    supports_agree = torch.equal(log_q == -torch.inf, want_log_q == -torch.inf)
    error = torch.where(log_q == want_log_q, 0.0, (log_q - want_log_q).abs())
    allowed = LOG_Q_TOLERANCE + FLOAT32_ROUNDING * want_log_q.abs()
    if (alpha - want_alpha).abs() <= ALPHA_TOLERANCE and supports_agree and bool((error <= allowed).all()):
        return "alpha and log q"
    assert mixture.method in ROOTS, f"alpha {alpha} against {want_alpha}, log q {log_q} against {want_log_q}"
    log_theta, log_teacher = log_distributions(theta, teacher, temperature)
    finite = torch.cat([log_theta, log_teacher])
    tolerance = RESIDUAL_TOLERANCE * max(1.0, float(finite[finite > -torch.inf].abs().max()))
    left = residual(mixture, log_theta, log_teacher, alpha)
    assert left.abs() <= tolerance, f"residual {left} at alpha {alpha}, wanted {want_alpha} of {mixture}"
    q, want_q = (inside(log_theta, log_teacher, weight).exp() for weight in (alpha, want_alpha))
    assert (q - want_q).abs().sum() / 2 <= math.sqrt(2 * tolerance)
    if 0 < alpha < 1:  # at the ends a model's row whole, also where the other has no mass
        assert (log_q.exp() - q).abs().max() <= LOG_Q_TOLERANCE
    return "plateau"


@settings(max_examples=200)
@given(pairs(), st.data())
def test_every_row_meets_the_reference(pair: Pair, data: st.DataObject) -> None:
    N = len(pair.theta)
    rows = data.draw(st.lists(mixtures(), min_size=N, max_size=N))
    temperature = data.draw(st.lists(temperatures, min_size=N, max_size=N))
    alpha, log_q = mix(*pair, rows, torch.tensor(temperature))
    assert alpha.dtype == log_q.dtype == torch.float32
    assert log_q.shape == pair.theta.shape
    for n in range(N):
        one = slice(n, n + 1)
        exact = float(torch.tensor(temperature[n]))
        event(assert_row(pair.theta[one], pair.teacher[one], rows[n], exact, (alpha[one], log_q[one])))


@settings(max_examples=100)
@given(pairs(kinds=("random",), least=2, scale=2.0), mixtures(), temperatures)
def test_random_rows_meet_the_tolerances_without_excuse(pair: Pair, mixture: Mixture, temperature: float) -> None:
    assume(mixture.epsilon > 0)  # at a budget of 0, KL(q‖θ) = α²·Var[ℓ]/2 is rounding up to an α of 1e-5
    alpha, log_q = mix(*pair, mixture, temperature)
    for n in range(len(alpha)):
        one = slice(n, n + 1)
        met = assert_row(pair.theta[one], pair.teacher[one], mixture, temperature, (alpha[one], log_q[one]))
        assert met == "alpha and log q"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "V_theta", "V_teacher"), [(1, 7, 7), (3, 151_936, 152_064), (2, 1000, 999)])
def test_odd_shapes(N: int, V_theta: int, V_teacher: int, dtype: torch.dtype) -> None:
    theta, teacher = (row.to(dtype) for row in random_pair(N, max(V_theta, V_teacher)))
    pair = Pair(theta[:, :V_theta], (theta + teacher)[:, :V_teacher])
    for methods in (METHODS[:N], METHODS[-N:]):
        rows = [Mixture(method) for method in methods]
        alpha, log_q = mix(*pair, rows)
        assert log_q.shape == (N, min(V_theta, V_teacher))
        for n, mixture in enumerate(rows):
            one = slice(n, n + 1)
            met = assert_row(pair.theta[one], pair.teacher[one], mixture, 1.0, (alpha[one], log_q[one]))
            assert met == "alpha and log q"


@pytest.mark.parametrize("method", METHODS)
def test_no_rows(method: str) -> None:
    for result in (mix(*random_pair(0, 5), Mixture(method)), reference(*random_pair(0, 5), Mixture(method))):
        assert [tuple(value.shape) for value in result] == [(0,), (0, 5)]


def test_one_token_is_certain() -> None:
    rows = [Mixture(method, alpha_min=0.2, alpha_max=0.8) for method in METHODS]
    alpha, log_q = mix(*random_pair(len(rows), 1), rows)
    assert alpha.tolist() == pytest.approx([0.5, 0.5, 0.8, 0.5, 0.5])
    assert log_q.abs().max() == 0


# By hand. θ = (1/2, 1/2) and t = (4/5, 1/5): q = (x, 1-x) has log x/(1-x) = α·log 4, so that α = log(x/(1-x)) / log 4.
LOG_HALVES, LOG_FIFTHS = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.8, 0.2]]).log()
BY_HAND = {
    # x·log(8/5) + (1-x)·log(2/5) = 0
    "kl_symmetry": (Mixture(), math.log(2.5) / math.log(4)),
    # (1/4)(1/x + 1/(1-x)) = (16/25)/x + (1/25)/(1-x), so that 0.21x = 0.39(1-x)
    "ess_balance": (Mixture("ess_balance"), 0.65),
    # the ε of q = (3/5, 2/5)
    "trust_region": (Mixture("trust_region", epsilon=0.6 * math.log(1.2) + 0.4 * math.log(0.8)), 0.6),
    # √(1/2·4/5) : √(1/2·1/5) = 2 : 1
    "fixed": (Mixture("fixed"), 2 / 3),
}


@pytest.mark.parametrize("method", BY_HAND)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_two_tokens_by_hand(method: str, temperature: float) -> None:
    mixture, x = BY_HAND[method]
    logits = (temperature * LOG_HALVES + 3.0, temperature * LOG_FIFTHS - 5.0)  # θ and t at the sampling temperature
    for alpha, log_q in (mix(*logits, mixture, temperature), reference(*logits, mixture, temperature)):
        assert log_q.exp()[0].tolist() == pytest.approx([x, 1 - x], abs=1e-6)
        assert float(alpha) == pytest.approx(math.log(x / (1 - x)) / math.log(4), abs=1e-6)


def test_entropy_by_hand() -> None:
    theta = torch.zeros(1, 4)  # H = log 4
    teacher = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])  # H = log 2
    for alpha, log_q in (mix(theta, teacher, Mixture("entropy")), reference(theta, teacher, Mixture("entropy"))):
        assert float(alpha) == pytest.approx(2 / 3, abs=1e-6)
        assert log_q[0].tolist() == pytest.approx([-math.log(2), -math.log(2), -math.inf, -math.inf])


@pytest.mark.parametrize(
    "mixture",
    [
        Mixture(),
        Mixture("ess_balance"),
        Mixture("entropy"),
        # KL of the uniform q to (4/5, 1/5) is ½·log(1/(4·4/5·1/5))
        Mixture("trust_region", epsilon=0.5 * math.log(1 / 0.64)),
    ],
)
def test_mirrored_pair_meets_in_the_middle(mixture: Mixture) -> None:
    alpha, log_q = mix(LOG_FIFTHS, LOG_FIFTHS.flip(1), mixture)
    assert float(alpha) == pytest.approx(0.5, abs=1e-6)
    assert log_q[0].tolist() == pytest.approx([-math.log(2)] * 2, abs=1e-6)


def test_same_distribution_takes_the_middle_of_the_range() -> None:
    theta, _ = random_pair(5, 6)
    rows = [Mixture(method, alpha_min=0.1, alpha_max=0.5, fixed_alpha=0.3) for method in METHODS]
    alpha, log_q = mix(theta, theta.clone(), rows)
    wanted = {"kl_symmetry": 0.3, "ess_balance": 0.3, "trust_region": 0.5, "entropy": 0.5, "fixed": 0.3}
    assert alpha.tolist() == pytest.approx([wanted[method] for method in METHODS])
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
def test_teacher_and_student_change_places(pair: Pair, method: str, one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    alpha, log_q = mix(pair.theta, pair.teacher, Mixture(method, low, high))
    swapped, swapped_log_q = mix(pair.teacher, pair.theta, Mixture(method, 1 - high, 1 - low))
    assert (alpha - (1 - swapped)).abs().max() < 1e-6
    assert (log_q - swapped_log_q).abs().max() < LOG_Q_TOLERANCE


@pytest.mark.parametrize("method", METHODS)
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


@settings(max_examples=60)
@given(pairs(kinds=("random", "masked", "gaps"), scale=5.0), temperatures, st.sampled_from(METHODS))
def test_the_ends_are_one_model_exactly(pair: Pair, temperature: float, method: str) -> None:
    for row, end, other in ((pair.theta, 0.0, pair.teacher), (pair.teacher, 1.0, pair.theta)):
        sides = (row, other) if end == 0.0 else (other, row)
        alpha, log_q = mix(*sides, Mixture(method, end, end, end), temperature)
        assert bool((alpha == end).all())
        assert torch.equal(log_q, torch.log_softmax(row.double() / temperature, -1).float())


@settings(max_examples=60)
@given(pairs(kinds=("random", *ADVERSARIAL)), mixtures(), temperatures)
def test_log_q_is_normalised(pair: Pair, mixture: Mixture, temperature: float) -> None:
    alpha, log_q = mix(*pair, mixture, temperature)
    solved = ~alpha.isnan()
    assert log_q[solved].logsumexp(-1).abs().max() < 1e-6 if bool(solved.any()) else True
    assert torch.equal(log_q.isnan().any(-1), ~solved)
    assert bool(log_q[~solved].isnan().all())


def test_rows_do_not_see_each_other() -> None:
    """Mixture and temperature of each row give what the row gives alone: as a sequence, as columns, picked out."""
    theta, teacher = random_pair(25, 9)
    generator = torch.Generator().manual_seed(1)
    temperature = 0.3 + 1.7 * torch.rand(25, generator=generator)
    rows = [Mixture(METHODS[n % 5], 0.01 * n, 1 - 0.01 * n, 0.5, 0.02 * n) for n in range(25)]
    alpha, log_q = mix(theta, teacher, rows, temperature)
    for n in range(25):
        one = slice(n, n + 1)
        alone, log_q_alone = mix(theta[one], teacher[one], rows[n], float(temperature[n]))
        assert (alone - alpha[one]).abs().max() < 1e-6
        assert (log_q_alone - log_q[one]).abs().max() < LOG_Q_TOLERANCE
    columns = MixtureRows.of(rows)
    assert torch.equal(mix(theta, teacher, columns, temperature)[0], alpha)
    order = torch.randperm(25, generator=generator)
    picked = mix(theta[order], teacher[order], columns.rows(order), temperature[order])
    assert (picked[0] - alpha[order]).abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_blended_raw_logits_are_the_mixture_at_the_temperature(temperature: float) -> None:
    """θ^((1-α)/T)·t^(α/T) is q: an engine may mix before and divide by the temperature after."""
    theta, teacher = random_pair(20, 9)
    for method in METHODS:
        alpha, log_q = mix(theta, teacher, Mixture(method), temperature)
        blended = blend(theta.double(), teacher.double(), alpha)
        assert (torch.log_softmax(blended / temperature, -1) - log_q).abs().max() < 2e-6


def test_blend_takes_an_end_as_it_is() -> None:
    theta, teacher = torch.tensor([[1.0, -torch.inf]] * 3), torch.tensor([[-torch.inf, 2.0]] * 3)
    blended = blend(theta, teacher, torch.tensor([0.0, 1.0, 0.5]))
    assert torch.equal(blended[0], theta[0])
    assert torch.equal(blended[1], teacher[1])
    assert bool((blended[2] == -torch.inf).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("padding", [torch.nan, torch.inf, 1e4, -1e4])
def test_padding_of_either_vocabulary_is_ignored(method: str, padding: float) -> None:
    theta, teacher = random_pair(4, 9)
    want = mix(theta, teacher, Mixture(method))
    padded = torch.full((4, 3), padding)
    for sides in ((torch.cat([theta, padded], 1), teacher), (theta, torch.cat([teacher, padded], 1))):
        for got, wanted in zip(mix(*sides, Mixture(method)), want):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("mixture", [*map(Mixture, METHODS), Mixture.theta_only(), Mixture.teacher_only()])
def test_broken_rows_are_nan_and_spoil_no_other(kind: str, mixture: Mixture) -> None:
    theta, teacher = random_pair(5, 9)
    want_alpha, want_log_q = mix(theta, teacher, mixture)
    generator = torch.Generator().manual_seed(2)
    for n, scale in ((1, 1.0), (3, 5.0)):  # the student's row and the teacher's
        theta[n], teacher[n] = make_row(kind, 9, scale, generator)
    alpha, log_q = mix(theta, teacher, mixture)
    assert alpha.isnan().tolist() == [False, True, False, True, False]
    assert bool(log_q[[1, 3]].isnan().all())
    assert (alpha - want_alpha)[[0, 2, 4]].abs().max() < 1e-6
    assert (log_q - want_log_q)[[0, 2, 4]].abs().max() < LOG_Q_TOLERANCE


def test_without_a_common_token_only_the_ends_have_a_solution() -> None:
    theta = torch.tensor([[0.0, 1.0, -torch.inf]])
    teacher = torch.tensor([[-torch.inf, -torch.inf, 2.0]])
    for mixture in map(Mixture, ("kl_symmetry", "ess_balance", "trust_region", "fixed")):
        alpha, log_q = mix(theta, teacher, mixture)
        assert alpha.isnan()
        assert log_q.isnan().all()
    for mixture, end in ((Mixture.theta_only(), theta), (Mixture.teacher_only(), teacher)):
        assert torch.equal(mix(theta, teacher, mixture)[1], torch.log_softmax(end.double(), -1).float())
    assert float(mix(theta, teacher, Mixture("entropy"))[0]) == 1.0  # the teacher's row is certain: its entropy is 0


def test_a_token_without_mass_under_one_model_takes_no_part() -> None:
    """Masking a token under one model alone gives the root and q of the pair in which neither has it."""
    theta, teacher = random_pair(6, 5)
    theta[:, 3] = -torch.inf
    shared = torch.tensor([0, 1, 2, 4])
    log_theta, log_teacher = log_distributions(theta, teacher)
    alpha, log_q = mix(theta, teacher, Mixture("fixed", fixed_alpha=0.3))
    by_hand = torch.log_softmax(0.7 * theta[:, shared] + 0.3 * teacher[:, shared], -1)
    assert (log_q[:, shared] - by_hand).abs().max() < 1e-6
    assert bool((log_q[:, 3] == -torch.inf).all())
    alpha, log_q = mix(theta, teacher, Mixture())
    ratio = (log_teacher - log_theta)[:, shared]
    inner = (alpha > 0) & (alpha < 1)
    assert inner.any()
    assert (log_q[:, shared].exp() * ratio).sum(-1)[inner].abs().max() < 1e-6


@settings(max_examples=60)
@given(pairs(kinds=("random", "masked", "shifted"), scale=5.0), st.data())
def test_folding_keeps_the_mass(pair: Pair, data: st.DataObject) -> None:
    teacher = torch.cat([pair.teacher.float(), torch.zeros(len(pair.teacher), 2)], 1)
    V = teacher.shape[1]
    theta_eos, *folded = data.draw(st.permutations(range(V)))[: data.draw(st.integers(2, min(V, 4)))]
    before = teacher.clone()
    result = fold_eos(teacher, folded, theta_eos)
    assert torch.equal(teacher, before)  # not in place
    # float32's rounding of a logit of 128 is 8e-6
    p, q = before.double().softmax(-1), result.double().softmax(-1)
    assert (q[:, theta_eos] - p[:, [theta_eos, *folded]].sum(-1)).abs().max() < 1e-5
    assert bool((result[:, folded] == -torch.inf).all())
    rest = [token for token in range(V) if token not in (theta_eos, *folded)]
    assert torch.equal(result[:, rest], before[:, rest])
    assert bool(((q - p)[:, rest].abs() < 1e-5).all())
    assert (fold_eos(teacher, folded[::-1], theta_eos).double().softmax(-1) - q).abs().max() < 1e-5


def test_folding_comes_before_the_temperature() -> None:
    teacher = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    folded = fold_eos(teacher, [3], 1)
    assert folded.exp()[0].tolist() == pytest.approx([0.1, 0.6, 0.3, 0.0])
    _, log_teacher = log_distributions(teacher, folded, 0.5)
    squares = [0.01, 0.36, 0.09, 0.0]  # of the folded mass, not 0.2² + 0.4²
    assert log_teacher.exp()[0].tolist() == pytest.approx([square / sum(squares) for square in squares])


def test_folding_nothing_and_masked_endings() -> None:
    teacher = torch.tensor([[1.0, -torch.inf, 2.0, -torch.inf]]).bfloat16()
    assert fold_eos(teacher, [], 1) is teacher
    folded = fold_eos(teacher, [3], 1)
    assert torch.equal(folded, teacher)
    assert folded.dtype == torch.bfloat16
    assert fold_eos(teacher, (2,), 1)[0].tolist() == [1.0, 2.0, -math.inf, -math.inf]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mixture": [Mixture()]}, r"mix: 1 mixtures for 3 rows of logits; wanted one for all rows or one for each"),
        ({"mixture": MixtureRows.of([Mixture()] * 4)}, r"mix: 4 mixtures for 3 rows"),
        ({"temperature": 0.0}, r"mix: `temperature` is 0\.0; wanted a number above 0\. For the likeliest token solve"),
        ({"temperature": -1.0}, r"mix: `temperature` is -1\.0; wanted"),
        ({"temperature": math.nan}, r"mix: `temperature` is nan; wanted"),
    ],
)
def test_mix_refuses_what_it_would_solve_wrongly(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        mix(*random_pair(3, 5), **({"mixture": Mixture()} | arguments))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"method": "kl_symetry"}, r"Unknown mixture method 'kl_symetry'\. Known: .*Did you mean 'kl_symmetry'\?"),
        ({"method": None}, r"Unknown mixture method None\. Known: entropy, ess_balance, fixed"),
        ({"alpha_min": -0.1}, r"Mixture: `alpha_min` is -0\.1; wanted a number in \[0, 1\]"),
        ({"alpha_max": 1.5}, r"Mixture: `alpha_max` is 1\.5; wanted a number in \[0, 1\]"),
        ({"alpha_min": True}, r"Mixture: `alpha_min` is True; wanted a number"),
        ({"alpha_max": "0.5"}, r"Mixture: `alpha_max` is '0\.5'; wanted a number"),
        ({"alpha_max": math.nan}, r"Mixture: `alpha_max` is nan; wanted a number"),
        ({"fixed_alpha": None}, r"Mixture: `fixed_alpha` is None; wanted a number"),
        ({"fixed_alpha": 2}, r"Mixture: `fixed_alpha` is 2; wanted a number in \[0, 1\]"),
        ({"epsilon": -1.0}, r"Mixture: `epsilon` is -1\.0; wanted a finite number of at least 0"),
        ({"epsilon": math.inf}, r"Mixture: `epsilon` is inf; wanted a finite number"),
        ({"epsilon": math.nan}, r"Mixture: `epsilon` is nan; wanted a finite number"),
        (
            {"alpha_min": 0.8, "alpha_max": 0.2},
            r"`alpha_min` is 0\.8 and `alpha_max` is 0\.2; wanted alpha_min <= alpha_max\. Lower the first or raise",
        ),
        (
            {"method": "fixed", "alpha_min": 0.6},
            r"`fixed_alpha` is 0\.5, outside of \[alpha_min, alpha_max\] = \[0\.6, 1\.0\].*Widen the range",
        ),
    ],
)
def test_mixture_refuses(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Mixture(**fields)


def test_mixture_is_frozen_and_accepts_whole_numbers() -> None:
    mixture = Mixture(alpha_min=0, alpha_max=1)
    assert mixture == Mixture()
    assert len({mixture, Mixture()}) == 1
    with pytest.raises(FrozenInstanceError):
        mixture.alpha_min = 0.5  # type: ignore[misc]


@given(mixtures())
def test_mixture_as_values_and_back(mixture: Mixture) -> None:
    values = mixture.to_dict()
    assert Mixture.from_dict(values) == mixture
    assert set(values) == {"method", "alpha_min", "alpha_max", "fixed_alpha", "epsilon"}
    columns = MixtureRows.of([mixture])
    assert METHODS[int(columns.method)] == mixture.method
    assert [float(column) for column in columns[2:]] == [values[name] for name in MixtureRows._fields[2:]]


def test_a_key_that_no_mixture_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown field of a mixture 'alpha_mn'\. .*Did you mean 'alpha_min'\?"):
        Mixture.from_dict({"method": "fixed", "alpha_mn": 0.1})
    with pytest.raises(ValueError, match=r"`alpha_min` is 0\.9 and `alpha_max` is 0\.1"):
        Mixture.from_dict({"alpha_min": 0.9, "alpha_max": 0.1})


def test_theta_only_and_teacher_only() -> None:
    assert Mixture.theta_only().is_theta_only
    assert not Mixture.teacher_only().is_theta_only
    assert not Mixture().is_theta_only
    assert (Mixture.teacher_only().alpha_min, Mixture.teacher_only().alpha_max) == (1.0, 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_anneal_is_linear_and_ends_at_the_student(method: str) -> None:
    mixture = Mixture(method, alpha_min=0.3, alpha_max=0.8, fixed_alpha=0.6, epsilon=0.4)
    assert mixture.anneal(0.0) == mixture
    assert mixture.anneal(0) == mixture
    assert mixture.anneal(1.0) == Mixture.theta_only()
    for gone in (0.25, 0.5, 0.75):
        annealed = mixture.anneal(gone)
        if method == "trust_region":
            assert annealed.epsilon == pytest.approx(0.4 * (1 - gone))
            assert annealed.alpha_min == pytest.approx(
                0.3 * (1 - gone)
            )  # else α would stay at it, and jump at the end
            assert (annealed.alpha_max, annealed.fixed_alpha) == (0.8, 0.6)
        else:
            alpha_max = 0.8 * (1 - gone)
            assert annealed.alpha_max == pytest.approx(alpha_max)
            assert annealed.alpha_min == pytest.approx(0.3 * (1 - gone))
            assert annealed.fixed_alpha == pytest.approx(0.6 * (1 - gone))
            assert (annealed.method, annealed.epsilon) == (method, 0.4)


@pytest.mark.parametrize("gone", [-0.1, 1.1, math.nan, "0.5", True, None])
def test_anneal_refuses_what_is_no_share(gone: Any) -> None:
    with pytest.raises(ValueError, match=r"Mixture\.anneal: `share` is .*; wanted a number in \[0, 1\]"):
        Mixture().anneal(gone)


def test_shapes_are_checked_in_tests() -> None:
    """The import hook of conftest.py is on: a batch of another size is refused before any arithmetic."""
    with pytest.raises(Exception, match=r"Type-check error whilst checking the parameters of .*mix"):
        mix(torch.zeros(3, 5), torch.zeros(2, 5), Mixture())
    with pytest.raises(Exception, match="Type-check error"):
        blend(torch.zeros(3, 5), torch.zeros(3, 6), torch.zeros(3))
