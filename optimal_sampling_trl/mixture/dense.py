"""Exact numbers of two models and their mixture at a token, and each model's likeliest tokens.

The symbols are those at the head of `mixture`. Every number is taken over the whole common vocabulary, at the sampling
temperature. A divergence KL(p‖r) is +inf where p has a token that r lacks, as its definition says. Here they are
written in torch; on a GPU the kernels measure the same, in one or two readings of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .folding import fold_eos
from .mixing import has_kernels

AT_ONCE = 1 << 24
"""The number of logits that torch measures at a time: 64 MiB in float32, of which a few copies are held."""


class Distributions(NamedTuple):
    """Hold the distributions of a step's rows as log-probabilities."""

    log_theta: Float[Tensor, "N V"]
    log_teacher: Float[Tensor, "N V"]
    log_q: Float[Tensor, "N V"]


class Measured(NamedTuple):
    """Hold what `measure` returns: K is twice the number of each model's likeliest tokens."""

    scalars: Float[Tensor, "R S"]
    ids: Int[Tensor, "R K"]
    log_theta: Float[Tensor, "R K"]
    log_teacher: Float[Tensor, "R K"]


def measure(
    theta: Float[Tensor, "N V_theta"],
    teacher: Float[Tensor, "N V_teacher"],
    mixed: Float[Tensor, "N V_mixed"],
    temperature: float | Float[Tensor, " N"],
    scalars: Sequence[str],
    top_k: int,
    rows: Int[Tensor, " R"] | None = None,
    stop: Sequence[int] = (),
    folded: Sequence[int] = (),
) -> Measured:
    """Measure rows of a step in float32. V is the smaller vocabulary. Does not wait for a GPU.

    Args:
        theta: the student's raw logits.
        teacher: the teacher's.
        mixed: the mixture's over V or more tokens, of which softmax at the temperature is q: see `mix_at`.
        temperature: above 0; one for all rows, or one for each.
        scalars: names among `SCALARS`.
        top_k: how many of each model's likeliest tokens are returned, the student's before the teacher's, in falling
            order; at most V. The order of equal logits is not defined.
        rows: the rows that are measured, R of N; None is all of them.
        stop: the student's end-of-sequence ids, of which the first takes the mass of `folded`.
        folded: the teacher's end-of-sequence ids that are still to be folded: see `fold_eos`.

    Returns:
        scalars: (R, S) in nats, a column for each name; `overlap` is a probability.
        ids: (R, 2·top_k) the likeliest tokens.
        log_theta: (R, 2·top_k) their log-probabilities under the student.
        log_teacher: (R, 2·top_k) under the teacher.
    """
    if not isinstance(temperature, Tensor):
        temperature = torch.full((len(theta),), temperature, device=theta.device)
    if has_kernels(theta):
        from .kernels.dense import measure_rows

        found = measure_rows(theta, teacher, mixed if scalars else None, temperature, top_k, rows, stop, folded)
        return Measured(_columns(found.scalars, scalars), *found[1:])
    V = min(theta.shape[1], teacher.shape[1])
    rows = torch.arange(len(theta), device=theta.device) if rows is None else rows
    measured = []
    for part in rows.split(max(1, AT_ONCE // max(V, 1))):
        row_theta, row_teacher, row_mixed = (one[part, :V].float() for one in (theta, teacher, mixed))
        row_teacher = fold_eos(row_teacher, folded, stop[0]) if stop else row_teacher
        measured.append(measure_in_torch(row_theta, row_teacher, row_mixed, temperature[part, None], scalars, top_k))
    return measured[0] if len(measured) == 1 else Measured(*(torch.cat(column) for column in zip(*measured)))


def _columns(every: Float[Tensor, "R 7"] | Float[Tensor, "R 0"], names: Sequence[str]) -> Float[Tensor, "R S"]:
    """Return the columns of the named scalars."""
    if tuple(names) in ((), SCALARS):
        return every
    # One by one: a list of columns would be copied to the device, and a step would wait.
    return torch.stack([every[:, SCALARS.index(name)] for name in names], 1)


def measure_in_torch(
    theta: Float[Tensor, "R V"],
    teacher: Float[Tensor, "R V"],
    mixed: Float[Tensor, "R V"],
    scale: Float[Tensor, "#R 1"],
    scalars: Sequence[str],
    top_k: int,
) -> Measured:
    """Measure a part of the rows at once; the arguments are those of `measure`, over V, the endings folded."""
    rows = Distributions(*(torch.log_softmax(one / scale.float(), -1) for one in (theta, teacher, mixed)))
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
sampling would accept a draft of the student. The kernels write them in this order."""
