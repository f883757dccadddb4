"""The exact numbers of a token and the likeliest tokens against their definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from helpers.strategies import ADVERSARIAL, LogitPair, mixtures, pairs, random_pair, temperatures
from optimal_sampling_trl.mixture import Mixture, MixtureRows, mix, mix_at
from optimal_sampling_trl.mixture import dense as module
from optimal_sampling_trl.mixture.dense import SCALARS, Measured, measure
from optimal_sampling_trl.mixture.reference import reference, reference_dense


def measured(pair: LogitPair, mixture: Mixture, temperature: float = 1.0, top_k: int = 0) -> Measured:
    """Measure rows as an engine does: at the α that it solved."""
    theta, teacher = (side.float() for side in pair)
    alpha, _ = mix(theta, teacher, mixture, temperature)
    rows = MixtureRows.of([mixture] * len(theta), theta.device)
    mixed = mix_at(theta, teacher, alpha, rows, temperature)
    return measure(theta, teacher, mixed, temperature, SCALARS, top_k)


def assert_equal(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4, equal_nan=True)


@settings(max_examples=200)
@given(pairs(("random", *ADVERSARIAL), least=2), mixtures(("kl_symmetry", "fixed", "entropy")), temperatures)
def test_scalars_are_their_definitions(pair: LogitPair, mixture: Mixture, temperature: float) -> None:
    want = reference_dense(*pair, mixture, temperature)
    got = measured(pair, mixture, temperature)
    alpha, _ = reference(*pair, mixture, temperature)
    solved = (alpha == 0) | (alpha == 1) | ((alpha > 1e-4) & (alpha < 1 - 1e-4))  # others round to an end in float32
    assert tuple(want) == SCALARS
    for column, name in enumerate(SCALARS):
        assert_equal(got.scalars[solved, column], want[name][solved])


def test_scalars_by_hand() -> None:
    """θ = (1/2, 1/2, 0) and t = (1/2, 0, 1/2): q is the first token alone."""
    theta, teacher = torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([[0.0, -math.inf, 0.0]])
    found = dict(zip(SCALARS, measured(LogitPair(theta, teacher), Mixture()).scalars[0].tolist()))
    two = pytest.approx(math.log(2))
    infinite = {"kl_theta_teacher": math.inf, "kl_teacher_theta": math.inf}
    assert found == infinite | dict.fromkeys(SCALARS[2:6], two) | {"overlap": pytest.approx(0.5)}
    whole = measured(LogitPair(theta, teacher), Mixture("fixed", form="arithmetic")).scalars[0]
    assert whole[SCALARS.index("kl_q_theta")] == math.inf


@pytest.mark.parametrize("top_k", [1, 3, 50])
def test_likeliest_tokens(top_k: int) -> None:
    pair = random_pair(4, 50)
    found = measured(pair, Mixture(), 0.7, top_k)
    log_theta, log_teacher = (torch.log_softmax(side.double() / 0.7, -1) for side in pair)
    assert found.ids[:, :top_k].equal(log_theta.argsort(-1, descending=True)[:, :top_k])
    assert found.ids[:, top_k:].equal(log_teacher.argsort(-1, descending=True)[:, :top_k])
    assert_equal(found.log_theta, log_theta.gather(1, found.ids))
    assert_equal(found.log_teacher, log_teacher.gather(1, found.ids))


def test_a_large_vocabulary_in_bfloat16() -> None:
    pair = LogitPair(*(side.bfloat16() for side in random_pair(2, 40_000, scale=4.0)))
    want = reference_dense(*pair, Mixture())
    for column, name in enumerate(SCALARS):
        assert_equal(measured(pair, Mixture()).scalars[:, column], want[name])


def test_rows_are_measured_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, temperature = random_pair(5, 30), torch.tensor([0.5, 1.0, 1.5, 2.0, 0.7])
    whole = measure(*pair, pair.theta, temperature, SCALARS, 2)
    monkeypatch.setattr(module, "AT_ONCE", 60)
    parts = measure(*pair, pair.theta, temperature, SCALARS, 2)
    for got, want in zip(parts, whole):
        torch.testing.assert_close(got, want)


def test_nothing_is_measured_where_nothing_is_asked() -> None:
    found = measure(*random_pair(3, 10), torch.zeros(3, 10), 1.0, (), 0)
    assert [tuple(one.shape) for one in found] == [(3, 0)] * 4
