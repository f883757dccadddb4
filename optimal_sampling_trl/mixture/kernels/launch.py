"""The mixture of a decoding step in Triton: α of each row and the logits to sample from, without waiting for the host.

With s and t the raw logits of student and teacher at the sampling temperature, each less its row's largest, every sum
that the equations at the head of `mixture` need is one of S_k(p) = Σ x^k e^((1-p)s + pt) over the tokens that both
models have, where x = t - s. K = log S_0 has the slope S_1/S_0 = E_p[x] and the curvature Var_p[x]; c is the logarithm
of the ratio of the two rows' own sums, so that ℓ = x - c. Launches, each with a program for each chunk of each row, so
that one row alone still fills a chip:

1. `_begin` sums at p = 0, ½ and 1, whose terms are products of e^(s/2) and e^(t/2). The last program of a row joins
   the chunks' sums and finds the root on the cubics through the nodes. A row whose α is known, or follows from these
   sums, is done.
2. `_step`, `STEPS` times, takes the moments at α and makes a step of third order in a bracket, as `solver` does with
   Newton's. A row is done when the step's next order is small: most are after the first, and programs of rows that
   are done return at once. What is left after the last (rows hundreds of nats apart) one program goes on with alone.
3. `_write` blends the logits.

The sums are float32, and joined in float64. What float32 would spoil is not subtracted: x is the difference of the
logits themselves, less that of the two largest, and S_0(p) - S_0(p') sums its terms as e^a·(e^(b-a) - 1), with a
series where b - a is small. So the errors are 1e-7 of E|x|, however near the rows are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..settings import METHODS, SAME_DIVERGENCE
from ..solver import SOLVER_STEPS

CHUNK = 8192
"""Logits of a row that one program reads, tile by tile; more where a row would have more than `_LANES` chunks."""
WARPS = 4
STEPS = 3
"""Launches that refine α."""
_LANES = tl.constexpr(32)
_CERTAIN = tl.constexpr(1e4)
"""The logit by which a row without a solution ends its sequence: a number that stays finite at any temperature."""

_KL_SYMMETRY = tl.constexpr(METHODS.index("kl_symmetry"))
_ESS_BALANCE = tl.constexpr(METHODS.index("ess_balance"))
_TRUST_REGION = tl.constexpr(METHODS.index("trust_region"))
_ENTROPY = tl.constexpr(METHODS.index("entropy"))
_FIXED = tl.constexpr(METHODS.index("fixed"))
_SAME = tl.constexpr(SAME_DIVERGENCE)
_PASSES = tl.constexpr(SOLVER_STEPS)
_NOWHERE = tl.constexpr(float("-inf"))
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_ALPHA_ERROR = tl.constexpr(2e-5)
_VARIATION_ERROR = tl.constexpr(2e-6)

# What is known of a row between launches, float64.
(
    _ALPHA, _DONE, _METHOD, _LOW, _HIGH, _EPSILON, _INVERSE, _MASKED,  # the request
    _TOP_THETA, _APART, _C, _WHOLE, _REST, _FAR,  # of the sums at the nodes
    _LEAST, _MOST, _LAST, _UNTRIED,  # of the search
) = (tl.constexpr(slot) for slot in range(18))  # fmt: skip
_STATE = tl.constexpr(32)

# What a chunk hands on, float32. In the first launch S_0 to S_2 at three nodes, or for `entropy` three sums a model;
_SUMS = tl.constexpr(16)
_NODE_0, _NODE_1, _NODE_2, _DIFFERENCE, _REST_THETA, _REST_TEACHER = (
    tl.constexpr(slot) for slot in (0, 3, 6, 9, 10, 11)
)
_MAX_THETA, _MAX_TEACHER, _MAX_BOTH = (tl.constexpr(slot) for slot in (13, 14, 15))
# in a step S_0 to S_3 at two powers, their difference, and the bits that the exponents of each power are relative to.
_POWER_1, _POWER_2, _STEP_DIFFERENCE, _TOP_1, _TOP_2 = (tl.constexpr(slot) for slot in (0, 4, 8, 14, 15))
_BITS_APART = tl.constexpr(32.0)
"""Sums further apart than this have no use for their difference: float32 would lose the smaller one in it."""


class MixedLogits(NamedTuple):
    """What `mix_logits` returns; all on the device, float32."""

    logits: Float[Tensor, "N V_teacher"]
    alpha: Float[Tensor, " N"]
    theta_sum: Float[Tensor, " N"]
    teacher_sum: Float[Tensor, " N"]


def mix_logits(
    theta: Float[Tensor, "N V_theta"],
    teacher: Float[Tensor, "N V_teacher"],
    method: Int[Tensor, " N"],
    alpha_min: Float[Tensor, " N"],
    alpha_max: Float[Tensor, " N"],
    fixed_alpha: Float[Tensor, " N"],
    epsilon: Float[Tensor, " N"],
    temperature: Float[Tensor, " N"] | None = None,
    masked: Bool[Tensor, " N"] | None = None,
    stop: Sequence[int] = (),
    folded: Sequence[int] = (),
    *,
    chunk: int = CHUNK,
    warps: int = WARPS,
) -> MixedLogits:
    """Solve α in each row and mix the raw logits. Waits for no device; may be captured in a CUDA graph.

    V is the smaller vocabulary; what stands beyond it in the larger takes no part.

    Args:
        theta: the student's raw logits, bfloat16, float16 or float32; rows may lie apart, a row's logits may not.
        teacher: the teacher's, likewise.
        method: indices into `solver.METHODS`.
        alpha_min: the least α of each row; this and the next three as in `mixture.Mixture`, in any float type.
        alpha_max: the largest.
        fixed_alpha: α of the rows whose method is `fixed`.
        epsilon: nats, of the rows whose method is `trust_region`.
        temperature: above 0; acts on both models before α is solved. None: 1 in all rows.
        masked: rows in which what the teacher rules out is ruled out at any α, as under a grammar. None: no row.
        stop: the student's end-of-sequence ids; the first takes the mass of `folded`.
        folded: the teacher's end-of-sequence ids that are none of the student's.
        chunk: logits that one program reads, a power of 2; for tests and timing, as is the next.
        warps: of a program, a power of 2.

    Returns:
        logits: (1-α)·θ + α·t of the raw logits, -inf beyond V; at α = 0 and 1 one model's row exactly. In a row
            without a solution 0 everywhere and 1e4 at the first of `stop`: the sequence ends.
        alpha: NaN in a row without a solution: a NaN or +inf among its logits, a model without any finite logit, or
            no token with mass under both where 0 < α < 1.
        theta_sum: log Σ e^(θ/temperature) over V; not finite where the student's row is broken.
        teacher_sum: the same of the teacher's row with its endings folded.

    Raises:
        ValueError: where a row's logits do not lie next to each other, or the two have different numbers of rows.
    """
    _check(theta, teacher)
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
    inner = 16 // max(theta.element_size(), teacher.element_size())  # next to each other in a thread: 16 bytes
    outer = min(32 * warps, max(1, chunk // inner))
    chunk = max(chunk, triton.cdiv(V, _LANES.value * outer * inner) * outer * inner)
    chunks, whole = triton.cdiv(V, chunk), triton.cdiv(V_teacher, chunk)
    part = torch.empty(N, chunks, _SUMS.value, dtype=torch.float32, device=device)
    state = torch.empty(N, _STATE.value, dtype=torch.float64, device=device)
    arrived = torch.zeros(1 + STEPS, padded, dtype=torch.int32, device=device)
    endings = _endings(int(stop[0]), tuple(folded), device) if stop else None
    logits = (theta, teacher, theta.stride(0), teacher.stride(0), endings, V, chunk, chunks)
    shapes = {"FOLDED": len(folded) if stop else 0, "OUTER": outer, "INNER": inner, "num_warps": warps}
    columns = (method, alpha_min, alpha_max, fixed_alpha, epsilon, temperature, masked)
    strides = [0 if column is None else column.stride(0) for column in columns]
    _begin[(N * chunks,)](
        *logits, *columns, *strides, part, state, arrived[0], mixed.theta_sum, mixed.teacher_sum, **shapes
    )
    for step in range(1, 1 + STEPS):
        _step[(N * chunks,)](*logits, part, state, arrived[step], step == STEPS, **shapes)
    shapes |= {"OUTER": outer * inner // min(inner, 4), "INNER": min(inner, 4)}  # what it writes is float32
    _write[(N * whole,)](*logits, state, mixed.alpha, mixed.logits, V_teacher, whole, STOP=bool(stop), **shapes)
    return mixed


def _check(theta: Tensor, teacher: Tensor) -> None:
    """Refuse what the kernels would read wrongly."""
    if len(theta) != len(teacher):
        raise ValueError(f"mix_logits: {len(theta)} rows of the student's logits, {len(teacher)} of the teacher's.")
    for name, logits in (("theta", theta), ("teacher", teacher)):
        if logits.stride(1) != 1 and logits.shape[1] > 1:
            raise ValueError(
                f"mix_logits: the logits of a row of `{name}` lie {logits.stride(1)} numbers apart; wanted 1. "
                "Call `.contiguous()` on them."
            )


@lru_cache(maxsize=8)
def _endings(stop: int, folded: tuple[int, ...], device: torch.device) -> Tensor:
    """The id that takes the mass, then those that it is taken from; copied to the device once."""
    return torch.tensor([stop, *folded], dtype=torch.int64, device=device)


# Reading and summing.


@triton.jit
def _folded(teacher, endings, V, FOLDED: tl.constexpr):
    """The teacher's logit of the student's ending, with the mass of `FOLDED` endings of its own."""
    value = 0.0
    if FOLDED > 0:
        index = tl.arange(0, 128)
        ids = tl.load(endings + index, mask=index <= FOLDED, other=V)
        values = tl.load(teacher + ids, mask=ids < V, other=_NOWHERE).to(tl.float32)
        top = tl.max(values)
        safe = tl.where(top == _NOWHERE, 0.0, top)
        value = safe + tl.log(tl.sum(tl.exp(values - safe)))
    return value


@triton.jit
def _tile(theta, teacher, endings, folded, start, V, FOLDED: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Raw logits of one row from `start` on, float32; -inf beyond V. Sums over the inner axis stay in a thread."""
    index = start + tl.arange(0, OUTER)[:, None] * INNER + tl.arange(0, INNER)[None, :]
    s = tl.load(theta + index, mask=index < V, other=_NOWHERE).to(tl.float32)
    t = tl.load(teacher + index, mask=index < V, other=_NOWHERE).to(tl.float32)
    if FOLDED > 0:
        for i in tl.static_range(FOLDED):
            t = tl.where(index == tl.load(endings + 1 + i), _NOWHERE, t)
        t = tl.where(index == tl.load(endings), folded, t)
    return s, t, index


