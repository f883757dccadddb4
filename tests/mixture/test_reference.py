"""The oracle and the solver against arithmetic by hand; and the oracle's independence of the solver."""

from __future__ import annotations

import ast
import inspect
import math

import pytest
import torch

from optimal_sampling_trl.mixture import Mixture, mix
from optimal_sampling_trl.mixture.reference import reference

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


def test_the_oracle_does_not_import_what_it_judges() -> None:
    tree = ast.parse(inspect.getsource(inspect.getmodule(reference)))  # type: ignore[arg-type]
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    assert imported == {"settings"}
