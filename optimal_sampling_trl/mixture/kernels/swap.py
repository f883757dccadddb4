"""The method `top_k_swap`, q = θ·1[S] + α·t: what its rows need in the first launch and in the last one.

S are the teacher's K likeliest tokens. Their least logit, the bound, is found before the launches, and only where a
row asks for it. α = 1 - θ(S) is summed over the tokens outside of S, so that a little of it is as exact as much.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .average import log_sum_to_logits
from .layout import NOWHERE


@triton.jit
def is_likely(t, bound):
    """Return where the teacher's raw logits are in S: with ties, and without tokens that the teacher rules out."""
    return (t >= bound) & (t != NOWHERE)


@triton.jit
def swap(s, t, alpha, bound, theta_sum, teacher_sum, inverse):
    """Return the raw logits of q as `average` does; `bound` is the least of the teacher's in S."""
    kept = tl.where(is_likely(t, bound), s * inverse - theta_sum, NOWHERE)
    drawn = tl.log(alpha.to(tl.float64)).to(tl.float32) + (t * inverse - teacher_sum)
    return log_sum_to_logits(kept, drawn, alpha, theta_sum, teacher_sum, inverse)