@triton.jit
def _growth(weights, grown, z):
    """grown - weights, where grown = weights·2^z: by the series of 2^z - 1 where z is small."""
    series = z * (0.6931471806 + z * (0.2402265070 + z * (0.0555041087 + z * (0.0096181291 + z * 0.0013333558))))
    return tl.where(tl.abs(z) < 0.18, weights * series, grown - weights)


@triton.jit
def _store_sums(part, a, b, c, d, e, f, g, h, i, j, k, n, m, SLOTS: tl.constexpr):
    """Sums over the threads, all in one exchange."""
    zero = a * 0.0
    even = tl.join(tl.join(tl.join(a, i), tl.join(e, m)), tl.join(tl.join(c, k), tl.join(g, zero)))
    odd = tl.join(tl.join(tl.join(b, j), tl.join(f, zero)), tl.join(tl.join(d, n), tl.join(h, zero)))
    slot = tl.arange(0, _SUMS)
    tl.store(part + slot, tl.reshape(tl.sum(tl.join(even, odd), 0), (_SUMS,)), mask=slot < SLOTS)


@triton.jit
def _is_last(counter, programs):
    """Whether all other programs of the row have come here before; it then sees what they have stored."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") >= programs - 1


@triton.jit
def _take(part, slot, chunks, other: tl.constexpr):
    """One number of each chunk, as float64. Past the first-level cache, which other programs' stores do not reach."""
    lane = tl.arange(0, _LANES)
    return tl.load(part + lane * _SUMS + slot, mask=lane < chunks, other=other, cache_modifier=".cg").to(tl.float64)


