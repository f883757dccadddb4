"""Losses of a stack of students, as the trainers have them, Adam, and one gradient for each student.

Shapes as in `stack.py`. `tests/recipes/test_stack.py` holds the gradients against the trainers'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from optimal_sampling_trl.divergences import divergence, union_divergence
from optimal_sampling_trl.losses import (
    Correction,
    anchor_factor,
    keep_positive,
    own_baseline,
    sampled_token_coefficients,
)
from stack import Batch, Stack
from stack_credit import evidence_factor, routed_weights

RATIOS = Correction("token_truncate")
UNLIKELY = 0.2
"""A token that the student gives less than this is improbable."""


class Losses(NamedTuple):
    """Coefficients of the terms of each student's loss, (S,) each.

    Args:
        reward: of GRPO's advantages.
        negatives: whether the mixture's tokens keep advantages below 0.
        positives: whether all tokens lose theirs.
        sampled: of log t − log θ of the sampled token.
        divergence: of KL(θ‖t).
        forward: of KL(t‖θ).
        likeliest: no coefficient: how many of each model's likeliest tokens KL(θ‖t) is taken over, the others as one
            outcome, as dense records have it; 0 is the whole vocabulary.
        imitation: of −log θ of the sampled tokens: fine-tuning on them.
        accepted: of −log θ times the weight of the completion: filtered fine-tuning, RAFT.
        unlikely: of log θ of the tokens to which the student gives less than `UNLIKELY`: a fixed negative advantage.
        evidence, anchored: the teacher's shares in the credit of a token, as RLSD and RLAD have it (`stack_credit`).
        wrong_symmetric, wrong_reverse, wrong_sampled: of what a completion that is wrong learns from the teacher in
            the reward's place, as in SRPO: Jensen-Shannon divergence, KL(θ‖t), log t − log θ of the sampled token.
        own_baseline: whether advantages are over the mean of the student's own completions, as in MENTOR.
        withdrawn: the share that the mixture's advantages have lost.
        ratios: whether they are multiplied by the ratio θ/q of each token, as `RATIOS` limits it.
    """

    reward: Tensor
    negatives: Tensor
    positives: Tensor
    sampled: Tensor
    divergence: Tensor
    forward: Tensor
    likeliest: Tensor
    imitation: Tensor
    accepted: Tensor
    unlikely: Tensor
    evidence: Tensor
    anchored: Tensor
    wrong_symmetric: Tensor
    wrong_reverse: Tensor
    wrong_sampled: Tensor
    own_baseline: Tensor
    withdrawn: Tensor
    ratios: Tensor


def advantages(rewards: Tensor, group: int | Tensor) -> Tensor:
    """TRL's: the rewards (S, B) less their group's mean, over its standard deviation.

    Args:
        group: completions of a prompt, one number or one for each student, (S,).
    """
    if isinstance(group, Tensor):
        result = torch.zeros_like(rewards)
        for size in sorted(set(group.tolist())):
            result = torch.where((group == size)[:, None], advantages(rewards, int(size)), result)
        return result
    groups = rewards.view(*rewards.shape[:-1], -1, group)
    centred = groups - groups.mean(-1, keepdim=True)
    return (centred / (groups.std(-1, keepdim=True) + 1e-4)).view_as(rewards)


def own_advantages(rewards: Tensor, mixed: Tensor, group: int | Tensor) -> Tensor:
    """`advantages` over the baseline of the completions (S, B) that are not `mixed`."""
    if isinstance(group, Tensor):
        result = torch.zeros_like(rewards)
        for size in sorted(set(group.tolist())):
            result = torch.where((group == size)[:, None], own_advantages(rewards, mixed, int(size)), result)
        return result
    return own_baseline(rewards.reshape(-1, group), ~mixed.reshape(-1, group)).view_as(rewards)


def loss(
    student: Stack,
    batch: Batch,
    rewards: Tensor,
    mixed: Tensor,
    terms: Losses,
    group: int | Tensor,
    clip: float = 5.0,
    weights: Tensor | None = None,
) -> Tensor:
    """The loss (S,) of each student on its own rollouts, a mean over its tokens.

    Args:
        rewards: (S, B).
        mixed: (S, B, T), True where the mixture drew the token.
        group: as in `advantages`.
        clip: limits log t − log θ, in nats.
        weights: (S, B) of the completions in filtered fine-tuning; None is 1 where the reward is above 0.
    """
    T = batch.ids.shape[-1]
    logits = student.logits(torch.cat([batch.prompts, batch.ids], dim=-1), keep=T + 1)[:, :, :-1]
    log_all = torch.log_softmax(logits, dim=-1)  # (S, B, T, V)
    log_theta = log_all.gather(-1, batch.ids[..., None])[..., 0]
    weights = (rewards > 0).float() if weights is None else weights
    routed = _routed(batch, rewards, terms)
    coefficient = _policy_gradient(batch, rewards, mixed, log_theta.detach(), terms, group, clip, routed)
    coefficient = coefficient + _wide(terms.imitation) + _wide(terms.accepted) * weights[..., None]
    total = -(coefficient * log_theta * batch.mask).sum((1, 2))
    if bool((terms.divergence > 0).any()):
        distance = _from_teacher(log_all, batch.teacher, terms.likeliest)
        total = total + terms.divergence * (distance * batch.mask).sum((1, 2))
    if bool((terms.forward > 0).any()):
        total = total + terms.forward * (divergence(log_all, batch.teacher, 0.0) * batch.mask).sum((1, 2))
    for wrong, beta in ((terms.wrong_reverse, 1.0), (terms.wrong_symmetric, 0.5)):
        if bool((wrong > 0).any()):
            total = total + wrong * (divergence(log_all, batch.teacher, beta) * routed).sum((1, 2))
    return total / batch.mask.sum((1, 2)).clamp(min=1)


def _from_teacher(log_theta: Tensor, log_teacher: Tensor, likeliest: Tensor) -> Tensor:
    """KL(θ‖t) of each token (S, B, T), over the tokens that each student's `likeliest` (S,) says."""
    distance = divergence(log_theta, log_teacher, 1.0)
    for count in {int(count) for count in likeliest.tolist()} - {0}:
        ids = torch.cat([one.topk(count).indices for one in (log_theta.detach(), log_teacher)], dim=-1)
        few = union_divergence(log_theta.gather(-1, ids), log_teacher.gather(-1, ids), ids, 1.0)
        distance = torch.where(_wide(likeliest) == count, few, distance)
    return distance


