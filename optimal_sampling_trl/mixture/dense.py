"""Exact numbers of two models and their mixture at a token, and each model's likeliest tokens, in torch.

The symbols are those at the head of `mixture`. Every number is taken over the whole common vocabulary, at the sampling
temperature. A divergence KL(p‖r) is +inf where p has a token that r lacks, as its definition says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

AT_ONCE = 1 << 24
"""The number of logits measured at a time: 64 MiB in float32, of which a few copies are held."""


class Distributions(NamedTuple):
    """Hold the distributions of a step's rows as log-probabilities."""

    log_theta: Float[Tensor, "N V"]
    log_teacher: Float[Tensor, "N V"]
    log_q: Float[Tensor, "N V"]


class Measured(NamedTuple):
    """Hold what `measure` returns: K is twice the number of each model's likeliest tokens."""

    scalars: Float[Tensor, "N S"]
    ids: Int[Tensor, "N K"]
    log_theta: Float[Tensor, "N K"]
    log_teacher: Float[Tensor, "N K"]


def measure(
    theta: Float[Tensor, "N V"],
    teacher: Float[Tensor, "N V"],
    mixed: Float[Tensor, "N V"],
    temperature: float | Float[Tensor, " N"],
    scalars: Sequence[str],
    top_k: int,
) -> Measured:
    """Measure the rows of a step in float32. Does not wait for a GPU.

    Args:
        theta: the student's raw logits over the common vocabulary.
        teacher: the teacher's, its endings folded.
        mixed: the mixture's, of which softmax at the temperature is q: see `mix_at`.
        temperature: above 0; one for all rows, or one for each.
        scalars: names among `SCALARS`.
        top_k: how many of each model's likeliest tokens are returned, the student's before the teacher's, in falling
            order; at most V.

    Returns:
        scalars: (N, S) in nats, a column for each name; `overlap` is a probability.
        ids: (N, 2·top_k) the likeliest tokens.
        log_theta: (N, 2·top_k) their log-probabilities under the student.
        log_teacher: (N, 2·top_k) under the teacher.
    """
    size = max(1, AT_ONCE // max(theta.shape[1], 1))
    scale = temperature[:, None] if isinstance(temperature, Tensor) else theta.new_full((len(theta), 1), temperature)
    parts = zip(theta.split(size), teacher.split(size), mixed.split(size), scale.split(size), strict=True)
    measured = [_measure_part(*part, scalars, top_k) for part in parts]
    return measured[0] if len(measured) == 1 else Measured(*(torch.cat(column) for column in zip(*measured)))


def _measure_part(
    theta: Tensor, teacher: Tensor, mixed: Tensor, scale: Float[Tensor, "N 1"], scalars: Sequence[str], top_k: int
) -> Measured:
    rows = Distributions(*(torch.log_softmax(one.float() / scale.float(), -1) for one in (theta, teacher, mixed)))
    numbers = [_MEASURES[name](rows) for name in scalars]
    ids = torch.cat([rows.log_theta.topk(top_k).indices, rows.log_teacher.topk(top_k).indices], 1)
    return Measured(
        torch.stack(numbers, 1) if numbers else rows.log_q.new_zeros(len(ids), 0),
        ids,
        rows.log_theta.gather(1, ids),
        rows.log_teacher.gather(1, ids),
    )


def _divergence(log_p: Float[Tensor, "N V"], log_r: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """Return KL(p‖r)."""
    both = log_p.isfinite() & log_r.isfinite()
    value = torch.linalg.vecdot(log_p.exp(), torch.where(both, log_p - log_r, 0.0)).clamp(min=0.0)
    return value.masked_fill((log_r.isneginf() & ~log_p.isneginf()).any(-1), torch.inf)


def _entropy(log_p: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    return -torch.linalg.vecdot(log_p.exp(), torch.where(log_p.isneginf(), 0.0, log_p))


_MEASURES: dict[str, Callable[[Distributions], Float[Tensor, " N"]]] = {
    "kl_theta_teacher": lambda rows: _divergence(rows.log_theta, rows.log_teacher),
    "kl_teacher_theta": lambda rows: _divergence(rows.log_teacher, rows.log_theta),
    "kl_q_theta": lambda rows: _divergence(rows.log_q, rows.log_theta),
    "kl_q_teacher": lambda rows: _divergence(rows.log_q, rows.log_teacher),
    "entropy_theta": lambda rows: _entropy(rows.log_theta),
    "entropy_teacher": lambda rows: _entropy(rows.log_teacher),
    "overlap": lambda rows: torch.minimum(rows.log_theta, rows.log_q).exp().sum(-1),
}
SCALARS = tuple(_MEASURES)
"""KL(θ‖t), KL(t‖θ), KL(q‖θ), KL(q‖t), H(θ) and H(t) in nats, and Σ min(θ, q), the probability that speculative
sampling would accept a draft of the student."""