@triton.jit
def _log1p(x):
    """log(1 + x) of float64, exact for small x (Kahan's form: the rounding of 1 + x cancels)."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * x / tl.where(y == 1.0, 1.0, y - 1.0))


@triton.jit
def _log_ratio(difference, to, log_of, log_to):
    """log_of - log_to, by the difference of the numbers themselves where they are near."""
    return tl.where(tl.abs(difference) < to / 2, _log1p(difference / to), log_of - log_to)


# The first launch.


@triton.jit
def _begin(
    theta, teacher, theta_stride, teacher_stride, endings, V, chunk, chunks, method, alpha_min, alpha_max, fixed_alpha,
    epsilon, temperature, masked, method_stride, min_stride, max_stride, fixed_stride, epsilon_stride,
    temperature_stride, masked_stride, part, state, arrived, theta_sum, teacher_sum,
    FOLDED: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    row, piece = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    chosen = tl.load(method + row * method_stride).to(tl.int32)
    low = tl.load(alpha_min + row * min_stride).to(tl.float64)
    high = tl.load(alpha_max + row * max_stride).to(tl.float64)
    inverse = tl.full((), 1.0, tl.float64)
    if temperature is not None:
        inverse = 1.0 / tl.load(temperature + row * temperature_stride).to(tl.float64)
    root = (low < high) & (chosen < _ENTROPY)
    part += row * chunks * _SUMS
    _node_sums(
        theta + row * theta_stride, teacher + row * teacher_stride, endings, piece * chunk, V, chunk,
        inverse.to(tl.float32), root, part + piece * _SUMS, FOLDED, OUTER, INNER,
    )  # fmt: skip
    if _is_last(arrived + row, chunks):
        state += row * _STATE
        mask = 0.0
        if masked is not None:
            mask = tl.where(tl.load(masked + row * masked_stride) != 0, 1.0, 0.0)
        budget = tl.load(epsilon + row * epsilon_stride).to(tl.float64)
        fixed = tl.load(fixed_alpha + row * fixed_stride).to(tl.float64)
        tl.store(state + _METHOD, chosen.to(tl.float64))
        tl.store(state + _LOW, low)
        tl.store(state + _HIGH, high)
        tl.store(state + _EPSILON, budget)
        tl.store(state + _INVERSE, inverse)
        tl.store(state + _MASKED, mask)
        _start(
            part, state, theta_sum + row, teacher_sum + row, chunks, chosen, low, high, fixed, budget, inverse, root
        )


@triton.jit
def _node_sums(
    theta, teacher, endings, first, V, chunk, inverse, root, part,
    FOLDED: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The sums of one chunk, relative to its own largest logits; those of an equation, or of an entropy."""
    folded = _folded(teacher, endings, V, FOLDED)
    last = tl.minimum(first + chunk, V)
    nothing = tl.full((OUTER,), _NOWHERE, tl.float32)
    max_theta, max_teacher, max_both = nothing, nothing, nothing
    for start in range(first, last, OUTER * INNER):
        s, t, _ = _tile(theta, teacher, endings, folded, start, V, FOLDED, OUTER, INNER)
        max_theta = tl.maximum(max_theta, tl.max(s, 1))
        max_teacher = tl.maximum(max_teacher, tl.max(t, 1))
        max_both = tl.maximum(max_both, tl.max(tl.minimum(s, t), 1))
    top_theta, top_teacher = tl.max(max_theta), tl.max(max_teacher)
    tl.store(part + _MAX_THETA, top_theta)
    tl.store(part + _MAX_TEACHER, top_teacher)
    tl.store(part + _MAX_BOTH, tl.max(max_both))
    top_theta = tl.where(top_theta == _NOWHERE, 0.0, top_theta)
    top_teacher = tl.where(top_teacher == _NOWHERE, 0.0, top_teacher)
    apart = top_teacher - top_theta
    bits = inverse * _LOG2_E
    a0 = tl.zeros((OUTER,), tl.float32)
    a1, a2, b0, b1, b2, c0, c1, c2, difference, rest_theta, rest_teacher = a0, a0, a0, a0, a0, a0, a0, a0, a0, a0, a0
    if root:
        for start in range(first, last, OUTER * INNER):
            s, t, _ = _tile(theta, teacher, endings, folded, start, V, FOLDED, OUTER, INNER)
            both = tl.minimum(s, t) != _NOWHERE
            x = tl.where(both, (t - s - apart) * bits, 0.0)
            a = tl.exp2((s - top_theta) * (bits * 0.5))
            b = tl.exp2((t - top_teacher) * (bits * 0.5))
            rest_theta += tl.sum(tl.where(both, 0.0, a * a), 1)
            rest_teacher += tl.sum(tl.where(both, 0.0, b * b), 1)
            a, b = tl.where(both, a, 0.0), tl.where(both, b, 0.0)
            ax, bx = a * x, b * x
            a0 += tl.sum(a * a, 1)
            a1 += tl.sum(a * ax, 1)
            a2 += tl.sum(ax * ax, 1)
            b0 += tl.sum(a * b, 1)
            b1 += tl.sum(a * bx, 1)
            b2 += tl.sum(ax * bx, 1)
            c0 += tl.sum(b * b, 1)
            c1 += tl.sum(b * bx, 1)
            c2 += tl.sum(bx * bx, 1)
            difference += tl.sum(_growth(a * a, b * b, x), 1)
    else:
        for start in range(first, last, OUTER * INNER):
            s, t, _ = _tile(theta, teacher, endings, folded, start, V, FOLDED, OUTER, INNER)
            u, v = (s - top_theta) * bits, (t - top_teacher) * bits
            a, b = tl.exp2(u), tl.exp2(v)
            a0 += tl.sum(tl.where(u == 0.0, 1.0, 0.0), 1)
            a1 += tl.sum(tl.where(u == 0.0, 0.0, a), 1)
            a2 += tl.sum(tl.where(u == _NOWHERE, 0.0, a * u), 1)
            b0 += tl.sum(tl.where(v == 0.0, 1.0, 0.0), 1)
            b1 += tl.sum(tl.where(v == 0.0, 0.0, b), 1)
            b2 += tl.sum(tl.where(v == _NOWHERE, 0.0, b * v), 1)
    _store_sums(part, a0, a1, a2, b0, b1, b2, c0, c1, c2, difference, rest_theta, rest_teacher, a0, _MAX_THETA - 1)


