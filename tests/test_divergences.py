"""Divergences over a few tokens and their tail: against the whole vocabulary, against TRL's, and at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from optimal_sampling_trl.divergences import DIVERGENCES, divergence, first_occurrences, union_divergence

BETAS = (0.0, 0.3, 0.5, 1.0)
N, V = 12, 40


def logits(scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (N, V) of a student and a teacher, in float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, N, V, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def union(log_theta: Tensor, log_teacher: Tensor, k: int) -> Tensor:
    """The student's k likeliest tokens, then the teacher's."""
    return torch.cat([log_p.topk(k, dim=-1).indices for log_p in (log_theta, log_teacher)], dim=-1)


def of_union(student: Tensor, teacher: Tensor, k: int, beta: float) -> Tensor:
    log_theta, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    ids = union(log_theta, log_teacher, k)
    return union_divergence(log_theta.gather(-1, ids), log_teacher.gather(-1, ids), ids, beta)


def of_vocabulary(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    return divergence(student.log_softmax(-1), teacher.log_softmax(-1), beta)


@pytest.mark.parametrize("beta", BETAS)
def test_it_is_trls_divergence(beta: float) -> None:
    """With each model's logits for hidden states and the identity for its output layer."""
    student, teacher = (one.detach().float() for one in logits())
    mine, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    head = torch.eye(V)
    of_trl, _ = ChunkedDivergenceFunction.apply(
        theirs, head, None, teacher, head, None, beta, 1.3, 1.0, None, 1.0, None
    )
    ours = of_vocabulary(mine / 1.3, teacher / 1.3, beta)
    assert torch.allclose(ours, of_trl, atol=1e-5)
    of_trl.sum().backward()
    ours.sum().backward()
    assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)


def test_the_names_are_those_of_the_formulas() -> None:
    student, teacher = logits()
    theta, t = student.softmax(-1), teacher.softmax(-1)
    middle = (theta + t) / 2
    wanted = {
        "reverse": (theta * (theta / t).log()).sum(-1),
        "forward": (t * (t / theta).log()).sum(-1),
        "js": ((theta * (theta / middle).log()).sum(-1) + (t * (t / middle).log()).sum(-1)) / 2,
    }
    assert wanted.keys() == DIVERGENCES.keys()
    for name, values in wanted.items():
        assert torch.allclose(of_vocabulary(student, teacher, DIVERGENCES[name]), values, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_with_every_token_it_is_the_vocabularys(beta: float) -> None:
    """Value and gradient: each token stands twice in the union, and the tail is empty."""
    student, teacher = logits()
    few, all_of_it = of_union(student, teacher, V, beta), of_vocabulary(student, teacher, beta)
    assert torch.allclose(few, all_of_it, atol=1e-11)
    (gradient,) = torch.autograd.grad(few.sum(), student)
    (wanted,) = torch.autograd.grad(all_of_it.sum(), student)
    assert float(wanted.abs().max()) > 0.01
    assert float((gradient - wanted).abs().max()) < 1e-10


@pytest.mark.parametrize("beta", BETAS)
def test_more_tokens_never_say_less(beta: float) -> None:
    """0 ≤ D(k) ≤ D(k + 1) ≤ D: merging outcomes lowers a divergence; and it arrives."""
    student, teacher = logits()
    values = [of_union(student, teacher, k, beta) for k in range(1, V + 1)]
    assert bool((values[0] >= 0).all())
    for fewer, more in zip([*values[:-1], values[-1]], [*values[1:], of_vocabulary(student, teacher, beta)]):
        assert bool((fewer <= more + 1e-9).all())
    assert float((values[0] - values[-1]).detach().abs().max()) > 0.05


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_is_that_of_the_merged_distributions(beta: float) -> None:
    """By hand: the divergence of two vectors of probabilities, the last of which is 1 − the others."""
    student, teacher = logits()
    log_theta, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    ids = union(log_theta, log_teacher, 5)
    wanted = []
    for row in range(N):
        tokens = sorted(set(ids[row].tolist()))
        rest = sorted(set(range(V)) - set(tokens))
        merged = [
            torch.cat([log_p[row, tokens], log_p[row, rest].logsumexp(0)[None]]) for log_p in (log_theta, log_teacher)
        ]
        wanted.append(divergence(merged[0], merged[1], beta))
    found = of_union(student, teacher, 5, beta)
    assert torch.allclose(found, torch.stack(wanted), atol=1e-11)
    (gradient,) = torch.autograd.grad(found.sum(), student, retain_graph=True)
    (exact,) = torch.autograd.grad(torch.stack(wanted).sum(), student)
    assert float((gradient - exact).abs().max()) < 1e-10


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [4, V])
def test_float32_is_near(beta: float, k: int) -> None:
    """Where the models are sure of one token, the tail is below what rounding leaves of 1 − Σp: an error of that
    rounding times tens of nats."""
    for scale, tolerance in ((3.0, 1e-4), (30.0, 1e-3)):
        student, teacher = logits(scale)
        small = student.detach().float().requires_grad_()
        few, exact = of_union(small, teacher.float(), k, beta), of_union(student, teacher, k, beta)
        assert torch.allclose(few.double(), exact, rtol=tolerance, atol=1e-4)
        (gradient,) = torch.autograd.grad(few.sum(), small)
        (wanted,) = torch.autograd.grad(exact.sum(), student)
        assert bool(gradient.isfinite().all())
        if beta != 0 or scale == 3.0:  # KL(t‖θ) of a tail that the student lacks: see the next test
            assert float((gradient.double() - wanted).abs().max()) < 10 * tolerance


def test_a_tail_that_the_student_lacks() -> None:
    """KL(t‖θ) with t's tail 1e-3 and θ's below rounding: a large value, and a gradient that leaves the tail alone."""
    log_theta = torch.tensor([0.0, -60.0], requires_grad=True)
    log_teacher = torch.tensor([0.5, 0.499]).log()
    value = union_divergence(log_theta, log_teacher, torch.tensor([3, 5]), 0.0)
    floor = 8 * torch.finfo(torch.float32).eps
    wanted = 0.5 * math.log(0.5) + 0.499 * (math.log(0.499) + 60) + 1e-3 * math.log(1e-3 / floor)
    assert value.item() == pytest.approx(wanted, rel=1e-4)
    value.backward()
    assert log_theta.grad.tolist() == pytest.approx([-0.5, -0.499])


@pytest.mark.parametrize("beta", BETAS)
def test_a_token_that_the_teacher_rules_out_counts_with_the_tail(beta: float) -> None:
    """An ending of the teacher's that was folded into another: log t is −inf, and the student may draw it."""
    student, teacher = logits()
    ruled_out = teacher.clone()
    ruled_out[:, 7] = -torch.inf
    log_theta, log_teacher = student.log_softmax(-1), ruled_out.log_softmax(-1)
    ids = torch.tensor([7, 1, 2, 3, 1, 2]).expand(N, 6)
    without = ids[:, 1:]
    found, wanted = (
        union_divergence(log_theta.gather(-1, some), log_teacher.gather(-1, some), some, beta)
        for some in (ids, without)
    )
    assert torch.equal(found, wanted)
    found.sum().backward()
    assert bool(student.grad.isfinite().all())
    assert float(student.grad[:, 7].abs().min()) > 0  # it is part of the tail


def test_first_occurrences() -> None:
    ids = torch.tensor([[4, 2, 2, 4], [1, 2, 3, 4], [5, 5, 5, 5], [0, 3, 3, 1]])
    wanted = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 1]]
    assert first_occurrences(ids).int().tolist() == wanted
    assert first_occurrences(ids[None]).shape == (1, 4, 4)
