"""The slots in which the kernels keep numbers between launches, and the constants that they share.

A kernel imports each by its name (`from .layout import ROW_ALPHA`) and never reads `layout.ROW_ALPHA`. Triton would
follow the attribute, but the key of its cache on disk covers the globals that a kernel names and no module's
attributes: after a change of the layout, kernels compiled for the old slots would be loaded for it.
"""

from __future__ import annotations

import triton.language as tl

from ..settings import FORMS, METHODS, SAME_DIVERGENCE, SWAP

NOWHERE = tl.constexpr(float("-inf"))
"""The logit of a token without mass."""
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Stands for the logit of a token without mass where one beyond the vocabulary must be less."""
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SAME = tl.constexpr(SAME_DIVERGENCE)
LANES = tl.constexpr(32)
"""The most chunks that a row is cut into: one program joins their sums, a chunk a lane."""

KL_SYMMETRY = tl.constexpr(METHODS.index("kl_symmetry"))
ESS_BALANCE = tl.constexpr(METHODS.index("ess_balance"))
TRUST_REGION = tl.constexpr(METHODS.index("trust_region"))
ENTROPY = tl.constexpr(METHODS.index("entropy"))
"""The methods before this one are equations in α."""
ENTROPY_GATE = tl.constexpr(METHODS.index("entropy_gate"))
TOP_K_SWAP = tl.constexpr(METHODS.index(SWAP))
ARITHMETIC_TRUST_REGION = tl.constexpr(len(METHODS))
"""Stands for `TRUST_REGION` in a row of the arithmetic form, whose equation differs."""
FORM_ARITHMETIC = tl.constexpr(FORMS.index("arithmetic"))

# A row, float64: written by `begin`, updated by each `step`, read by `blend`.
ROW_SLOTS = tl.constexpr(32)
ROW_ALPHA = tl.constexpr(0)
"""α, or the best guess of it so far; NaN in a row without a solution."""
ROW_DONE = tl.constexpr(1)
"""1 where α stands, else 0."""
ROW_METHOD = tl.constexpr(2)
ROW_ALPHA_MIN = tl.constexpr(3)
ROW_ALPHA_MAX = tl.constexpr(4)
ROW_EPSILON = tl.constexpr(5)
ROW_INVERSE_TEMPERATURE = tl.constexpr(6)
ROW_TOP_THETA = tl.constexpr(7)
"""The student's largest raw logit."""
ROW_OFFSET = tl.constexpr(8)
"""The offset in x = (t - s - offset) / temperature of raw logits t and s. At the root, x is then near 0."""
ROW_C = tl.constexpr(9)
"""c, with ℓ = x - c."""
ROW_SUM_THETA = tl.constexpr(10)
"""Σe^s over the student's whole row."""
ROW_ONLY_THETA = tl.constexpr(11)
"""Σe^s over the tokens that have no mass under the teacher."""
ROW_FAR = tl.constexpr(12)
"""1 where the exponents of a step may leave float32's range unless they are shifted, else 0."""
ROW_BRACKET_LOW = tl.constexpr(13)
ROW_BRACKET_HIGH = tl.constexpr(14)
"""The root lies between the two."""
ROW_LAST_STEP = tl.constexpr(15)
"""|Δα| of the last step."""
ROW_END_UNTRIED = tl.constexpr(16)
"""1 until a step beyond alpha_min or alpha_max has tried that end, then 0."""
ROW_ARITHMETIC = tl.constexpr(17)
"""1 in a row of the arithmetic form, else 0; written where some row may be of it."""
ROW_BOUND = tl.constexpr(18)
"""The teacher's K-th largest raw logit, of which `swap` has the use; written where some row may be of that method."""

# A chunk, float32: written by its program, joined by the last program of its row.
CHUNK_SLOTS = tl.constexpr(16)
# In `begin`, of a row whose α is the root of an equation: S_0, S_1 and S_2 at p = 0, ½ and 1,
NODE_THETA = tl.constexpr(0)
NODE_HALF = tl.constexpr(3)
NODE_TEACHER = tl.constexpr(6)
NODE_GROWTH = tl.constexpr(9)
"""S_0(1) - S_0(0) of the chunk."""
NODE_ONLY_THETA = tl.constexpr(10)
NODE_ONLY_TEACHER = tl.constexpr(11)
"""Σe^s and Σe^t over the tokens that only the one model has."""
NODE_MAX_THETA = tl.constexpr(13)
NODE_MAX_TEACHER = tl.constexpr(14)
"""The largest raw logits of the chunk."""
NODE_MAX_BOTH = tl.constexpr(15)
"""-inf in a chunk without a token that both models have."""
# and of any other row, for its entropies: the number of the largest terms, and Σe^u and Σu·2^u of the others.
ENTROPY_THETA = tl.constexpr(0)
ENTROPY_TEACHER = tl.constexpr(3)
# (In a row of `top_k_swap` NODE_ONLY_THETA is Σe^s over the tokens outside of S.)
# In `step`: S_0 to S_3 at the powers p and q,
STEP_P = tl.constexpr(0)
STEP_Q = tl.constexpr(4)
STEP_GROWTH = tl.constexpr(8)
"""S_0(q) - S_0(p) of the chunk."""
# (in a row of the method ARITHMETIC_TRUST_REGION: KL(q‖θ) and its derivatives in α,)
STEP_KL = tl.constexpr(0)
STEP_SLOPE = tl.constexpr(1)
STEP_BEND = tl.constexpr(2)
STEP_THIRD = tl.constexpr(3)
"""A bound of the third derivative's size."""
STEP_TOP_P = tl.constexpr(14)
STEP_TOP_Q = tl.constexpr(15)
"""The exponents, in bits, that the sums at p and q are relative to."""
# In `scan`: a distribution's largest logit, and behind it what normalises it relative to that.
TOTAL_THETA = tl.constexpr(8)
TOTAL_TEACHER = tl.constexpr(10)
TOTAL_MIXED = tl.constexpr(12)
# In `sum_scalars`, below them: the scalars in the order of `dense.SCALARS`.
SCALAR_SLOTS = tl.constexpr(7)
"""The last of them is a probability, the others are divergences and entropies."""