@triton.jit
def _start(part, state, theta_sum, teacher_sum, chunks, method, low, high, fixed, epsilon, inverse, root):
    """Join the chunks of a row: its normalisers, and α, or a first guess of it."""
    max_theta, max_teacher = _take(part, _MAX_THETA, chunks, _NOWHERE), _take(part, _MAX_TEACHER, chunks, _NOWHERE)
    common = tl.max(_take(part, _MAX_BOTH, chunks, _NOWHERE)) > _NOWHERE
    top_theta, top_teacher = tl.max(max_theta), tl.max(max_teacher)
    # A chunk without a finite logit has no sums: any finite number will do.
    down = tl.where(max_theta == _NOWHERE, 0.0, (max_theta - top_theta) * inverse)
    up = tl.where(max_teacher == _NOWHERE, 0.0, (max_teacher - top_teacher) * inverse)
    own = up  # 0 in the chunk of the largest, which the sum below need not be: a GPU fuses it with its products
    # The difference of the largest as x has it, rounded to float32.
    apart = (top_teacher.to(tl.float32) - top_theta.to(tl.float32)).to(tl.float64)
    shift = ((max_teacher.to(tl.float32) - max_theta.to(tl.float32)).to(tl.float64) - apart) * inverse
    up = tl.where(tl.abs(shift) < float("inf"), down + shift, up)
    middle = (low + high) / 2
    alpha = tl.where(low == high, low, tl.minimum(tl.maximum(fixed, low), high))
    done = alpha == alpha
    if root:
        whole_theta, whole_teacher, alpha, done = _guess(
            part, state, down, up, chunks, method, low, high, epsilon, apart, inverse
        )
    else:
        whole_theta, entropy_theta = _entropy_of(part, 0, down, chunks)
        whole_teacher, entropy_teacher = _entropy_of(part, 3, own, chunks)
        both = entropy_theta + entropy_teacher
        share = tl.where(both > 0, entropy_theta / tl.where(both > 0, both, 1.0), middle)
        if (method == _ENTROPY) & (low < high):
            alpha = tl.minimum(tl.maximum(share, low), high)
    sum_theta, sum_teacher = tl.log(whole_theta) + top_theta * inverse, tl.log(whole_teacher) + top_teacher * inverse
    finite = (tl.abs(sum_theta) < float("inf")) & (tl.abs(sum_teacher) < float("inf"))
    solvable = finite & (common | ((root == 0) & ((alpha == 0) | (alpha == 1))))
    tl.store(state + _ALPHA, tl.where(solvable, alpha, float("nan")))
    tl.store(state + _DONE, tl.where(done | (solvable == 0), 1.0, 0.0).to(tl.float64))
    tl.store(state + _TOP_THETA, top_theta)
    tl.store(state + _LEAST, low)
    tl.store(state + _MOST, high)
    tl.store(state + _LAST, high - low)
    tl.store(state + _UNTRIED, (low * 0 + 1))
    tl.store(theta_sum, sum_theta.to(tl.float32))
    tl.store(teacher_sum, sum_teacher.to(tl.float32))


