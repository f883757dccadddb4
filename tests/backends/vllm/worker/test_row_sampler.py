"""A step of the CPU's sampler by itself: rows without a solution are flagged as `mix` flags them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optimal_sampling_trl.mixture import Mixture, mix
from optimal_sampling_trl.pairing import Ending

ENDING = Ending((3,), ())
NOWHERE = -torch.inf
APART = (torch.tensor([[1.0, 2.0, NOWHERE, NOWHERE]]), torch.tensor([[NOWHERE, NOWHERE, 0.5, 0.1]]))
"""Raw logits of a student and a teacher that share no token."""
INSIDE = [
    Mixture(),
    Mixture("ess_balance"),
    Mixture("trust_region"),
    Mixture("fixed", fixed_alpha=0.5),
    Mixture("entropy", alpha_min=0.2, alpha_max=0.8),
    Mixture(alpha_min=0.3, alpha_max=0.3),
]
"""Mixtures whose α lies between the two models in each row."""
ENDS = [Mixture.theta_only(), Mixture.teacher_only(), Mixture("fixed", fixed_alpha=0.0)]


def step(
    theta: Tensor, teacher: Tensor, mixtures: list[Mixture], masked: bool = False, ending: Ending = ENDING
) -> Any:
    """One step with a row for each mixture."""
    sampler = pytest.importorskip("optimal_sampling_trl.backends.vllm.worker.row_sampler", reason="vLLM")
    N = len(mixtures)
    batch = sampler.BatchMixtures.of(mixtures, [1.0] * N, [masked] * N, torch.device("cpu"))
    return sampler.mix_step(theta.expand(N, -1), teacher.expand(N, -1), batch, ending)


@pytest.mark.parametrize("mixtures", [[mixture] for mixture in INSIDE] + [INSIDE, [*INSIDE, *ENDS]], ids=len)
def test_rows_without_a_common_token(mixtures: list[Mixture]) -> None:
    mixed = step(*APART, mixtures)
    expected, _ = mix(*(x.expand(len(mixtures), -1) for x in APART), mixtures)
    assert torch.equal(mixed.alpha.isnan(), expected.isnan())
    assert mixed.alpha.isnan().tolist() == [mixture in INSIDE for mixture in mixtures]
    log_q = mixed.logits.log_softmax(-1)
    assert not bool(log_q.isnan().any())
    assert set(log_q.argmax(-1)[mixed.alpha.isnan()].tolist()) <= {ENDING.stop[0]}


def test_where_a_student_has_nothing_that_the_teacher_has_all_is_swapped() -> None:
    mixed = step(*APART, [Mixture("top_k_swap", swap_top_k=2)])
    assert mixed.alpha.tolist() == [1.0]
    assert torch.allclose(mixed.logits.log_softmax(-1), APART[1].log_softmax(-1))


def test_the_folded_end_is_among_the_likeliest_where_its_whole_mass_is() -> None:
    theta, teacher = torch.zeros(1, 4), torch.tensor([[1.0, 0.9, 0.8, 0.9]])
    folding = Ending((3,), (2,))
    for ending, kept in ((ENDING, 0), (folding, 3)):
        mixed = step(theta, teacher, [Mixture("top_k_swap", swap_top_k=1)], ending=ending)
        assert mixed.alpha.tolist() == [0.75]
        t = ending.fold(teacher).softmax(-1)[0]
        wanted = 0.75 * t + 0.25 * (torch.arange(4) == kept)
        assert torch.allclose(mixed.logits.softmax(-1)[0], wanted, atol=1e-6)


def test_a_grammar_is_that_of_both_models() -> None:
    """vLLM rules tokens out in the teacher's logits alone. α and q are those of two models without these tokens."""
    theta, teacher = torch.randn(2, 1, 60, generator=torch.Generator().manual_seed(0)) * 3
    allowed, all_rows = torch.arange(60) % 6 == 0, [*INSIDE, Mixture("top_k_swap", swap_top_k=4), *ENDS]
    all_rows += [Mixture(form="arithmetic"), Mixture("trust_region", form="arithmetic")]
    under_grammar = torch.nn.functional.pad(teacher.masked_fill(~allowed, NOWHERE), (0, 4), value=NOWHERE)
    mixed = step(theta, under_grammar, all_rows, masked=True)
    alpha, log_q = mix(*(x[:, allowed].expand(len(all_rows), -1) for x in (theta, teacher)), all_rows)
    assert torch.allclose(mixed.alpha, alpha, atol=1e-6)
    assert torch.allclose(mixed.logits.log_softmax(-1)[:, :60][:, allowed], log_q, atol=1e-5)
    assert bool(mixed.logits[:, :60][:, ~allowed].isneginf().all())
    free = step(theta, teacher, all_rows, masked=True)  # a step in which the grammar allows all
    assert torch.equal(free.logits, step(theta, teacher, all_rows).logits)


def test_a_grammar_that_leaves_the_student_no_token() -> None:
    mixed = step(*APART, ENDS, masked=True)
    assert mixed.alpha.isnan().tolist() == [True, True, True]
    assert not bool(mixed.logits.log_softmax(-1).isnan().any())


def test_one_common_token_is_enough() -> None:
    theta, teacher = (logits.clone() for logits in APART)
    teacher[0, 1] = -3.0
    mixed = step(theta, teacher, INSIDE)
    assert not bool(mixed.alpha.isnan().any())
    assert mixed.logits.argmax(-1).tolist() == [1] * len(INSIDE)


def test_a_folded_end_that_the_student_draws() -> None:
    """The teacher's mass on it counts for the student's end, and not for itself too."""
    logits, ending = torch.tensor([[1.0, 0.5, 0.2, 0.0]]), Ending((3,), (2,))
    mixed = step(logits, logits, [Mixture.theta_only()], ending=ending)
    folded = ending.fold(logits).log_softmax(-1)[0]
    got = torch.stack([mixed.record(torch.tensor([token]))[0, 2] for token in range(4)])
    assert got[2] == -torch.inf
    assert torch.allclose(got, folded)
