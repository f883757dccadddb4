"""The last launch: blend the two models' raw logits with the α of each row."""

from __future__ import annotations

import triton
import triton.language as tl

from ..settings import CERTAIN_LOGIT
from .average import average
from .layout import (
    NOWHERE,
    ROW_ALPHA,
    ROW_ARITHMETIC,
    ROW_BOUND,
    ROW_INVERSE_TEMPERATURE,
    ROW_METHOD,
    ROW_SLOTS,
    TOP_K_SWAP,
)
from .sums import fold_endings, load_tile
from .swap import swap

CERTAIN = tl.constexpr(CERTAIN_LOGIT)


@triton.jit
def blend(
    theta, teacher, theta_stride, teacher_stride, endings, V, chunk, chunks, rows, theta_sum, teacher_sum, alphas, out,
    V_teacher, out_chunks,
    ARITHMETIC: tl.constexpr, SWAPPED: tl.constexpr, STOP: tl.constexpr, FOLDED: tl.constexpr, OUTER: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """Write (1-α)·θ + α·t of one chunk of the teacher's V, and the row's α with the first chunk.

    If `ARITHMETIC`, rows of the arithmetic form take `average` instead, and if `SWAPPED`, those of `top_k_swap` take
    `swap`. Only they read the two sums.

    At α = 0 and α = 1 the result is one model's row, but for `top_k_swap`. Beyond the common V it is -inf. In a row
    without a solution, whose α is NaN, it is 0, and `CERTAIN` at the student's ending if `STOP` says there is one.
    """
    row, piece = (tl.program_id(0) // out_chunks).to(tl.int64), tl.program_id(0) % out_chunks
    theta += row * theta_stride
    teacher += row * teacher_stride
    out += row * V_teacher
    rows += row * ROW_SLOTS
    alpha = tl.load(rows + ROW_ALPHA).to(tl.float32)
    folded = fold_endings(teacher, endings, V, FOLDED)
    for start in range(piece * chunk, tl.minimum(piece * chunk + chunk, V_teacher), OUTER * INNER):
        s, t, index = load_tile(theta, teacher, endings, folded, start, V, FOLDED, OUTER, INNER)
        mixed = (1 - alpha) * s + alpha * t
        if ARITHMETIC:
            inverse = tl.load(rows + ROW_INVERSE_TEMPERATURE).to(tl.float32)
            if tl.load(rows + ROW_ARITHMETIC) != 0:
                mixed = average(s, t, alpha, tl.load(theta_sum + row), tl.load(teacher_sum + row), inverse)
        mixed = tl.where(alpha == 0, s, tl.where(alpha == 1, t, mixed))  # 0·(-inf) is NaN
        if SWAPPED:  # noqa: SIM102  (this one is settled when the kernel is compiled)
            if tl.load(rows + ROW_METHOD) == TOP_K_SWAP:
                mixed = swap(
                    s, t, alpha, tl.load(rows + ROW_BOUND).to(tl.float32), tl.load(theta_sum + row),
                    tl.load(teacher_sum + row), tl.load(rows + ROW_INVERSE_TEMPERATURE).to(tl.float32),
                )  # fmt: skip
        if alpha != alpha:
            mixed = tl.where(index < V, 0.0, NOWHERE)
            if STOP:
                mixed = tl.where(index == tl.load(endings), CERTAIN, mixed)
        tl.store(out + index, mixed, mask=index < V_teacher)
    if piece == 0:
        tl.store(alphas + row, alpha)
