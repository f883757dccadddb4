"""The mixture of a decoding step in Triton: α of each row and the logits to sample from, without waiting for the host.

Let s and t be the logits over temperature, shifted so that each row's largest is 0. Every sum that the equations at
the head of `mixture` need has the form

    S_k(p) = Σ x^k e^((1-p)s + pt),  x = t - s,

over the tokens that both models have. K = log S_0 has the slope S_1/S_0 = E_p[x] and the curvature Var_p[x]. With
c = log Σe^t - log Σe^s, each over a whole row, ℓ = x - c. The launches have a program for each chunk of each row, so
that even one row alone fills a chip:

1. `nodes.begin` sums at p = 0, ½ and 1. The last program of a row joins the sums of its chunks and finds the root on
   the cubics through the nodes. A row whose α is known, or follows from these sums, is done.
2. `steps.step`, `STEPS` times, takes the moments at α and makes a step of third order in a bracket. Most rows are done
   after the first. Rows still unsolved after the last launch are finished by one program each.
3. `blend.blend` writes the blended logits.

`average` holds what the arithmetic form needs, `swap` what `top_k_swap` does. Batches without such a row run kernels
compiled without it.

The sums are float32, and joined in float64. Differences that float32 would ruin are computed directly: x is the
difference of the logits themselves, less that of the two largest, and the terms of S_0(p') - S_0(p) are summed as
e^a·(e^(b-a) - 1), with a series where b - a is small. So the errors are 1e-7 of E|x|, however near the rows are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from ..folding import fold_eos
from ..settings import FIELDS, MixtureRows
from ..swap import kth_largest
from .blend import blend
from .layout import CHUNK_SLOTS, LANES, ROW_SLOTS
from .nodes import begin
from .steps import step

CHUNK = 8192
"""Logits of a row that one program reads, tile by tile; more where a row would have more than `LANES` chunks."""
WARPS = 4
STEPS = 3
"""Launches that refine α."""


class MixedLogits(NamedTuple):
    """Hold what `mix_logits` returns; all on the device, float32."""

    logits: Float[Tensor, "N V_teacher"]
    alpha: Float[Tensor, " N"]
    theta_sum: Float[Tensor, " N"]
    teacher_sum: Float[Tensor, " N"]


def mix_logits(
    theta: Float[Tensor, "N V_theta"],
    teacher: Float[Tensor, "N V_teacher"],
    rows: MixtureRows,
    temperature: Float[Tensor, " N"] | None = None,
    stop: Sequence[int] = (),
    folded: Sequence[int] = (),
    *,
    chunk: int = CHUNK,
    warps: int = WARPS,
) -> MixedLogits:
    """Solve α in each row and mix the raw logits. The call waits for no device and may be captured in a CUDA graph.

    V is the smaller vocabulary; the larger one's tokens beyond it take no part.

    Args:
        theta: the student's raw logits, bfloat16, float16 or float32. Rows may have any stride, a row's logits lie
            next to each other.
        teacher: the teacher's raw logits, likewise.
        rows: how each row's α is chosen; its columns are of any number type and any stride.
        temperature: above 0; acts on both models before α is solved. None is 1 in all rows.
        stop: the student's end-of-sequence ids; the first takes the mass of `folded`.
        folded: the teacher's end-of-sequence ids that the student does not end with.
        chunk: logits that one program reads, a power of 2. Tests and timings set it.
        warps: warps of a program, a power of 2. Tests and timings set it.

    Returns:
        logits: the raw logits mixed as `mixing.mix_at` does, -inf beyond V; at α = 0 and 1 one model's row exactly. In
            a row without a solution they are 0, and `CERTAIN_LOGIT` at the first of `stop`, so that the sequence ends.
        alpha: NaN in a row without a solution: a NaN or +inf among its logits, a model without any finite logit, or
            in the geometric form no token with mass under both where 0 < α < 1.
        theta_sum: log Σ e^(θ/temperature) over V; not finite where the student's row is broken.
        teacher_sum: log Σ e^(t/temperature) over V, the endings folded; not finite where the teacher's row is broken.

    Raises:
        ValueError: where a row's logits do not lie next to each other, or the two have different numbers of rows.
    """
    check_rows("mix_logits", theta, teacher)
    N, V_teacher = teacher.shape
    V = min(theta.shape[1], V_teacher)
    device = theta.device
    padded = -(-N // 4) * 4  # columns that begin at multiples of 16 bytes for any N: Triton compiles for alignment
    mixed = MixedLogits(
        torch.empty(N, V_teacher, dtype=torch.float32, device=device),
        *torch.empty(3, padded, dtype=torch.float32, device=device)[:, :N].unbind(),
    )
    if not N:
        return mixed
    bound = None
    if rows.most_swapped:  # S is of the folded logits, which the bound and the kernels must see alike
        teacher = teacher[:, :V]
        if stop and folded:
            teacher, folded = fold_eos(teacher.float(), folded, stop[0]), ()
        bound = kth_largest(teacher, rows)
    outer, inner, chunk, chunks = cut_rows(theta, teacher, chunk, warps)
    out_chunks = triton.cdiv(V_teacher, chunk)
    parts = torch.empty(N, chunks, CHUNK_SLOTS.value, dtype=torch.float32, device=device)
    state = torch.empty(N, ROW_SLOTS.value, dtype=torch.float64, device=device)
    arrived = torch.zeros(1 + STEPS, padded, dtype=torch.int32, device=device)
    endings = endings_on(device, stop, folded)
    logits = (theta, teacher, theta.stride(0), teacher.stride(0), endings, V, chunk, chunks)
    shapes = {"FOLDED": len(folded) if stop else 0, "OUTER": outer, "INNER": inner, "num_warps": warps}
    arithmetic, swapped = bool(rows.methods("arithmetic")), bound is not None
    columns = {name: getattr(rows, name) for name in FIELDS if name != "swap_top_k"}
    columns |= {"bound": bound, "temperature": temperature}
    columns["form"] = rows.form if arithmetic else None
    strides = {f"{name}_stride": 0 if column is None else column.stride(0) for name, column in columns.items()}
    sums = {"theta_sum": mixed.theta_sum, "teacher_sum": mixed.teacher_sum}
    begin[(N * chunks,)](*logits, **columns, **strides, parts=parts, rows=state, arrived=arrived[0], **sums, **shapes)
    for number in range(1, 1 + STEPS):
        step[(N * chunks,)](*logits, parts, state, arrived[number], number == STEPS, ARITHMETIC=arithmetic, **shapes)
    shapes |= {"OUTER": outer * inner // min(inner, 4), "INNER": min(inner, 4)}  # it writes float32, 4 in 16 bytes
    read = (mixed.theta_sum, mixed.teacher_sum) if arithmetic or swapped else (None, None)
    out = (mixed.alpha, mixed.logits, V_teacher, out_chunks)
    blend[(N * out_chunks,)](*logits, state, *read, *out, arithmetic, swapped, bool(stop), **shapes)
    return mixed


class Cut(NamedTuple):
    """Say how a row is cut: into chunks, one a program, and those into tiles of `outer` threads × `inner` logits."""

    outer: int
    inner: int
    chunk: int
    chunks: int


def cut_rows(theta: Tensor, teacher: Tensor, chunk: int, warps: int) -> Cut:
    """Cut the rows of both models' logits; `chunk` grows where a row would have more than `LANES` chunks."""
    V = min(theta.shape[1], teacher.shape[1])
    inner = 16 // max(theta.element_size(), teacher.element_size())  # 16 bytes next to each other in a thread
    outer = min(32 * warps, max(1, chunk // inner))
    chunk = max(chunk, triton.cdiv(V, LANES.value * outer * inner) * outer * inner)
    return Cut(outer, inner, chunk, triton.cdiv(V, chunk))


def check_rows(owner: str, theta: Tensor, teacher: Tensor) -> None:
    """Refuse logits that the kernels would read wrongly, in the name of the function `owner`."""
    if len(theta) != len(teacher):
        raise ValueError(f"{owner}: {len(theta)} rows of the student's logits, {len(teacher)} of the teacher's.")
    for name, logits in (("theta", theta), ("teacher", teacher)):
        if logits.stride(1) != 1 and logits.shape[1] > 1:
            raise ValueError(
                f"{owner}: the logits of a row of `{name}` lie {logits.stride(1)} numbers apart; wanted 1. "
                "Call `.contiguous()` on them."
            )


def endings_on(device: torch.device, stop: Sequence[int], folded: Sequence[int]) -> Tensor | None:
    """Return the id that takes the mass, then those that it is taken from; None where there is none to take it."""
    return _endings(int(stop[0]), tuple(folded), device) if stop else None


@lru_cache(maxsize=8)
def _endings(stop: int, folded: tuple[int, ...], device: torch.device) -> Tensor:
    """Copy the endings to the device once."""
    return torch.tensor([stop, *folded], dtype=torch.int64, device=device)
