"""Random rows, mixtures and rollouts for hypothesis, with the hard ones among them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from optimal_sampling_trl.mixture import FORMS, METHODS, SWAP, Mixture
from optimal_sampling_trl.rollouts.dense import SCALARS
from optimal_sampling_trl.rollouts.rollout import RECORDS, Rollout

ROOTS = ("kl_symmetry", "ess_balance", "trust_region")
RANGED = tuple(method for method in METHODS if method != SWAP)
"""The methods that have both forms, and bounds of α."""
ADVERSARIAL = ("equal", "shifted", "near", "one_hot", "one_token", "gaps", "masked", "disjoint")
BROKEN = ("nan", "plus_inf", "all_masked")
EDGES = (0.0, -0.0, 1e-45, -1e-38, 3.4028234663852886e38, -math.inf, math.inf, -1e-7, -103.97)


class LogitPair(NamedTuple):
    theta: Tensor
    teacher: Tensor


def make_row(kind: str, V: int, scale: float, generator: torch.Generator) -> LogitPair:
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
    return LogitPair(theta.float(), teacher.float())


KINDS = ("random", "random", *ADVERSARIAL, *BROKEN)
share = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1, allow_subnormal=False))
temperatures = st.one_of(st.just(1.0), st.floats(0.3, 2.0))
seeds = st.integers(0, 2**32 - 1)


@st.composite
def mixtures(draw: st.DrawFn, methods: tuple[str, ...] = METHODS, forms: tuple[str, ...] = FORMS) -> Mixture:
    if SWAP in methods and draw(st.integers(0, len(methods) - 1)) == 0:
        return Mixture(SWAP, swap_top_k=draw(st.integers(1, 10)))
    methods = tuple(one for one in methods if one != SWAP)
    form = draw(st.sampled_from(forms))
    method = draw(st.sampled_from([one for one in methods if (form, one) != ("arithmetic", "ess_balance")]))
    alpha_min, alpha_max = sorted((draw(share), draw(share))) if draw(st.booleans()) else (0.0, 1.0)
    fixed = min(max(draw(share), alpha_min), alpha_max)
    epsilon = draw(st.one_of(st.sampled_from([0.0, 0.05]), st.floats(1e-4, 20.0)))
    scale = draw(st.one_of(st.sampled_from([1.0, 1e-3]), st.floats(0.01, 5.0)))
    return Mixture(method, alpha_min, alpha_max, fixed, epsilon, form, scale)


@st.composite
def pairs(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, least: int = 1, scale: float | None = None) -> LogitPair:
    """Raw logits (N, V) of both models, V from `least`, each row of its own kind, float32 or rounded to bfloat16."""
    generator = torch.Generator().manual_seed(draw(seeds))
    V = draw(st.integers(least, 8))
    scales = st.just(scale) if scale else st.sampled_from([0.1, 1.0, 5.0, 20.0])
    rows = [make_row(draw(st.sampled_from(kinds)), V, draw(scales), generator) for _ in range(draw(st.integers(1, 4)))]
    pair = LogitPair(*(torch.stack(side) for side in zip(*rows)))
    return LogitPair(*(side.bfloat16() for side in pair)) if draw(st.booleans()) else pair


def random_pair(N: int, V: int, seed: int = 0, scale: float = 2.0) -> LogitPair:
    generator = torch.Generator().manual_seed(seed)
    return LogitPair(*(scale * torch.randn(N, V, generator=generator) for _ in range(2)))


def inside(log_theta: Tensor, log_teacher: Tensor, alpha: Tensor, form: str = "geometric") -> Tensor:
    """log q (N, V) on the tokens with mass under both models, for any α; of the arithmetic form on all tokens."""
    if form == "arithmetic":
        return ((1 - alpha[:, None]) * log_theta.exp() + alpha[:, None] * log_teacher.exp()).log()
    both = (log_theta > -torch.inf) & (log_teacher > -torch.inf)
    mixed = (1 - alpha[:, None]) * log_theta + alpha[:, None] * log_teacher  # NaN where an end meets a mask
    return torch.log_softmax(torch.where(both, mixed, -torch.inf), -1)


def kl(log_p: Tensor, log_other: Tensor) -> Tensor:
    """KL(p‖other) of rows; a token without mass under p adds nothing."""
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_other), 0.0).sum(-1)


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    T = draw(st.integers(0, 5))
    ids = st.integers(0, 2**31 - 1)
    number = st.one_of(st.sampled_from(EDGES), st.floats(width=32, allow_nan=False))
    records = {name: torch.tensor(draw(st.lists(number, min_size=T, max_size=T))) for name in RECORDS}
    return Rollout(
        prompt_ids=draw(st.lists(ids, max_size=4)),
        theta_prompt_ids=draw(st.lists(ids, max_size=4)),
        completion_ids=draw(st.lists(ids, min_size=T, max_size=T)),
        **records,
        text=draw(st.text()),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        mixture=draw(mixtures()),
        temperature=draw(st.floats(0, 3)),
    )


def assert_same_numbers(got: Tensor, want: Tensor, name: str) -> None:
    """Each number bit for bit."""
    assert got.dtype == torch.float32, name
    assert torch.equal(got.view(torch.int32), want.view(torch.int32)), name


def assert_same(got: Rollout, want: Rollout) -> None:
    """Every field, of the same type, and each number bit for bit."""
    for name, value in vars(want).items():
        other = getattr(got, name)
        assert type(other) is type(value), name
        if name in RECORDS:
            assert_same_numbers(other, value, name)
        elif name == "dense" and value is not None:
            assert list(other.scalars) == [one for one in SCALARS if one in value.scalars]
            assert torch.equal(other.ids, value.ids)
            for one, numbers in {
                **value.scalars,
                "log_theta": value.log_theta,
                "log_teacher": value.log_teacher,
            }.items():
                assert_same_numbers(other.scalars.get(one, getattr(other, one, None)), numbers, one)
        else:
            assert other == value, name