@triton.jit
def _entropy_of(part, slot, down, chunks):
    """Σ e^u of one model's row, and its entropy in nats. `down`: each chunk's largest exponent less the row's. The
    largest terms are counted apart: of a sure row log Σ is the logarithm of 1 + little."""
    count, rest = _take(part, slot, chunks, 0.0), _take(part, slot + 1, chunks, 0.0)
    scale = tl.exp(down)
    number = tl.sum(tl.where(down == 0, count, 0.0))
    others = tl.sum(tl.where(down == 0, rest, (count + rest) * scale))
    mean = tl.sum((_take(part, slot + 2, chunks, 0.0) * _LN_2 + down * (count + rest)) * scale) / (number + others)
    return number + others, tl.log(number) + _log1p(others / number) - mean


@triton.jit
def _join(part, slot, scale, shift, chunks):
    """S_0, E_p[x] and Var_p[x] at a node. `scale`: the logarithm of what each chunk is relative to; `shift`: its x."""
    factor = tl.exp(scale)
    zero, one = _take(part, slot, chunks, 0.0), _take(part, slot + 1, chunks, 0.0) * _LN_2
    two = _take(part, slot + 2, chunks, 0.0) * (_LN_2 * _LN_2)
    s0 = tl.sum(zero * factor)
    mean = tl.sum((one + shift * zero) * factor) / s0
    shift -= mean
    return s0, mean, tl.sum((two + 2 * shift * one + shift * shift * zero) * factor) / s0