def _routed(batch: Batch, rewards: Tensor, terms: Losses) -> Tensor:
    """The weight (S, B, T) of the tokens that learn from the teacher in the reward's place; 0 on all others."""
    routes = terms.wrong_symmetric + terms.wrong_reverse + terms.wrong_sampled > 0  # (S,)
    routed = _wide(routes) * (rewards <= 0)[..., None] * batch.mask
    return routed_weights(batch.teacher, routed) if bool(routes.any()) else routed


def _policy_gradient(
    batch: Batch,
    rewards: Tensor,
    mixed: Tensor,
    log_theta: Tensor,
    terms: Losses,
    group: int | Tensor,
    clip: float,
    routed: Tensor,
) -> Tensor:
    """The advantage (S, B, T) of each token: the reward's, the teacher's and that of improbable tokens."""
    rows = mixed.any(-1)  # (S, B)
    chosen = advantages(rewards, group)
    if bool((terms.own_baseline > 0).any()):
        chosen = torch.where(terms.own_baseline[:, None] > 0, own_advantages(rewards, rows, group), chosen)
    plain = chosen[..., None].expand(log_theta.shape)
    kept = keep_positive(plain.reshape(-1), mixed.reshape(-1)).view(plain.shape)
    kept = torch.where(_wide(terms.negatives) > 0, plain, kept)
    kept = torch.where(_wide(terms.positives) > 0, plain.clamp(min=0), kept).masked_fill(routed > 0, 0.0)
    log_ratio = batch.log_teacher - log_theta
    factor = evidence_factor(kept, log_ratio, _wide(terms.evidence))
    factor = factor * anchor_factor(kept, log_ratio, _wide(terms.anchored))
    towards = sampled_token_coefficients(
        batch.log_teacher.flatten(1), log_theta.flatten(1), batch.mask.flatten(1), clip=clip
    ).view(log_theta.shape)
    below = (log_theta < math.log(UNLIKELY)).float()
    teacher = (_wide(terms.sampled) + _wide(terms.wrong_sampled) * routed) * towards
    ratios = RATIOS.weights(*(x.flatten(0, 1) for x in (log_theta, batch.log_q, batch.mask, rows))).view_as(kept)
    factor = factor * torch.where(_wide(terms.ratios) > 0, ratios, 1.0)
    factor = factor * torch.where(rows[..., None], 1 - _wide(terms.withdrawn), 1.0)
    return _wide(terms.reward) * kept * factor + teacher - _wide(terms.unlikely) * below


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None]


class Adam:
    """Adam on a stack, each student with its own rate (S,), its gradient clipped to a norm of 1 as TRL's is."""

    def __init__(self, weights: Mapping[str, Tensor], rates: Tensor) -> None:
        self.weights, self.rates, self.steps = weights, rates, 0
        self.first, self.second = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], share: float) -> None:
        """One update at `share` of the rates; a gradient of NaN leaves its student where it stands."""
        self.steps += 1
        norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()  # (S,)
        scale = torch.where(norm.isfinite(), (1 / (norm + 1e-6)).clamp(max=1.0), 0.0)
        for name, gradient in gradients.items():
            wide = (-1, *[1] * (gradient.ndim - 1))
            clipped = gradient.nan_to_num(0.0, 0.0, 0.0) * scale.view(wide)
            first = self.first[name].lerp_(clipped, 0.1)
            second = self.second[name].lerp_(clipped.square(), 0.001)
            mean, spread = first / (1 - 0.9**self.steps), (second / (1 - 0.999**self.steps)).sqrt_()
            self.weights[name].sub_(mean / (spread + 1e-8) * (share * self.rates).view(wide))


def gradients(student: Stack, compute: Tensor) -> dict[str, Tensor]:
    """The gradient of Σ of a loss (S,): each student's own, for no loss reads another's weights."""
    found = torch.autograd.grad(compute.sum(), list(student.weights.values()))
    return dict(zip(student.weights, found, strict=True))
