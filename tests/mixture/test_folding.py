"""`fold_eos`: the mass of the teacher's endings at the student's, and before the temperature."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.strategies import LogitPair, pairs
from optimal_sampling_trl.mixture import fold_eos, log_distributions


@settings(max_examples=60)
@given(pairs(kinds=("random", "masked", "shifted"), scale=5.0), st.data())
def test_folding_keeps_the_mass(pair: LogitPair, data: st.DataObject) -> None:
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
    assert fold_eos(teacher, [4, 9], 1) is teacher  # beyond the vocabulary
    folded = fold_eos(teacher, [3], 1)
    assert torch.equal(folded, teacher)
    assert folded.dtype == torch.bfloat16
    assert fold_eos(teacher, (2, 9), 1)[0].tolist() == [1.0, 2.0, -math.inf, -math.inf]
