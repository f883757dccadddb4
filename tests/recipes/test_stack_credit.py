"""Credit of single tokens: each factor's gradient is that of the objective as its paper writes it, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import stack
import stack_credit
import stack_losses
from digit_tasks import END
from helpers.training import make_untrained_pair

SHAPE = (2, 8, 6)


@pytest.fixture
def records() -> tuple[Tensor, Tensor, Tensor]:
    """Advantages of both signs, log θ with a gradient, and log t; some ratios lie beyond every clip."""
    advantages = torch.randn(*SHAPE[:2], 1, dtype=torch.float64).expand(SHAPE)
    log_theta = -torch.rand(SHAPE, dtype=torch.float64) * 4
    return advantages, log_theta.requires_grad_(), -torch.rand(SHAPE, dtype=torch.float64) * 4


def gradient_of(objective: Tensor, log_theta: Tensor) -> Tensor:
    return torch.autograd.grad(objective.sum(), log_theta)[0]


def test_evidence_is_rlsds(records: tuple[Tensor, Tensor, Tensor]) -> None:
    """A·(1 − λ + λ·clip(w)) with w = (t/θ)^sign(A), for two values of λ, and a sign that no clip turns."""
    advantages, log_theta, log_teacher = records
    share = torch.tensor([0.5, 1.0], dtype=torch.float64)[:, None, None]
    ratio = (log_teacher.exp() / log_theta.exp()).detach()
    weight = torch.where(advantages > 0, ratio, 1 / ratio).clamp(0.8, 1.2)
    wanted = gradient_of(advantages * (1 - share + share * weight) * log_theta, log_theta)
    log_ratio = log_teacher - log_theta.detach()
    factor = stack_credit.evidence_factor(advantages, log_ratio, share)
    torch.testing.assert_close(advantages * factor, wanted, rtol=1e-12, atol=0)
    assert 0.3 < float((weight == 1.2).double().mean() + (weight == 0.8).double().mean()) < 1
    assert torch.equal(stack_credit.evidence_factor(advantages, log_ratio, 0 * share), torch.ones(SHAPE))


def terms(**values: float) -> stack_losses.Losses:
    return stack_losses.Losses(*(torch.tensor([values.get(name, 0.0)]) for name in stack_losses.Losses._fields))


@pytest.mark.parametrize("name", ["wrong_symmetric", "wrong_reverse", "wrong_sampled"])
def test_wrong_completions_learn_from_the_teacher_and_right_ones_from_the_reward(tmp_path: Path, name: str) -> None:
    """The loss is GRPO's over the right completions and the teacher's over the wrong ones, weighted by exp(−H(t))."""
    teacher, student = (stack.Stack.load(folder, 1, "cpu") for folder in make_untrained_pair(tmp_path))
    for weight in student.weights.values():
        weight.requires_grad_()
    batch = stack.sample_alone(student, teacher, torch.randint(3, 13, (1, 8, 5)), 6, END)
    rewards, mixed = torch.tensor([[1.0, 0, 0, 0, 1, 1, 0, 1]]), torch.zeros(1, 8, 6, dtype=torch.bool)
    found = stack_losses.loss(student, batch, rewards, mixed, terms(reward=1.0, **{name: 0.7}), group=4)
    log_theta = student.logits(torch.cat([batch.prompts, batch.ids], -1), keep=7)[:, :, :-1].log_softmax(-1)
    sampled = log_theta.gather(-1, batch.ids[..., None])[..., 0]
    ratio = (batch.log_teacher - sampled).detach().clamp(-5, 5)
    middle = ((log_theta.exp() + batch.teacher.exp()) / 2).log()
    of_token = {
        "wrong_symmetric": sum((x.exp() * (x - middle)).sum(-1) for x in (log_theta, batch.teacher)) / 2,
        "wrong_reverse": (log_theta.exp() * (log_theta - batch.teacher)).sum(-1),
        "wrong_sampled": -ratio * sampled,
    }[name]
    wrong = (rewards == 0)[..., None] * batch.mask
    confidence = torch.exp(-torch.distributions.Categorical(logits=batch.teacher).entropy()) * wrong
    confidence = confidence * wrong.sum() / confidence.sum()
    plain = stack_losses.advantages(rewards, 4)[..., None]
    right = -(plain * (rewards > 0)[..., None] * sampled * batch.mask).sum()
    wanted = (right + 0.7 * (confidence * of_token).sum()) / batch.mask.sum()
    after = stack_losses.gradients(student, wanted)
    for weight, gradient in stack_losses.gradients(student, found).items():
        torch.testing.assert_close(gradient, after[weight], rtol=1e-3, atol=1e-7)
    assert max(float(gradient.abs().max()) for gradient in after.values()) > 1e-3