@triton.jit
def _guess(part, state, down, up, chunks, method, low, high, epsilon, apart, inverse):
    """The two rows' sums, α on the cubics through the nodes, and whether it stands."""
    shift = up - down
    s0, m0, v0 = _join(part, _NODE_0, down, shift, chunks)
    s1, m1, v1 = _join(part, _NODE_1, (down + up) / 2, shift, chunks)
    s2, m2, v2 = _join(part, _NODE_2, up, shift, chunks)
    at_theta, at_teacher = tl.exp(down), tl.exp(up)
    rest_theta = tl.sum(_take(part, _REST_THETA, chunks, 0.0) * at_theta)
    rest_teacher = tl.sum(_take(part, _REST_TEACHER, chunks, 0.0) * at_teacher)
    grown = at_teacher * _take(part, _DIFFERENCE, chunks, 0.0)
    difference = tl.sum(grown + (at_teacher - at_theta) * _take(part, _NODE_0, chunks, 0.0))
    whole_theta, whole_teacher = s0 + rest_theta, s2 + rest_teacher
    log_theta = tl.log(whole_theta)
    c = _log_ratio(difference + rest_teacher - rest_theta, whole_theta, tl.log(whole_teacher), log_theta)
    # kl_symmetry; K is relative to log Σθ from here.
    k0, k1 = tl.log(s0 / whole_theta), tl.log(s1 / whole_theta)
    k2 = _log_ratio(difference - rest_theta, whole_theta, tl.log(s2), log_theta)
    f0, f1, f2, d0, d1, d2 = m0 - c, m1 - c, m2 - c, v0, v1, v2
    flattest = tl.minimum(v0, tl.minimum(v1, v2))
    smooth = tl.abs((m0 + m2) / 2 + (v0 - v2) / 8 - m1) < 1e-4 * flattest
    smooth &= tl.abs(m2 - m0 - (v0 + 4 * v1 + v2) / 6) < 1e-3 * flattest  # a symmetric row passes the first
    stands = (method == _KL_SYMMETRY) & smooth  # a quarter of the width divides the cubic's error by 16
    if method == _TRUST_REGION:
        f0, f1, f2 = -k0 - epsilon, m1 / 2 - k1 - epsilon, m2 - k2 - epsilon
        d0, d1, d2 = 0.0 * v0, v1 / 2, v2
        stands = (f2 <= 0) & (high == 1)
    if method == _ESS_BALANCE:  # on the parabolas of K at 0 and 1, extended
        f0, f1 = k0 - k2 - m2 - v2 / 2 + 2 * c, k0 - k2 - (m0 + m2) / 2 + (v0 - v2) / 8 + 2 * c
        f2 = k0 - k2 - m0 + v0 / 2 + 2 * c
        d0, d1, d2 = m2 - m0 + v2, m2 - m0 + (v0 + v2) / 2, m2 - m0 + v0
    middle = (low + high) / 2
    alpha = tl.minimum(tl.maximum(_root_on_cubics(f0, f1, f2, d0, d1, d2), low), high)
    same = (m2 - m0 < _SAME) & (method != _TRUST_REGION)
    far = tl.minimum(s0, tl.minimum(s1, s2)) < 1e-15
    alpha = tl.where(same | (alpha != alpha), middle, tl.where(stands & (method == _TRUST_REGION), high, alpha))
    # The steps have x less what it is likely to be: their moments about 0 are then near the central ones.
    centre = tl.where(method == _TRUST_REGION, m0, c)
    moved = (apart + tl.where(tl.abs(centre) < float("inf"), centre, 0.0) / inverse).to(tl.float32).to(tl.float64)
    tl.store(state + _APART, moved)
    tl.store(state + _C, c - (moved - apart) * inverse)
    tl.store(state + _WHOLE, whole_theta)
    tl.store(state + _REST, rest_theta)
    tl.store(state + _FAR, tl.where(far | (method == _ESS_BALANCE), 1.0, 0.0).to(tl.float64))
    return whole_theta, whole_teacher, alpha, same | (stands & (far == 0))


@triton.jit
def _root_on_cubics(f0, f1, f2, d0, d1, d2):
    """The root of a rising function on the cubic with its values f and slopes d at 0 and ½, or at ½ and 1."""
    upper = f1 < 0
    start = tl.where(upper, 0.5, 0.0)
    left, right = tl.where(upper, f1, f0), tl.where(upper, f2, f1)
    slope_left, slope_right = tl.where(upper, d1, d0), tl.where(upper, d2, d1)
    secant = (right - left) * 2.0
    r2, r3 = (3 * secant - 2 * slope_left - slope_right) * 2.0, (slope_left + slope_right - 2 * secant) * 4.0
    low, high = 0.0 * left, 0.5 + 0.0 * left
    for _ in range(22):
        tau = (low + high) / 2
        rising = left + tau * (slope_left + tau * (r2 + tau * r3)) < 0
        low, high = tl.where(rising, tau, low), tl.where(rising, high, tau)
    return start + (low + high) / 2


# The steps.


