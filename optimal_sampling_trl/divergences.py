"""Divergences of the student θ from the teacher t at a token: over all tokens, or over a few and what is left.

`beta` picks the divergence and means what it does in TRL's `DistillationTrainer`, a generalised Jensen-Shannon
divergence (Agarwal et al., "On-Policy Distillation of Language Models", arXiv:2306.13649):

| beta    | divergence                                                     | name      |
|---------|----------------------------------------------------------------|-----------|
| 1       | KL(θ‖t)                                                        | `reverse` |
| 0       | KL(t‖θ)                                                        | `forward` |
| between | beta·KL(t‖m) + (1−beta)·KL(θ‖m), with m = (1−beta)·θ + beta·t   | `js`: 1/2 |

Dense records (`rollouts.dense`) hold only the likeliest tokens of both models. All other tokens together form one
bucket, the tail, so that two distributions of few outcomes are compared. Their divergence is never negative, never
above that of the whole vocabulary, and equal to it where every token is among them. Without the tail a student can
lower a reverse divergence by moving its mass off these tokens (seen in verl, pull request 5041). The tail bucket is
that of OpenClaw-RL on slime (pull request 4), of miles (pull request 1322) and of verl (issue 7856). The student's
likeliest tokens for a reverse divergence are verl's (pull request 7806). Here the likeliest tokens of both models are
one union.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DIVERGENCES = {"reverse": 1.0, "forward": 0.0, "js": 0.5}
"""`beta` of each divergence that has a name."""
ABSENT = -1e4
"""Log-probability of an outcome that both models rule out: its terms are 0."""
ROUNDING = 8
"""Smallest tail, in units of the type's rounding at 1. A smaller 1 − Σp is rounding, not mass."""


def divergence(
    log_theta: Float[Tensor, "*N V"], log_teacher: Float[Tensor, "*N V"], beta: float
) -> Float[Tensor, "*N"]:
    """Return the divergence of the student from the teacher over V outcomes, in nats.

    Args:
        log_theta: log-probabilities under the student, finite.
        log_teacher: log-probabilities under the teacher, finite.
        beta: in [0, 1]; see the head of this module.
    """
    if beta == 1.0:
        return _kl(log_theta, log_teacher)
    if beta == 0.0:
        return _kl(log_teacher, log_theta)
    log_middle = torch.logaddexp(log_theta + math.log(1 - beta), log_teacher + math.log(beta))
    return beta * _kl(log_teacher, log_middle) + (1 - beta) * _kl(log_theta, log_middle)


def union_divergence(
    log_theta: Float[Tensor, "*N K"],
    log_teacher: Float[Tensor, "*N K"],
    ids: Int[Tensor, "*N K"],
    beta: float,
) -> Float[Tensor, "*N"]:
    """Return the divergence over the K tokens `ids` and the tail, in nats.

    A token that appears twice counts once. A token that a model rules out counts with the tail: otherwise a teacher's
    own ending, whose mass was folded into another, would make the reverse divergence infinite.

    Args:
        log_theta: log-probabilities under the student; their gradient is the divergence's.
        log_teacher: log-probabilities under the teacher.
        ids: the tokens.
        beta: in [0, 1]; see the head of this module.
    """
    counted = first_occurrences(ids) & log_theta.isfinite() & log_teacher.isfinite()
    return divergence(_with_tail(log_theta, counted), _with_tail(log_teacher, counted), beta)


def first_occurrences(ids: Int[Tensor, "*N K"]) -> Bool[Tensor, "*N K"]:
    """Return True where a token appears for the first time in its row."""
    ordered, places = ids.sort(dim=-1, stable=True)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return torch.zeros_like(first).scatter(-1, places, first)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _with_tail(log_p: Tensor, counted: Tensor) -> Tensor:
    """Return the log-probabilities of the tokens that count, and log(1 − Σp) as that of one more outcome, the tail.

    A tail below what rounding leaves of 1 − Σp is set to that floor and has no gradient. Both are then too small to
    matter: Σp·∇log p is that of the tail itself.
    """
    mass = log_p.masked_fill(~counted, -torch.inf).exp().sum(-1, keepdim=True)
    floor = ROUNDING * torch.finfo(log_p.dtype).eps
    tail = torch.log1p(-mass.clamp(max=1 - floor))
    return torch.cat([log_p.masked_fill(~counted, ABSENT), tail], dim=-1)
