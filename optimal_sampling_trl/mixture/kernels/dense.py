"""Dense records of a step on a GPU: the launches of `scalars` and `likeliest`, without waiting for the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from .launch import CHUNK, WARPS, Cut, check_rows, cut_rows, endings_on
from .layout import CHUNK_SLOTS, SCALAR_SLOTS
from .likeliest import gather_groups, read_likeliest
from .scalars import scan, sum_scalars

AT_ONCE = 128
"""Likely tokens that one program reads, at most; a power of 2."""
GROUPS = 16
"""Groups that one program reads, at most; a power of 2."""


class MeasuredRows(NamedTuple):
    """Hold what `measure_rows` returns, as in `mixture.dense.Measured`; all scalars are there, or none."""

    scalars: Float[Tensor, "R S"]
    ids: Int[Tensor, "R K"]
    log_theta: Float[Tensor, "R K"]
    log_teacher: Float[Tensor, "R K"]


def measure_rows(
    theta: Float[Tensor, "N V_theta"],
    teacher: Float[Tensor, "N V_teacher"],
    mixed: Float[Tensor, "N V_mixed"] | None,
    temperature: Float[Tensor, " N"] | None = None,
    top_k: int = 0,
    rows: Int[Tensor, " R"] | None = None,
    stop: Sequence[int] = (),
    folded: Sequence[int] = (),
    *,
    chunk: int = CHUNK,
    warps: int = WARPS,
) -> MeasuredRows:
    """Measure rows of a step: the scalars from two readings of the logits, the likeliest tokens from the first alone.

    V is the smaller vocabulary. The logits are of any float type and stride of rows. The call waits for no device.

    Args:
        theta: the student's raw logits.
        teacher: the teacher's, its endings not yet folded.
        mixed: the mixture's, over V or more tokens; None for no scalars.
        temperature: above 0. None is 1 in all rows.
        top_k: the number of each model's likeliest tokens, at most V. Among equal logits any may be taken.
        rows: the rows to measure, R of N; None is all.
        stop: the student's end-of-sequence ids; the first takes the mass of `folded`.
        folded: the teacher's end-of-sequence ids that the student does not end with.
        chunk: logits that one program reads, a power of 2. Tests and timings set it.
        warps: warps of a program, a power of 2. Tests and timings set it.

    Raises:
        ValueError: see `mix_logits`.
    """
    check_rows("measure_rows", theta, teacher)
    device, R = theta.device, len(theta) if rows is None else len(rows)
    cut = cut_rows(theta, teacher, chunk, warps)
    step = _Step(
        logits=(theta, teacher, theta.stride(0), teacher.stride(0)),
        rows=rows,
        temperature=(temperature, 0 if temperature is None else temperature.stride(0)),
        endings=endings_on(device, stop, folded),
        V=min(theta.shape[1], teacher.shape[1]),
        cut=cut,
        parts=torch.empty(R, cut.chunks, CHUNK_SLOTS.value, device=device),
        shapes={
            "FOLDED": len(folded) if stop else 0,
            "OUTER": cut.outer,
            "INNER": cut.inner,
            "num_warps": warps,
        },
    )
    maxima = torch.empty(2, R, cut.chunks * cut.outer, device=device) if top_k else None
    if R:
        to = (step.parts, maxima, 0 if maxima is None else maxima.stride(0))
        scan[(R * cut.chunks,)](*step.read(mixed), *to, **step.shapes)
    return MeasuredRows(_sum_scalars(step, mixed), *_find_likeliest(step, maxima, top_k))


class _Step(NamedTuple):
    """Hold what several launches are called with."""

    logits: tuple[Tensor, Tensor, int, int]
    rows: Tensor | None
    temperature: tuple[Tensor | None, int]
    endings: Tensor | None
    V: int
    cut: Cut
    parts: Float[Tensor, "R chunks slots"]
    shapes: dict[str, int]

    def read(self, mixed: Tensor | None) -> tuple[Any, ...]:
        """Return the first arguments of the launches that read whole rows."""
        theta, teacher, *strides = self.logits
        logits = (theta, teacher, mixed, *strides, 0 if mixed is None else mixed.stride(0))
        return (*logits, self.rows, *self.temperature, self.endings, self.V, self.cut.chunk, self.cut.chunks)


def _sum_scalars(step: _Step, mixed: Tensor | None) -> Float[Tensor, "R S"]:
    parts, R = step.parts, len(step.parts)
    scalars = parts.new_empty(R, 0 if mixed is None else SCALAR_SLOTS.value)
    if R and mixed is not None:
        arrived = torch.zeros(R, dtype=torch.int32, device=parts.device)
        sum_scalars[(R * step.cut.chunks,)](*step.read(mixed), parts, arrived, scalars, **step.shapes)
    return scalars


def _find_likeliest(
    step: _Step, maxima: Float[Tensor, "2 R G"] | None, top_k: int
) -> tuple[Int[Tensor, "R K"], Float[Tensor, "R K"], Float[Tensor, "R K"]]:
    """Return each model's likeliest tokens and both models' log-probabilities of them."""
    parts, R, cut, shapes = step.parts, len(step.parts), step.cut, step.shapes
    ids = torch.empty(R, 2 * top_k, dtype=torch.int64, device=parts.device)
    log_theta, log_teacher = (parts.new_empty(R, 2 * top_k) for _ in range(2))
    if not R or maxima is None:
        return ids, log_theta, log_teacher
    tiles, count = cut.chunk // (cut.outer * cut.inner), min(top_k, maxima.shape[2])
    groups = maxima.topk(count, sorted=False).indices
    logits = maxima.new_empty(2, R, count * tiles * cut.inner)
    blocks = triton.cdiv(count, GROUPS)
    gather_groups[(R * blocks,)](
        *step.logits, step.rows, step.endings, step.V, cut.chunk, tiles, groups, logits, count, blocks,
        BLOCK=GROUPS, **shapes,
    )  # fmt: skip
    places = logits.topk(top_k).indices
    blocks = triton.cdiv(2 * top_k, AT_ONCE)
    read_likeliest[(R * blocks,)](
        *step.logits, step.rows, *step.temperature, step.endings, step.V, cut.chunk, cut.chunks, tiles, parts,
        groups, places, count, top_k, blocks, ids, log_theta, log_teacher, BLOCK=AT_ONCE, **shapes,
    )  # fmt: skip
    return ids, log_theta, log_teacher
