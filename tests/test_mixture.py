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
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimal_sampling_trl import mixture as module
from optimal_sampling_trl.mixture import (
    METHODS,
    SAME_DIVERGENCE,
    Mixture,
    MixtureRows,
    blend,
    fold_eos,
    log_distributions,
    mix,
    reference,
    solve_alpha,
)

ROOTS = ("kl_symmetry", "ess_balance", "trust_region")
ALPHA_TOLERANCE = 1e-5
LOG_Q_TOLERANCE = 1e-5
FLOAT32_ROUNDING = 6e-8
RESIDUAL_TOLERANCE = 1e-12
"""Of the largest |ℓ|, log θ or log t of the row (at least 1): what float64 leaves of a sum that should be 0."""
ADVERSARIAL = ("equal", "shifted", "near", "one_hot", "one_token", "gaps", "masked", "disjoint")
BROKEN = ("nan", "plus_inf", "all_masked")


class Pair(NamedTuple):
    theta: Tensor
    teacher: Tensor


def make_row(kind: str, V: int, scale: float, generator: torch.Generator) -> Pair:
    """The raw logits (V,) of one row of both models."""

    def normal() -> Tensor:
        return torch.randn(V, generator=generator, dtype=torch.float64)

    theta, teacher = scale * normal(), scale * normal()
    chosen = torch.arange(V) == torch.randint(V, (), generator=generator)
    masks = torch.rand(2, V, generator=generator) < 0.4
    if kind == "equal":
        teacher = theta.clone()
    elif kind == "shifted":
        teacher = theta.round() + 128.0
        theta = theta.round()
    elif kind == "near":
        teacher = theta + 1e-3 * scale * normal()
    elif kind == "one_hot":
        theta = torch.where(chosen, 80.0, theta)
    elif kind == "one_token":
        theta = torch.where(chosen, theta, -torch.inf)
    elif kind == "gaps":
        theta, teacher = (60.0 * torch.randint(-1, 2, (V,), generator=generator) for _ in range(2))
    elif kind == "masked":  # the chosen token keeps mass under both
        theta, teacher = (row.masked_fill(mask & ~chosen, -torch.inf) for row, mask in zip((theta, teacher), masks))
    elif kind == "disjoint":
        theta, teacher = theta.masked_fill(masks[0], -torch.inf), teacher.masked_fill(~masks[0], -torch.inf)
    elif kind in ("nan", "plus_inf"):
        value = torch.nan if kind == "nan" else torch.inf
        theta, teacher = (theta, teacher.masked_fill(chosen, value)) if scale > 1 else (theta * value, teacher)
    elif kind == "all_masked":
        theta = torch.full((V,), -torch.inf)
    return Pair(theta.float(), teacher.float())


KINDS = ("random", "random", *ADVERSARIAL, *BROKEN)
share = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1, allow_subnormal=False))
temperatures = st.one_of(st.just(1.0), st.floats(0.3, 2.0))
sizes = st.integers(1, 8)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def mixtures(draw: st.DrawFn, methods: tuple[str, ...] = METHODS) -> Mixture:
    method = draw(st.sampled_from(methods))
    alpha_min, alpha_max = sorted((draw(share), draw(share))) if draw(st.booleans()) else (0.0, 1.0)
    fixed = min(max(draw(share), alpha_min), alpha_max)
    epsilon = draw(st.one_of(st.sampled_from([0.0, 0.05]), st.floats(1e-4, 20.0)))
    return Mixture(method, alpha_min, alpha_max, fixed, epsilon)


@st.composite
def pairs(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, max_rows: int = 4, scale: float | None = None) -> Pair:
    """Raw logits (N, V) of both models, each row of a kind of its own, float32 or rounded to bfloat16."""
    generator = torch.Generator().manual_seed(draw(seeds))
    V = draw(sizes)
    scales = st.just(scale) if scale else st.sampled_from([0.1, 1.0, 5.0, 20.0])
    rows = [make_row(draw(st.sampled_from(kinds)), V, draw(scales), generator) for _ in range(draw(st.integers(1, max_rows)))]
    pair = Pair(*(torch.stack(side) for side in zip(*rows)))
    return Pair(*(side.bfloat16() for side in pair)) if draw(st.booleans()) else pair


def random_pair(N: int, V: int, seed: int = 0, scale: float = 2.0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return Pair(*(scale * torch.randn(N, V, generator=generator) for _ in range(2)))


def kl(log_p: Tensor, log_other: Tensor) -> Tensor:
    """KL(p‖other) of rows; a token without mass under p adds nothing."""
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_other), 0.0).sum(-1)


def ess_inverse(log_target: Tensor, log_q: Tensor) -> Tensor:
    """log Σ target²/q over the tokens that q has: the inverse effective sample size of the weights target/q."""
    return torch.logsumexp(torch.where(log_q > -torch.inf, 2 * log_target - log_q, -torch.inf), -1)


def inside(log_theta: Tensor, log_teacher: Tensor, alpha: Tensor) -> Tensor:
    """log q (N, V) on the tokens with mass under both models, for any α."""
    both = (log_theta > -torch.inf) & (log_teacher > -torch.inf)
    mixed = (1 - alpha[:, None]) * log_theta + alpha[:, None] * log_teacher  # NaN where an end meets a mask
    return torch.log_softmax(torch.where(both, mixed, -torch.inf), -1)


def residual(mixture: Mixture, log_theta: Tensor, log_teacher: Tensor, alpha: Tensor) -> Tensor:
    """What the method's equation, written as it is defined, leaves at `alpha` in each row; rises in α."""
    log_q = inside(log_theta, log_teacher, alpha)
    if mixture.method == "kl_symmetry":
        return kl(log_q, log_theta) - kl(log_q, log_teacher)
    if mixture.method == "ess_balance":
        return ess_inverse(log_theta, log_q) - ess_inverse(log_teacher, log_q)
    return kl(log_q, log_theta) - mixture.epsilon


def assert_row(theta: Tensor, teacher: Tensor, mixture: Mixture, temperature: float, got: tuple[Tensor, Tensor]) -> str:
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