@triton.jit
def _step(
    theta, teacher, theta_stride, teacher_stride, endings, V, chunk, chunks, part, state, arrived, alone,
    FOLDED: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # what was read last is still in the cache
    row, piece = (program // chunks).to(tl.int64), program % chunks
    state += row * _STATE
    passes = tl.where(tl.load(state + _DONE) == 0, 1, 0)
    theta += row * theta_stride
    teacher += row * teacher_stride
    part += row * chunks * _SUMS
    first, last, parts = piece * chunk, tl.minimum(piece * chunk + chunk, V), chunks
    while passes > 0:
        _power_sums(theta, teacher, endings, first, last, V, state, part + piece * _SUMS, FOLDED, OUTER, INNER)
        if _is_last(arrived + row, chunks):
            done = _advance(part, parts, state)
            # Alone, a program reads its whole row in every pass.
            passes = tl.where(done | (alone == 0) | (passes == _PASSES), 0, passes + 1)
            first, last, parts, piece = 0, V, chunks * 0 + 1, piece * 0
            tl.debug_barrier()
        else:
            passes = 0


@triton.jit
def _power_sums(
    theta, teacher, endings, first, last, V, state, part,
    FOLDED: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """S_0 to S_3 of some logits of a row at α; or at two powers p and q, with the difference of their S_0."""
    folded = _folded(teacher, endings, V, FOLDED)
    method, alpha = tl.load(state + _METHOD), tl.load(state + _ALPHA).to(tl.float32)
    p = tl.where(method == _ESS_BALANCE, -alpha, 0.0)
    q = tl.where(method == _ESS_BALANCE, 2 - alpha, alpha)
    top_theta = tl.load(state + _TOP_THETA).to(tl.float32)
    apart = tl.load(state + _APART).to(tl.float32)
    bits = (tl.load(state + _INVERSE) * _LOG2_E).to(tl.float32)
    top_p, top_q = 0.0, 0.0
    if tl.load(state + _FAR) != 0:  # the exponents may be above 0, or all far below
        tops_p, tops_q = tl.full((OUTER,), _NOWHERE, tl.float32), tl.full((OUTER,), _NOWHERE, tl.float32)
        for start in range(first, last, OUTER * INNER):
            s, t, _ = _tile(theta, teacher, endings, folded, start, V, FOLDED, OUTER, INNER)
            both = tl.minimum(s, t) != _NOWHERE
            u, x = (s - top_theta) * bits, (t - s - apart) * bits
            tops_p = tl.maximum(tops_p, tl.max(tl.where(both, u + p * x, _NOWHERE), 1))
            tops_q = tl.maximum(tops_q, tl.max(tl.where(both, u + q * x, _NOWHERE), 1))
        top_p, top_q = tl.max(tops_p), tl.max(tops_q)
        if tl.abs(top_p - top_q) < _BITS_APART:
            top_p = tl.maximum(top_p, top_q)
            top_q = top_p
    tl.store(part + _TOP_1, top_p)
    tl.store(part + _TOP_2, top_q)
    # Of a chunk without a common token the sums are 0, whatever they are relative to.
    top_p, top_q = tl.where(top_p == _NOWHERE, 0.0, top_p), tl.where(top_q == _NOWHERE, 0.0, top_q)
    a0 = tl.zeros((OUTER,), tl.float32)
    a1, a2, a3, b0, b1, b2, b3, difference = a0, a0, a0, a0, a0, a0, a0, a0
    for start in range(first, last, OUTER * INNER):
        s, t, _ = _tile(theta, teacher, endings, folded, start, V, FOLDED, OUTER, INNER)
        both = tl.minimum(s, t) != _NOWHERE
        u = tl.where(both, (s - top_theta) * bits, _NOWHERE)
        x = tl.where(both, (t - s - apart) * bits, 0.0)
        b = tl.exp2(u + q * x - top_q)
        b0 += tl.sum(b, 1)
        bx = b * x
        b1 += tl.sum(bx, 1)
        bxx = bx * x
        b2 += tl.sum(bxx, 1)
        b3 += tl.sum(bxx * x, 1)
        if method != _KL_SYMMETRY:
            a = tl.exp2(u + p * x - top_p)
            difference += tl.sum(_growth(a, b, (q - p) * x), 1)
            a0 += tl.sum(a, 1)
            ax = a * x
            a1 += tl.sum(ax, 1)
            axx = ax * x
            a2 += tl.sum(axx, 1)
            a3 += tl.sum(axx * x, 1)
    _store_sums(part, a0, a1, a2, a3, b0, b1, b2, b3, difference, a0, a0, a0, a0, _TOP_1)


@triton.jit
def _moments(part, slot, tops, chunks):
    """log S_0, mean, variance and third central moment of x, and a bound of the fourth cumulant's size from those
    below it: of two masses it is third²/variance. `tops`: what each chunk's sums are relative to, in bits."""
    top = tl.max(tops)
    factor = tl.exp((tops - top) * _LN_2)
    s0 = tl.sum(_take(part, slot, chunks, 0.0) * factor)
    mean = tl.sum(_take(part, slot + 1, chunks, 0.0) * factor) / s0 * _LN_2
    square = tl.sum(_take(part, slot + 2, chunks, 0.0) * factor) / s0 * (_LN_2 * _LN_2)
    cube = tl.sum(_take(part, slot + 3, chunks, 0.0) * factor) / s0 * (_LN_2 * _LN_2 * _LN_2)
    variance, third = square - mean * mean, cube - 3 * mean * square + 2 * mean * mean * mean
    variance = tl.where(variance > 1e-5 * mean * mean, variance, float("nan"))  # the rounding of float32
    fourth = third * third / variance + 3 * variance * variance
    return tl.log(s0) + top * _LN_2, mean, variance, third, fourth


@triton.jit
def _difference(part, tops_1, tops_2, base, chunks):
    """S_0 at the second power less S_0 at the first, relative to 2^base."""
    scale_1, scale_2 = tl.exp((tops_1 - base) * _LN_2), tl.exp((tops_2 - base) * _LN_2)
    apart = _take(part, _POWER_2, chunks, 0.0) * scale_2 - _take(part, _POWER_1, chunks, 0.0) * scale_1
    return tl.sum(tl.where(tops_1 == tops_2, _take(part, _STEP_DIFFERENCE, chunks, 0.0) * scale_1, apart))


@triton.jit
def _advance(part, parts, state):
    """A step of a row from its sums, and whether it may stand."""
    alpha, method = tl.load(state + _ALPHA), tl.load(state + _METHOD)
    low, high, c = tl.load(state + _LOW), tl.load(state + _HIGH), tl.load(state + _C)
    tops_1, tops_2 = _take(part, _TOP_1, parts, _NOWHERE), _take(part, _TOP_2, parts, _NOWHERE)
    log_s0, mean, variance, third, fourth = _moments(part, _POWER_2, tops_2, parts)
    value, slope, bend, next_order = mean - c, variance, third, fourth
    if method != _KL_SYMMETRY:
        if method == _TRUST_REGION:
            whole = tl.load(state + _WHOLE)
            difference = _difference(part, tops_1, tops_2, 0.0, parts) - tl.load(state + _REST)
            divergence = alpha * mean - _log_ratio(difference, whole, log_s0, tl.log(whole))
            value = divergence - tl.load(state + _EPSILON)
            slope, bend = alpha * variance, variance + alpha * third
            next_order = 2 * tl.abs(third) + alpha * fourth
        else:
            log_other, other_mean, other_variance, _, other_fourth = _moments(part, _POWER_1, tops_1, parts)
            top = tl.max(tops_1)
            difference, other = _difference(part, tops_1, tops_2, top, parts), tl.exp(log_other - top * _LN_2)
            value = 2 * c - _log_ratio(difference, other, log_s0, log_other)
            slope, bend, next_order = mean - other_mean, other_variance - variance, fourth + other_fourth
            variance = tl.maximum(variance, other_variance)
    least = tl.where(value < 0, alpha, tl.load(state + _LEAST))
    most = tl.where(value > 0, alpha, tl.load(state + _MOST))
    # The root of value + slope·δ + bend·δ²/2 that is nearer to 0, in the form that does not cancel.
    steepness = slope * slope - 2 * value * bend
    there = tl.sqrt(tl.maximum(steepness, 0.0))  # the slope at that root; Newton's step where there is none
    delta = -2 * value / (slope + tl.where(steepness > 0, there, slope))
    target, untried = alpha + delta, tl.load(state + _UNTRIED)
    end = (untried != 0) & (((least == low) & (target <= low)) | ((most == high) & (target >= high)))
    accept = end | ((target > least) & (target < most) & (tl.abs(delta) <= tl.load(state + _LAST) / 2))
    target = tl.minimum(tl.maximum(target, low), high)
    error = tl.abs(delta * delta * delta) * next_order / (6 * tl.minimum(slope, there))
    certain = (error < tl.maximum(_ALPHA_ERROR, tl.abs(alpha + delta - target) / 4)) | (
        tl.abs(delta) * tl.sqrt(tl.maximum(variance, 0.0)) < _VARIATION_ERROR
    )
    outside = (value == 0) | ((alpha == low) & (value > 0)) | ((alpha == high) & (value < 0))
    done = (accept & certain) | outside | (most - least < _ALPHA_ERROR)
    target = tl.where(outside, alpha, tl.where(accept, target, (least + most) / 2))
    tl.debug_barrier()  # slower warps still read what is replaced here
    tl.store(state + _ALPHA, target)
    tl.store(state + _DONE, tl.where(done, 1.0, 0.0).to(tl.float64))
    tl.store(state + _LEAST, least)
    tl.store(state + _MOST, most)
    tl.store(state + _LAST, tl.abs(target - alpha))
    tl.store(state + _UNTRIED, tl.where(end, 0.0, untried))
    return done


# The last launch.


@triton.jit
def _write(
    theta, teacher, theta_stride, teacher_stride, endings, V, chunk, chunks, state, alphas, out, V_teacher, whole,
    STOP: tl.constexpr, FOLDED: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    row, piece = (tl.program_id(0) // whole).to(tl.int64), tl.program_id(0) % whole
    theta += row * theta_stride
    teacher += row * teacher_stride
    out += row * V_teacher
    alpha = tl.load(state + row * _STATE + _ALPHA).to(tl.float32)
    masked = tl.load(state + row * _STATE + _MASKED)
    folded = _folded(teacher, endings, V, FOLDED)
    for start in range(piece * chunk, tl.minimum(piece * chunk + chunk, V_teacher), OUTER * INNER):
        s, t, index = _tile(theta, teacher, endings, folded, start, V, FOLDED, OUTER, INNER)
        mixed = (1 - alpha) * s + alpha * t
        mixed = tl.where(alpha == 0, s, tl.where(alpha == 1, t, mixed))  # 0·(-inf) is NaN
        if masked != 0:
            mixed = tl.where(t == _NOWHERE, _NOWHERE, mixed)
        if alpha != alpha:
            mixed = tl.where(index < V, 0.0, _NOWHERE)
            if STOP:
                mixed = tl.where(index == tl.load(endings), _CERTAIN, mixed)
        tl.store(out + index, mixed, mask=index < V_teacher)
    if piece == 0:
        tl.store(alphas + row, alpha)
