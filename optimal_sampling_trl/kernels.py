"""The mixture of a decoding step in Triton: α of each row and the logits to sample from, without waiting for the host.

With s and t the raw logits of student and teacher at the sampling temperature, each less its row's largest, every sum
that the equations at the head of `mixture` need is one of S_k(p) = Σ x^k e^((1-p)s + pt) over the tokens that both
models have, where x = t - s. K = log S_0 has the slope S_1/S_0 = E_p[x] and the curvature Var_p[x]; the ratio of the
two rows' own sums gives c, with ℓ = x - c. For 0 ≤ p ≤ 1 no exponent is above 0: nothing overflows.

Three launches, each with a program for each chunk of each row, so that one row alone still fills a chip:

1. `_begin` sums at nodes p = 0, ¼, ½, ¾, 1 (for `ess_balance` from -1 to 2), which are products of two exponentials.
   The last program of a row joins the chunks' sums, and solves the equation on the cubic through the nodes next to
   the root. A row whose α is known, or follows from these sums, is done.
2. `_newton` takes the moments at that start and makes one step of third order. Where float32 would spoil the
   difference that is solved for, as between nearly equal rows, the chunk is summed in float64. The last program of a
   row judges the step by its next order; where that is too large it solves the row by itself, in float64, with
   Newton's method in a bracket as `solver` does.
3. `_write` blends the logits.

Programs run from the last chunk to the first in the second launch, and back in the third: what was read last is still
in the cache.
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

from .solver import METHODS, SAME_DIVERGENCE, SOLVER_STEPS, SOLVER_TOLERANCE

CHUNK = 4096
"""Logits of a row that one program reads, 16 of each model a thread."""
REGISTERS = 80
"""Of a thread, so that three programs fit on a multiprocessor. What the last program of a row does alone would take
all 255, and its rare spills cost less than a chip that waits for its memory."""
PIECE = 1024
"""Logits that a program holds at a time in float64; more would take the registers from the float32 path."""
_CERTAIN = tl.constexpr(1e4)
"""The logit by which a row without a solution ends its sequence: a number that stays finite at any temperature."""

_KL_SYMMETRY = tl.constexpr(METHODS.index("kl_symmetry"))
_ESS_BALANCE = tl.constexpr(METHODS.index("ess_balance"))
_TRUST_REGION = tl.constexpr(METHODS.index("trust_region"))
_ENTROPY = tl.constexpr(METHODS.index("entropy"))
_FIXED = tl.constexpr(METHODS.index("fixed"))
_SAME = tl.constexpr(SAME_DIVERGENCE)
_STEPS = tl.constexpr(SOLVER_STEPS)
_TOLERANCE = tl.constexpr(SOLVER_TOLERANCE)
_NOWHERE = tl.constexpr(float("-inf"))
_NAN = tl.constexpr(float("nan"))

# What is known of a row between launches, float64.
_ALPHA, _STATUS, _TOP_THETA, _TOP_TEACHER, _METHOD, _LOW, _HIGH, _EPSILON, _INVERSE, _MASKED, _BOUND = (
    tl.constexpr(slot) for slot in range(11)
)
_STATE = tl.constexpr(16)
_SOLVED, _FAST, _PRECISE = (tl.constexpr(status) for status in range(3))

# What a chunk hands on in the first launch, float32. The sums S_0 and S_1 of node j, p = j/4 - 1, are at +j.
_MAX_THETA, _MAX_TEACHER, _COMMON, _SPREAD, _WHOLE_THETA, _WHOLE_TEACHER = (tl.constexpr(slot) for slot in range(6))
_ENTROPY_THETA, _ENTROPY_TEACHER, _MAX_BELOW, _MAX_ABOVE = (tl.constexpr(slot) for slot in (6, 9, 12, 13))
_NODES_0, _NODES_1, _FIRST = (tl.constexpr(slot) for slot in (16, 32, 48))

# And in the second, float64: sums over the whole rows, then S_0 to S_3 at one power and, for ess_balance, at another.
_W, _W_DIFFERENCE, _S_DIFFERENCE, _POWER_1, _POWER_2, _SAME_SUMS = (tl.constexpr(slot) for slot in (0, 1, 2, 3, 7, 11))
_SECOND = tl.constexpr(16)


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
        chunk: logits that one program reads, a power of 2; for tests.

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
    chunk = min(chunk, max(16, triton.next_power_of_2(V)))
    chunks = triton.cdiv(V, chunk)
    first = torch.empty(N, _FIRST.value, chunks, dtype=torch.float32, device=device)
    second = torch.empty(N, _SECOND.value, chunks, dtype=torch.float64, device=device)
    state = torch.empty(N, _STATE.value, dtype=torch.float64, device=device)
    arrived = torch.zeros(2, padded, dtype=torch.int32, device=device)
    endings = _endings(int(stop[0]), tuple(folded), device) if stop else None
    logits = (theta, teacher, theta.stride(0), teacher.stride(0), endings, V, chunks)
    shapes = {"FOLDED": len(folded) if stop else 0, "CHUNK": chunk, "PIECE": min(chunk, PIECE)}
    warps = max(1, min(8, chunk // 512))
    columns = (method, alpha_min, alpha_max, fixed_alpha, epsilon, temperature, masked)
    strides = [0 if column is None else column.stride(0) for column in columns]
    lanes = triton.next_power_of_2(chunks)
    _begin[(N * chunks,)](
        *logits, *columns, *strides, first, state, arrived[0], mixed.theta_sum, mixed.teacher_sum, **shapes,
        LANES=lanes, num_warps=warps, maxnreg=REGISTERS,
    )  # fmt: skip
    _newton[(N * chunks,)](
        *logits, second, state, arrived[1], **shapes, LANES=lanes, num_warps=warps, maxnreg=REGISTERS
    )
    whole = triton.cdiv(V_teacher, chunk)
    _write[(N * whole,)](
        *logits, state, mixed.alpha, mixed.logits, V_teacher, whole, STOP=bool(stop), FOLDED=shapes["FOLDED"],
        CHUNK=chunk, num_warps=warps,
    )  # fmt: skip
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


# What each launch does, from here: raw logits in, one function for one thing.


@triton.jit
def _log1p(x):
    """log(1 + x) of float64, exact for small x (Kahan's form: the rounding of 1 + x cancels)."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * x / tl.where(y == 1.0, 1.0, y - 1.0))


@triton.jit
def _is_last(counter, programs):
    """Whether all other programs of the row have come here before; it then sees what they have stored."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1


@triton.jit
def _fold(t, index, teacher, endings, V, FOLDED: tl.constexpr):
    """The teacher's endings count for the student's: the mass of `FOLDED` ids moves to the first of `endings`."""
    stop = tl.load(endings)
    top = tl.load(teacher + stop, mask=stop < V, other=_NOWHERE).to(tl.float32)
    for i in tl.static_range(FOLDED):
        ending = tl.load(endings + 1 + i)
        top = tl.maximum(top, tl.load(teacher + ending, mask=ending < V, other=_NOWHERE).to(tl.float32))
    safe = tl.where(top == _NOWHERE, 0.0, top)
    total = tl.exp(tl.load(teacher + stop, mask=stop < V, other=_NOWHERE).to(tl.float32) - safe)
    for i in tl.static_range(FOLDED):
        ending = tl.load(endings + 1 + i)
        total += tl.exp(tl.load(teacher + ending, mask=ending < V, other=_NOWHERE).to(tl.float32) - safe)
        t = tl.where(index == ending, _NOWHERE, t)
    return tl.where(index == stop, safe + tl.log(total), t)


@triton.jit
def _tile(theta, teacher, endings, index, V, FOLDED: tl.constexpr):
    """Raw logits of one row at `index`, float32; -inf beyond V."""
    s = tl.load(theta + index, mask=index < V, other=_NOWHERE).to(tl.float32)
    t = tl.load(teacher + index, mask=index < V, other=_NOWHERE).to(tl.float32)
    if FOLDED > 0:
        t = _fold(t, index, teacher, endings, V, FOLDED)
    return s, t


@triton.jit
def _node(part, chunks, j: tl.constexpr, weights, x):
    tl.store(part + (_NODES_0 + j) * chunks, tl.sum(weights))
    tl.store(part + (_NODES_1 + j) * chunks, tl.sum(weights * x))


@triton.jit
def _outer_nodes(part, chunks, u, v, x, both, BELOW: tl.constexpr):
    """The nodes of ess_balance below 0 (or, with the models exchanged, above 1), relative to the largest exponent at
    p = -1: products of e^(u/4) and e^(y/4) with y = 2u - v, again none above 1."""
    y = tl.where(both, 2 * u - v, _NOWHERE)
    top = tl.max(y)
    tl.store(part + (_MAX_BELOW if BELOW else _MAX_ABOVE) * chunks, top)
    base = tl.where(both, tl.exp2(u * 0.36067376022224085), 0.0)
    step = tl.exp2((y - tl.where(top == _NOWHERE, 0.0, top)) * 0.36067376022224085)
    base2, step2 = base * base, step * step
    _node(part, chunks, 3 if BELOW else 9, base2 * base * step, x)
    _node(part, chunks, 2 if BELOW else 10, base2 * step2, x)
    _node(part, chunks, 1 if BELOW else 11, base * step2 * step, x)
    _node(part, chunks, 0 if BELOW else 12, step2 * step2, x)


@triton.jit
def _entropy_sums(part, chunks, u, weights):
    """Σ e^u u, and Σ e^u with the largest terms counted apart: of a sure row log Σ is the logarithm of 1 + little."""
    tl.store(part, tl.sum(tl.where(u > _NOWHERE, weights * u, 0.0)))
    tl.store(part + chunks, tl.sum(tl.where(u == 0.0, 1.0, 0.0)))
    tl.store(part + 2 * chunks, tl.sum(tl.where(u == 0.0, 0.0, weights)))


@triton.jit
def _first_sums(part, chunks, s, t, inverse, method, known):
    """The sums of one chunk, relative to its own largest logits."""
    top_theta, top_teacher = tl.max(s), tl.max(t)
    u = (s - tl.where(top_theta == _NOWHERE, 0.0, top_theta)) * inverse
    v = (t - tl.where(top_teacher == _NOWHERE, 0.0, top_teacher)) * inverse
    both = (s > _NOWHERE) & (t > _NOWHERE)
    root_theta, root_teacher = tl.exp2(u * 0.36067376022224085), tl.exp2(v * 0.36067376022224085)  # e^(u/4), e^(v/4)
    theta_2, teacher_2 = root_theta * root_theta, root_teacher * root_teacher
    theta_4, teacher_4 = theta_2 * theta_2, teacher_2 * teacher_2
    tl.store(part + _MAX_THETA * chunks, top_theta)
    tl.store(part + _MAX_TEACHER * chunks, top_teacher)
    tl.store(part + _COMMON * chunks, tl.max(tl.where(both, 1.0, 0.0)))
    tl.store(part + _WHOLE_THETA * chunks, tl.sum(theta_4))
    tl.store(part + _WHOLE_TEACHER * chunks, tl.sum(teacher_4))
    if (known == 0) & (method == _ENTROPY):
        _entropy_sums(part + _ENTROPY_THETA * chunks, chunks, u, theta_4)
        _entropy_sums(part + _ENTROPY_TEACHER * chunks, chunks, v, teacher_4)
    if (known == 0) & (method < _ENTROPY):
        x = tl.where(both, v - u, 0.0)
        _node(part, chunks, 4, tl.where(both, theta_4, 0.0), x)
        _node(part, chunks, 5, theta_2 * root_theta * root_teacher, x)
        _node(part, chunks, 6, theta_2 * teacher_2, x)
        _node(part, chunks, 7, root_theta * teacher_2 * root_teacher, x)
        _node(part, chunks, 8, tl.where(both, teacher_4, 0.0), x)
        tl.store(part + _SPREAD * chunks, tl.sum(theta_2 * teacher_2 * tl.abs(x)))
        if method == _ESS_BALANCE:
            _outer_nodes(part, chunks, u, v, x, both, True)
            _outer_nodes(part, chunks, v, u, x, both, False)


@triton.jit
def _take(part, slot, chunks, LANES: tl.constexpr, other: tl.constexpr):
    """One number of each chunk, as float64. Past the first-level cache, which other programs' stores do not reach."""
    lane = tl.arange(0, LANES)
    return tl.load(part + slot * chunks + lane, mask=lane < chunks, other=other, cache_modifier=".cg").to(tl.float64)


@triton.jit
def _join(part, j, scale, shift, chunks, LANES: tl.constexpr):
    """K and E_p[x] at a node. `scale`: the logarithm of what each chunk is relative to; `shift`: likewise of its x."""
    zero, one = _take(part, _NODES_0 + j, chunks, LANES, 0.0), _take(part, _NODES_1 + j, chunks, LANES, 0.0)
    top = tl.max(tl.where(zero > 0, scale, _NOWHERE))
    factor = tl.where(zero > 0, tl.exp(scale - top), 0.0)
    total = tl.sum(zero * factor)
    return top + tl.log(total), tl.sum((one + shift * zero) * factor) / total


@triton.jit
def _entropy_of(part, slot, down, chunks, LANES: tl.constexpr):
    """H of one model's row in nats. `down`: each chunk's largest exponent less the row's."""
    count, rest = _take(part, slot + 1, chunks, LANES, 0.0), _take(part, slot + 2, chunks, LANES, 0.0)
    scale = tl.exp(down)
    number = tl.sum(tl.where(down == 0, count, 0.0))
    others = tl.sum(tl.where(down == 0, rest, (count + rest) * scale))
    mean = tl.sum((_take(part, slot, chunks, LANES, 0.0) + down * (count + rest)) * scale) / (number + others)
    return tl.log(number) + _log1p(others / number) - mean


@triton.jit
def _pick(i, v0, v1, v2, v3):
    return tl.where(i == 0, v0, tl.where(i == 1, v1, tl.where(i == 2, v2, v3)))


@triton.jit
def _root_on_cubic(i, f0, f1, f2, f3, f4, d0, d1, d2, d3, d4, c, whole, epsilon, method):
    """The root between the nodes i/4 and (i+1)/4 on the cubic with the values f and slopes d of the nodes.

    The cubic stands for K, of which kl_symmetry and trust_region have their equation, or for ess_balance's own.
    """
    left, right = _pick(i, f0, f1, f2, f3), _pick(i, f1, f2, f3, f4)
    slope_left, slope_right = _pick(i, d0, d1, d2, d3), _pick(i, d1, d2, d3, d4)
    secant = (right - left) * 4.0
    k1, k2, k3 = (
        slope_left,
        (3 * secant - 2 * slope_left - slope_right) * 4.0,
        (slope_left + slope_right - 2 * secant) * 16.0,
    )
    start = i * 0.25
    # The equation as a cubic of the way τ from the left node.
    r0, r1, r2, r3 = left, k1, k2, k3
    if method == _KL_SYMMETRY:  # K' - c
        r0, r1, r2, r3 = k1 - c, 2 * k2, 3 * k3, 0.0 * k3
    if method == _TRUST_REGION:  # pK' - K + log Σθ - ε
        r0, r1, r2, r3 = start * k1 - left + whole - epsilon, 2 * k2 * start, k2 + 3 * k3 * start, 2 * k3
    low, high = 0.0 * k1, 0.25 + 0.0 * k1
    for _ in range(16):
        tau = (low + high) / 2
        rising = r0 + tau * (r1 + tau * (r2 + tau * r3)) < 0
        low, high = tl.where(rising, tau, low), tl.where(rising, high, tau)
    return start + (low + high) / 2


@triton.jit
def _first_guess(part, down, up, chunks, c, whole, epsilon, method, LANES: tl.constexpr):
    """α where the cubic through the nodes next to the root has its own; NaN where the sums say nothing.

    Returns with it Jeffreys' divergence, and E|x| and Var[x] near the root, which say what float32 is good for.
    `down`, `up`: each chunk's largest exponent of student and teacher less the row's; `up` is the teacher's.
    """
    shift = up - down
    k0, m0 = _join(part, 4, down, shift, chunks, LANES)
    k1, m1 = _join(part, 5, 0.75 * down + 0.25 * up, shift, chunks, LANES)
    k2, m2 = _join(part, 6, 0.5 * down + 0.5 * up, shift, chunks, LANES)
    k3, m3 = _join(part, 7, 0.25 * down + 0.75 * up, shift, chunks, LANES)
    k4, m4 = _join(part, 8, up, shift, chunks, LANES)
    middle = _take(part, _NODES_0 + 6, chunks, LANES, 0.0)
    factor = tl.exp(0.5 * down + 0.5 * up)
    spread = tl.sum((_take(part, _SPREAD, chunks, LANES, 0.0) + tl.abs(shift) * middle) * factor) / tl.sum(
        middle * factor
    )
    bound_below, bound_above = 0.0 * k0, 0.0 * k0
    r1, r2, r3 = m1 - c, m2 - c, m3 - c  # the equation at the inner nodes
    f0, f1, f2, f3, f4, d0, d1, d2, d3, d4 = k0, k1, k2, k3, k4, m0, m1, m2, m3, m4
    if method == _TRUST_REGION:
        r1 = 0.25 * m1 - k1 + whole - epsilon
        r2 = 0.5 * m2 - k2 + whole - epsilon
        r3 = 0.75 * m3 - k3 + whole - epsilon
    if method == _ESS_BALANCE:
        below = _take(part, _MAX_BELOW, chunks, LANES, _NOWHERE)
        above = _take(part, _MAX_ABOVE, chunks, LANES, _NOWHERE)
        bound_below, bound_above = tl.max(below + 2 * down - up), tl.max(above + 2 * up - down)
        a1, b1 = _join(part, 3, 1.25 * down - 0.25 * up + 0.25 * below, shift, chunks, LANES)
        a2, b2 = _join(part, 2, 1.5 * down - 0.5 * up + 0.5 * below, shift, chunks, LANES)
        a3, b3 = _join(part, 1, 1.75 * down - 0.75 * up + 0.75 * below, shift, chunks, LANES)
        a4, b4 = _join(part, 0, 2 * down - up + below, shift, chunks, LANES)
        e1, g1 = _join(part, 11, 1.75 * up - 0.75 * down + 0.75 * above, shift, chunks, LANES)
        e2, g2 = _join(part, 10, 1.5 * up - 0.5 * down + 0.5 * above, shift, chunks, LANES)
        e3, g3 = _join(part, 9, 1.25 * up - 0.25 * down + 0.25 * above, shift, chunks, LANES)
        e0, g0 = _join(part, 12, 2 * up - down + above, shift, chunks, LANES)
        f0, f1, f2, f3, f4 = k0 - e0 + 2 * c, a1 - e1 + 2 * c, a2 - e2 + 2 * c, a3 - e3 + 2 * c, a4 - k4 + 2 * c
        d0, d1, d2, d3, d4 = g0 - m0, g1 - b1, g2 - b2, g3 - b3, m4 - b4
        r1, r2, r3 = f1, f2, f3
    i = tl.where(r1 < 0, 1, 0) + tl.where((r1 < 0) & (r2 < 0), 1, 0) + tl.where((r1 < 0) & (r2 < 0) & (r3 < 0), 1, 0)
    guess = _root_on_cubic(i, f0, f1, f2, f3, f4, d0, d1, d2, d3, d4, c, whole, epsilon, method)
    sound = (r1 == r1) & (r2 == r2) & (r3 == r3) & (guess == guess)
    variance = 4 * _pick(i, m1 - m0, m2 - m1, m3 - m2, m4 - m3)
    return tl.where(sound, guess, _NAN), m4 - m0, spread, variance, bound_below, bound_above


@triton.jit
def _begin(
    theta, teacher, theta_stride, teacher_stride, endings, V, chunks, method, alpha_min, alpha_max, fixed_alpha,
    epsilon, temperature, masked, method_stride, min_stride, max_stride, fixed_stride, epsilon_stride,
    temperature_stride, masked_stride, part, state, arrived, theta_sum, teacher_sum,
    FOLDED: tl.constexpr, CHUNK: tl.constexpr, PIECE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    chosen = tl.load(method + row * method_stride).to(tl.int32)
    low = tl.load(alpha_min + row * min_stride).to(tl.float64)
    high = tl.load(alpha_max + row * max_stride).to(tl.float64)
    fixed = tl.load(fixed_alpha + row * fixed_stride).to(tl.float64)
    budget = tl.load(epsilon + row * epsilon_stride).to(tl.float64)
    inverse = tl.full((), 1.0, tl.float64)
    if temperature is not None:
        inverse = 1.0 / tl.load(temperature + row * temperature_stride).to(tl.float64)
    known = tl.where((low == high) | (chosen == _FIXED), 1, 0)
    part += row * _FIRST * chunks
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    s, t = _tile(theta + row * theta_stride, teacher + row * teacher_stride, endings, index, V, FOLDED)
    _first_sums(part + chunk, chunks, s, t, inverse.to(tl.float32), chosen, known)
    if _is_last(arrived + row, chunks):
        state += row * _STATE
        mask = 0.0
        if masked is not None:
            mask = tl.where(tl.load(masked + row * masked_stride) != 0, 1.0, 0.0)
        tl.store(state + _METHOD, chosen.to(tl.float64))
        tl.store(state + _LOW, low)
        tl.store(state + _HIGH, high)
        tl.store(state + _EPSILON, budget)
        tl.store(state + _INVERSE, inverse)
        tl.store(state + _MASKED, mask)
        _start(part, state, theta_sum + row, teacher_sum + row, chunks, chosen, low, high, fixed, budget, inverse,
               known, LANES)  # fmt: skip


@triton.jit
def _start(
    part, state, theta_sum, teacher_sum, chunks, method, low, high, fixed, epsilon, inverse, known, LANES: tl.constexpr
):
    """Join the chunks of a row: its normalisers, and α, or a first guess of it and how to go on."""
    max_theta = _take(part, _MAX_THETA, chunks, LANES, _NOWHERE)
    max_teacher = _take(part, _MAX_TEACHER, chunks, LANES, _NOWHERE)
    top_theta, top_teacher = tl.max(max_theta), tl.max(max_teacher)
    # A chunk without a finite logit has no sums: any finite number will do.
    down = tl.where(max_theta == _NOWHERE, -1e30, (max_theta - top_theta) * inverse)
    up = tl.where(max_teacher == _NOWHERE, -1e30, (max_teacher - top_teacher) * inverse)
    whole_theta = tl.log(tl.sum(_take(part, _WHOLE_THETA, chunks, LANES, 0.0) * tl.exp(down)))
    whole_teacher = tl.log(tl.sum(_take(part, _WHOLE_TEACHER, chunks, LANES, 0.0) * tl.exp(up)))
    sum_theta, sum_teacher = whole_theta + top_theta * inverse, whole_teacher + top_teacher * inverse
    common = tl.max(_take(part, _COMMON, chunks, LANES, 0.0)) > 0
    alpha = tl.where(low == high, low, tl.minimum(tl.maximum(fixed, low), high))
    middle = (low + high) / 2
    status = 0.0 * low + _SOLVED
    if (known == 0) & (method == _ENTROPY):
        entropy_theta = _entropy_of(part, _ENTROPY_THETA, down, chunks, LANES)
        entropy_teacher = _entropy_of(part, _ENTROPY_TEACHER, up, chunks, LANES)
        both = entropy_theta + entropy_teacher
        share = tl.where(both > 0, entropy_theta / tl.where(both > 0, both, 1.0), middle)
        alpha = tl.minimum(tl.maximum(share, low), high)
    if (known == 0) & (method < _ENTROPY):
        guess, divergence, spread, variance, below, above = _first_guess(
            part, down, up, chunks, whole_teacher - whole_theta, whole_theta, epsilon, method, LANES
        )
        # These sums know the divergence to a millionth of E|x|; rows that it leaves open are summed in float64.
        same = (tl.abs(divergence) + 1e-6 * spread < _SAME / 2) & (method != _TRUST_REGION)
        alpha = tl.where(same | (guess != guess), middle, tl.minimum(tl.maximum(guess, low), high))
        # float32 moves the difference that is solved for by about a millionth of E|x|, and α by that over Var[x].
        status = (
            tl.where(same, _SOLVED, tl.where((spread < 6 * variance) & (divergence > 1e-6), _FAST, _PRECISE))
            + 0.0 * low
        )
        tl.store(state + _BOUND, below)
        tl.store(state + _BOUND + 1, above)
    finite = (tl.abs(sum_theta) < float("inf")) & (tl.abs(sum_teacher) < float("inf"))
    solvable = finite & (common | ((status == _SOLVED) & ((alpha == 0) | (alpha == 1))))
    if (known == 0) & (method < _ENTROPY):
        solvable = finite & common
    tl.store(state + _ALPHA, tl.where(solvable, alpha, _NAN))
    tl.store(state + _STATUS, tl.where(solvable, status, _SOLVED))
    tl.store(state + _TOP_THETA, top_theta)
    tl.store(state + _TOP_TEACHER, top_teacher)
    tl.store(theta_sum, sum_theta.to(tl.float32))
    tl.store(teacher_sum, sum_teacher.to(tl.float32))


@triton.jit
def _put(sums, slot, value):
    """`sums` with `value` added at `slot`."""
    return sums + tl.where(tl.arange(0, _SECOND) == slot, value.to(tl.float64), 0.0)


@triton.jit
def _powers(sums, slot: tl.constexpr, u, v, x, both, p, bound):
    """S_0 to S_3 at the power p, over e^bound, put from `slot` on; and the terms of S_0."""
    weights = tl.where(both, tl.exp((1 - p) * u + p * v - bound), 0.0)
    first = weights * x
    second = first * x
    sums = _put(_put(sums, slot, tl.sum(weights)), slot + 1, tl.sum(first))
    return _put(_put(sums, slot + 2, tl.sum(second)), slot + 3, tl.sum(second * x)), weights


@triton.jit
def _second_sums(s, t, top_theta, top_teacher, inverse, alpha, method, below, above, REAL: tl.constexpr):
    """What some logits of a row add to the sums of a step from `alpha`, computed in `REAL`."""
    both = (s > _NOWHERE) & (t > _NOWHERE)
    u = (s.to(REAL) - top_theta.to(REAL)) * inverse.to(REAL)
    v = (t.to(REAL) - top_teacher.to(REAL)) * inverse.to(REAL)
    x = tl.where(both, v - u, 0.0)
    weights_theta, weights_teacher = tl.exp(u), tl.exp(v)
    sums = tl.zeros((_SECOND,), tl.float64)
    sums = _put(sums, _W, tl.sum(weights_theta))
    sums = _put(sums, _W_DIFFERENCE, tl.sum(weights_teacher - weights_theta))
    p = alpha.to(REAL)
    if method == _ESS_BALANCE:
        bound = tl.maximum(alpha * below, (1 - alpha) * above).to(REAL)
        sums, at_theta = _powers(sums, _POWER_1, u, v, x, both, -p, bound)
        sums, at_teacher = _powers(sums, _POWER_2, u, v, x, both, 2 - p, bound)
        sums = _put(sums, _S_DIFFERENCE, tl.sum(at_theta - at_teacher))
    else:
        sums, at_alpha = _powers(sums, _POWER_1, u, v, x, both, p, p * 0)
        sums = _put(sums, _S_DIFFERENCE, tl.sum(at_alpha - weights_theta))
    if tl.float64 == REAL:
        common_theta, common_teacher = tl.where(both, weights_theta, 0.0), tl.where(both, weights_teacher, 0.0)
        sums = _put(sums, _SAME_SUMS, tl.sum(common_theta))
        sums = _put(sums, _SAME_SUMS + 1, tl.sum(common_theta * x))
        sums = _put(sums, _SAME_SUMS + 2, tl.sum(common_teacher))
        sums = _put(sums, _SAME_SUMS + 3, tl.sum(common_teacher * x))
    return sums


@triton.jit
def _newton(
    theta, teacher, theta_stride, teacher_stride, endings, V, chunks, part, state, arrived,
    FOLDED: tl.constexpr, CHUNK: tl.constexpr, PIECE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row, chunk = (program // chunks).to(tl.int64), program % chunks
    state += row * _STATE
    status = tl.load(state + _STATUS)
    if status != _SOLVED:
        theta += row * theta_stride
        teacher += row * teacher_stride
        alpha, method = tl.load(state + _ALPHA), tl.load(state + _METHOD).to(tl.int32)
        top_theta, top_teacher = tl.load(state + _TOP_THETA), tl.load(state + _TOP_TEACHER)
        inverse = tl.load(state + _INVERSE)
        below, above = tl.load(state + _BOUND), tl.load(state + _BOUND + 1)
        part += row * _SECOND * chunks
        sums = tl.zeros((_SECOND,), tl.float64)
        if status == _FAST:
            index = chunk * CHUNK + tl.arange(0, CHUNK)
            s, t = _tile(theta, teacher, endings, index, V, FOLDED)
            sums += _second_sums(s, t, top_theta, top_teacher, inverse, alpha, method, below, above, tl.float32)
        else:
            for piece in range(CHUNK // PIECE):
                index = chunk * CHUNK + piece * PIECE + tl.arange(0, PIECE)
                s, t = _tile(theta, teacher, endings, index, V, FOLDED)
                sums += _second_sums(s, t, top_theta, top_teacher, inverse, alpha, method, below, above, tl.float64)
        tl.store(part + tl.arange(0, _SECOND) * chunks + chunk, sums)
        if _is_last(arrived + row, chunks):
            _finish(theta, teacher, endings, V, part, state, chunks, method, alpha, status, top_theta, top_teacher,
                    inverse, FOLDED, PIECE, LANES)  # fmt: skip


@triton.jit
def _moments(part, slot, chunks, LANES: tl.constexpr):
    """S_0, and mean, variance and third central moment of x."""
    s0, s1 = tl.sum(_take(part, slot, chunks, LANES, 0.0)), tl.sum(_take(part, slot + 1, chunks, LANES, 0.0))
    s2, s3 = tl.sum(_take(part, slot + 2, chunks, LANES, 0.0)), tl.sum(_take(part, slot + 3, chunks, LANES, 0.0))
    mean, square, cube = s1 / s0, s2 / s0, s3 / s0
    return s0, mean, square - mean * mean, cube - 3 * mean * square + 2 * mean * mean * mean


@triton.jit
def _fourth(variance, third):
    """A bound of the fourth cumulant's size, from those below it: of two masses it is third²/variance."""
    return third * third / variance + 3 * variance * variance


@triton.jit
def _equation(part, chunks, method, alpha, epsilon, LANES: tl.constexpr):
    """The equation's value at `alpha`, its two derivatives, and the size of the third."""
    whole = tl.sum(_take(part, _W, chunks, LANES, 0.0))
    c = _log1p(tl.sum(_take(part, _W_DIFFERENCE, chunks, LANES, 0.0)) / whole)
    difference = tl.sum(_take(part, _S_DIFFERENCE, chunks, LANES, 0.0))
    _, mean, variance, third = _moments(part, _POWER_1, chunks, LANES)
    fourth = _fourth(variance, third)
    value, slope, bend, next_order = mean - c, variance, third, fourth
    if method == _TRUST_REGION:
        value = alpha * mean - _log1p(difference / whole) - epsilon
        slope, bend = alpha * variance, variance + alpha * third
        next_order = 2 * tl.abs(third) + alpha * fourth
    if method == _ESS_BALANCE:
        other_s0, other_mean, other_variance, other_third = _moments(part, _POWER_2, chunks, LANES)
        value = _log1p(difference / other_s0) + 2 * c
        slope, bend = other_mean - mean, variance - other_variance
        next_order = fourth + _fourth(other_variance, other_third)
    return value, slope, bend, next_order, c


@triton.jit
def _finish(
    theta, teacher, endings, V, part, state, chunks, method, alpha, status, top_theta, top_teacher, inverse,
    FOLDED: tl.constexpr, PIECE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The step of a row from its sums, and whether it may stand."""
    low, high, epsilon = tl.load(state + _LOW), tl.load(state + _HIGH), tl.load(state + _EPSILON)
    value, slope, bend, next_order, c = _equation(part, chunks, method, alpha, epsilon, LANES)
    # The root of value + slope·δ + bend·δ²/2 that is nearer to 0, in the form that does not cancel.
    delta = -2 * value / (slope + tl.sqrt(tl.maximum(slope * slope - 2 * value * bend, 0.0)))
    delta = tl.where(value == 0, 0.0, delta)
    solved = tl.minimum(tl.maximum(alpha + delta, low), high)
    # Between rows hundreds of nats apart value and slope may be rounding: they are differences of the size of c.
    rounding = tl.where(status == _FAST, 1e-7, 1e-15) * (tl.abs(c) + tl.abs(value))
    stands = (tl.abs(delta * delta * delta) * next_order < 6e-5 * slope) & (rounding < 1e-5 * slope)
    outside = ((alpha == low) & (value > rounding)) | ((alpha == high) & (value < -rounding))
    solved = tl.where(outside, alpha, solved)
    stands = stands | outside
    if (status == _PRECISE) & (method != _TRUST_REGION):
        theta_0, theta_1 = _total(part, 0, chunks, LANES), _total(part, 1, chunks, LANES)
        teacher_0, teacher_1 = _total(part, 2, chunks, LANES), _total(part, 3, chunks, LANES)
        same = teacher_1 / teacher_0 - theta_1 / theta_0 < _SAME
        solved = tl.where(same, (low + high) / 2, solved)
        stands = stands | same
    if stands == 0:
        solved = _solve(theta, teacher, endings, V, method, solved, low, high, epsilon, top_theta, top_teacher,
                        inverse, c, FOLDED, PIECE)  # fmt: skip
    tl.store(state + _ALPHA, solved)


@triton.jit
def _total(part, k: tl.constexpr, chunks, LANES: tl.constexpr):
    return tl.sum(_take(part, _SAME_SUMS + k, chunks, LANES, 0.0))


@triton.jit
def _exponents(theta, teacher, endings, index, V, top_theta, top_teacher, inverse, FOLDED: tl.constexpr):
    """u, v in float64, and where both are finite."""
    s, t = _tile(theta, teacher, endings, index, V, FOLDED)
    u = (s.to(tl.float64) - top_theta) * inverse
    v = (t.to(tl.float64) - top_teacher) * inverse
    return u, v, (s > _NOWHERE) & (t > _NOWHERE)


@triton.jit
def _family(theta, teacher, endings, V, p, top_theta, top_teacher, inverse, FOLDED: tl.constexpr, PIECE: tl.constexpr):
    """K, E_p[x] and Var_p[x] of a whole row, at any power, in float64."""
    top = tl.full((), _NOWHERE, tl.float64)
    for start in range(0, V, PIECE):
        index = start + tl.arange(0, PIECE)
        u, v, both = _exponents(theta, teacher, endings, index, V, top_theta, top_teacher, inverse, FOLDED)
        top = tl.maximum(top, tl.max(tl.where(both, (1 - p) * u + p * v, _NOWHERE)))
    s0, s1, s2 = 0.0 * p, 0.0 * p, 0.0 * p
    for start in range(0, V, PIECE):
        index = start + tl.arange(0, PIECE)
        u, v, both = _exponents(theta, teacher, endings, index, V, top_theta, top_teacher, inverse, FOLDED)
        weights = tl.where(both, tl.exp((1 - p) * u + p * v - top), 0.0)
        x = tl.where(both, v - u, 0.0)
        s0 += tl.sum(weights)
        s1 += tl.sum(weights * x)
        s2 += tl.sum(weights * x * x)
    return top + tl.log(s0), s1 / s0, tl.maximum(s2 / s0 - (s1 / s0) * (s1 / s0), 0.0)


@triton.jit
def _wholes(theta, teacher, endings, V, top_theta, top_teacher, inverse, FOLDED: tl.constexpr, PIECE: tl.constexpr):
    """log Σ e^u, and c, in float64."""
    whole, difference = 0.0 * inverse, 0.0 * inverse
    for start in range(0, V, PIECE):
        index = start + tl.arange(0, PIECE)
        u, v, _both = _exponents(theta, teacher, endings, index, V, top_theta, top_teacher, inverse, FOLDED)
        whole += tl.sum(tl.exp(u))
        difference += tl.sum(tl.exp(v) - tl.exp(u))
    return tl.log(whole), _log1p(difference / whole)


@triton.jit
def _solve(
    theta, teacher, endings, V, method, alpha, low, high, epsilon, top_theta, top_teacher, inverse, c,
    FOLDED: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """α of a row that one step does not settle: `solver._find_root`, by one program, in float64."""
    middle = (low + high) / 2
    whole, c = _wholes(theta, teacher, endings, V, top_theta, top_teacher, inverse, FOLDED, PIECE)
    same = 0
    if method != _TRUST_REGION:
        _, mean_theta, _ = _family(theta, teacher, endings, V, 0.0 * c, top_theta, top_teacher, inverse, FOLDED, PIECE)
        _, mean_teacher, _ = _family(
            theta, teacher, endings, V, 1.0 + 0.0 * c, top_theta, top_teacher, inverse, FOLDED, PIECE
        )
        same = tl.where(mean_teacher - mean_theta < _SAME, 1, 0)
    alpha = tl.where(alpha == alpha, alpha, middle)
    least, most, last = low, high, high - low
    untried, step = 1, 0
    while (step < _STEPS) & (last > _TOLERANCE) & (same == 0):
        power = tl.where(method == _ESS_BALANCE, -alpha, alpha)
        log_sum, mean, variance = _family(
            theta, teacher, endings, V, power, top_theta, top_teacher, inverse, FOLDED, PIECE
        )
        value, slope = mean - c, variance
        if method == _TRUST_REGION:
            value, slope = alpha * mean - log_sum + whole - epsilon, alpha * variance
        if method == _ESS_BALANCE:
            other_sum, other_mean, _ = _family(
                theta, teacher, endings, V, 2 - alpha, top_theta, top_teacher, inverse, FOLDED, PIECE
            )
            value, slope = log_sum - other_sum + 2 * c, other_mean - mean
        least, most = tl.where(value < 0, alpha, least), tl.where(value > 0, alpha, most)
        newton = tl.minimum(tl.maximum(alpha - value / slope, least), most)
        newton = tl.where(newton == newton, newton, (least + most) / 2)
        end = (untried == 1) & ((newton == low) | (newton == high))
        accept = end | (tl.abs(newton - alpha) <= tl.maximum(last / 2, _TOLERANCE))
        target = tl.where(value == 0, alpha, tl.where(accept, newton, (least + most) / 2))
        untried = tl.where(end, 0, untried)
        last = tl.abs(target - alpha)
        alpha = target
        step += 1
    return tl.where(same == 1, middle, alpha)


@triton.jit
def _write(
    theta, teacher, theta_stride, teacher_stride, endings, V, chunks, state, alphas, out, V_teacher, whole,
    STOP: tl.constexpr, FOLDED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, chunk = (tl.program_id(0) // whole).to(tl.int64), tl.program_id(0) % whole
    state += row * _STATE
    alpha = tl.load(state + _ALPHA).to(tl.float32)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    s, t = _tile(theta + row * theta_stride, teacher + row * teacher_stride, endings, index, V, FOLDED)
    if alpha != alpha:
        mixed = tl.where(index < V, 0.0, _NOWHERE)
        if STOP:
            mixed = tl.where(index == tl.load(endings), _CERTAIN, mixed)
    else:
        mixed = (1 - alpha) * s + alpha * t
        mixed = tl.where(alpha == 0, s, tl.where(alpha == 1, t, mixed))  # 0·(-inf) is NaN
        if tl.load(state + _MASKED) != 0:
            mixed = tl.where(t == _NOWHERE, _NOWHERE, mixed)
    tl.store(out + row * V_teacher + index, mixed, mask=index < V_teacher)
    if chunk == 0:
        tl.store(alphas + row, alpha)
