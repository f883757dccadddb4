"""`mix` and `blend`: rows against the float64 reference, ends, broken rows, padding, and refusals.

Both `mix` and `reference` turn the same values into float64 first, so that bfloat16 logits get float32's tolerances:
α within 1e-5 and log q within 1e-5 plus float32's own rounding of it (6e-8 of its size).

Where an equation is flat (three tokens 60 nats apart: the mixture is one token over most of the range), float64 does
not define α to 1e-5. There the residual of the equation at the returned α must vanish, and the two mixtures must be
one distribution: as d(residual)/dα = Var_q[ℓ], residuals below r leave a total variation of at most √(2r)/2.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.strategies import (
    ADVERSARIAL,
    BROKEN,
    RANGED,
    ROOTS,
    LogitPair,
    inside,
    kl,
    make_row,
    mixtures,
    pairs,
    random_pair,
    temperatures,
)
from optimal_sampling_trl.mixture import (
    METHODS,
    Mixture,
    MixtureRows,
    blend,
    log_distributions,
    mix,
)
from optimal_sampling_trl.mixture.reference import reference

ALPHA_TOLERANCE = 1e-5
LOG_Q_TOLERANCE = 1e-5
FLOAT32_ROUNDING = 6e-8
ARITHMETIC = [Mixture(method, form="arithmetic") for method in RANGED if method != "ess_balance"]
ENDS = [Mixture.theta_only(), Mixture.teacher_only()]
RESIDUAL_TOLERANCE = 1e-12
"""Of the largest |ℓ|, log θ or log t of the row (at least 1): what float64 leaves of a sum that should be 0."""


def ess_inverse(log_target: Tensor, log_q: Tensor) -> Tensor:
    """log Σ target²/q over the tokens that q has: the inverse effective sample size of the weights target/q."""
    return torch.logsumexp(torch.where(log_q > -torch.inf, 2 * log_target - log_q, -torch.inf), -1)


def residual(mixture: Mixture, log_theta: Tensor, log_teacher: Tensor, alpha: Tensor) -> Tensor:
    """What the method's equation, written as it is defined, leaves at `alpha` in each row; rises in α."""
    log_q = inside(log_theta, log_teacher, alpha, mixture.form)
    if (mixture.form, mixture.method) == ("arithmetic", "kl_symmetry"):
        ratio = torch.where((log_theta > -torch.inf) & (log_teacher > -torch.inf), log_teacher - log_theta, 0.0)
        return (log_q.exp() * ratio).sum(-1)
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
    q, want_q = (inside(log_theta, log_teacher, weight, mixture.form).exp() for weight in (alpha, want_alpha))
    assert (q - want_q).abs().sum() / 2 <= math.sqrt(2 * tolerance)
    if 0 < alpha < 1:  # at the ends a model's row whole, also where the other has no mass
        assert (log_q.exp() - q).abs().max() <= LOG_Q_TOLERANCE
    return "plateau"


@settings(max_examples=200)
@given(pairs(), st.data())
def test_every_row_meets_the_reference(pair: LogitPair, data: st.DataObject) -> None:
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
def test_random_rows_meet_the_tolerances_without_excuse(pair: LogitPair, mixture: Mixture, temperature: float) -> None:
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
    pair = LogitPair(theta[:, :V_theta], (theta + teacher)[:, :V_teacher])
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
    rows = [Mixture(method, alpha_min=0.2, alpha_max=0.8) for method in RANGED]
    alpha, log_q = mix(*random_pair(len(rows), 1), rows)
    assert alpha.tolist() == pytest.approx([0.5, 0.5, 0.8, 0.5, 0.5, 0.2])
    assert log_q.abs().max() == 0


@settings(max_examples=60)
@given(pairs(kinds=("random", "masked", "gaps"), scale=5.0), temperatures, st.sampled_from(RANGED))
def test_the_ends_are_one_model_exactly(pair: LogitPair, temperature: float, method: str) -> None:
    for row, end, other in ((pair.theta, 0.0, pair.teacher), (pair.teacher, 1.0, pair.theta)):
        sides = (row, other) if end == 0.0 else (other, row)
        alpha, log_q = mix(*sides, Mixture(method, end, end, end), temperature)
        assert bool((alpha == end).all())
        assert torch.equal(log_q, torch.log_softmax(row.double() / temperature, -1).float())


@settings(max_examples=60)
@given(pairs(kinds=("random", *ADVERSARIAL)), mixtures(), temperatures)
def test_log_q_is_normalised(pair: LogitPair, mixture: Mixture, temperature: float) -> None:
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
    picked = mix(theta[order], teacher[order], columns.at(order), temperature[order])
    assert (picked[0] - alpha[order]).abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_blended_raw_logits_are_the_mixture_at_the_temperature(temperature: float) -> None:
    """θ^((1-α)/T)·t^(α/T) is q: an engine may mix before and divide by the temperature after."""
    theta, teacher = random_pair(20, 9)
    for method in RANGED:
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
@pytest.mark.parametrize(
    "mixture", [*map(Mixture, METHODS), *ARITHMETIC, Mixture.theta_only(), Mixture.teacher_only()]
)
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


def test_shapes_are_checked_in_tests() -> None:
    """The import hook of conftest.py is on: a batch of another size is refused before any arithmetic."""
    with pytest.raises(Exception, match=r"Type-check error whilst checking the parameters of .*mix"):
        mix(torch.zeros(3, 5), torch.zeros(2, 5), Mixture())
    with pytest.raises(Exception, match="Type-check error"):
        blend(torch.zeros(3, 5), torch.zeros(3, 6), torch.zeros(3))
