"""Each model's likeliest tokens on a GPU, exactly, with two small selections in the place of one over the vocabulary.

The vocabulary is cut into groups. The k largest of the groups' largest logits are k logits, and no token outside of
those k groups is above any of them: so the k likeliest tokens are among those of these groups. A group is what lies in
one thread of `scalars.scan`, INNER tokens of each tile of a chunk, so that its largest logit costs no exchange.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import CHUNK_SLOTS, LN_2, LOG2_E, LOWEST, NOWHERE, TOTAL_TEACHER, TOTAL_THETA
from .scalars import inverse_temperature, normaliser, source_of
from .sums import fold_endings


@triton.jit
def gather_groups(
    theta, teacher, theta_stride, teacher_stride, rows, endings, V, chunk, tiles, groups, out, count, blocks,
    BLOCK: tl.constexpr, FOLDED: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Write the logits of BLOCK of the `count` chosen groups of a row, of the student and of the teacher.

    `groups` (2, N, count) has their numbers, `out` (2, N, count, tiles, INNER) takes the logits: never below `LOWEST`,
    -inf beyond V. No argument is a multiple of N: Triton would compile anew for some batches.
    """
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    source = source_of(rows, row)
    theta += source * theta_stride
    teacher += source * teacher_stride
    folded = fold_endings(teacher, endings, V, FOLDED)
    place = block * BLOCK + tl.arange(0, BLOCK)
    for model in tl.static_range(2):
        chosen = (model * (tl.num_programs(0) // blocks) + row) * count + place
        group = tl.load(groups + chosen, mask=place < count, other=0).to(tl.int32)
        inner = tl.arange(0, INNER)[None, :]
        for tile in range(0, tiles):
            first = token_of(group, tile, chunk, OUTER, INNER)
            index = first[:, None] + inner
            if model == 0:
                x = tl.load(theta + index, mask=index < V, other=NOWHERE).to(tl.float32)
            else:
                x = load_folded(teacher, endings, folded, index, V, FOLDED)
            x = tl.where(index < V, tl.maximum(x, LOWEST), NOWHERE)
            tl.store(out + (chosen[:, None] * tiles + tile) * INNER + inner, x, mask=place[:, None] < count)


@triton.jit
def token_of(group, tile, chunk, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Return a group's first token in a tile of its chunk."""
    return group // OUTER * chunk + tile * (OUTER * INNER) + group % OUTER * INNER


@triton.jit
def load_folded(teacher, endings, folded, index, V, FOLDED: tl.constexpr):
    """Return the teacher's logits at `index`, -inf beyond V; `folded` is what `fold_endings` returned."""
    t = tl.load(teacher + index, mask=index < V, other=NOWHERE).to(tl.float32)
    if FOLDED > 0:
        for i in tl.static_range(FOLDED):
            t = tl.where(index == tl.load(endings + 1 + i), NOWHERE, t)
        t = tl.where(index == tl.load(endings), folded, t)
    return t


@triton.jit
def read_likeliest(
    theta, teacher, theta_stride, teacher_stride, rows, temperature, temperature_stride, endings, V, chunk, chunks,
    tiles, parts, groups, places, count, top_k, blocks, ids, log_theta, log_teacher,
    BLOCK: tl.constexpr, FOLDED: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Write BLOCK of a row's 2·top_k likeliest tokens, the student's first, and both models' log-probabilities.

    `groups` is as in `gather_groups`, `places` (2, N, top_k) where among its logits each token stands.
    """
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    source = source_of(rows, row)
    theta += source * theta_stride
    teacher += source * teacher_stride
    parts += row * chunks * CHUNK_SLOTS
    folded = fold_endings(teacher, endings, V, FOLDED)
    inverse = inverse_temperature(temperature, source * temperature_stride)
    top_theta, sum_theta = normaliser(parts, TOTAL_THETA, chunks, inverse * LOG2_E)
    top_teacher, sum_teacher = normaliser(parts, TOTAL_TEACHER, chunks, inverse * LOG2_E)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < 2 * top_k
    model = tl.where(column < top_k, 0, 1)
    of_model = model * (tl.num_programs(0) // blocks) + row
    place = tl.load(places + of_model * top_k + column - model * top_k, mask=inside, other=0)
    group = tl.load(groups + of_model * count + place // (tiles * INNER), mask=inside, other=0)
    within = place % (tiles * INNER)
    index = token_of(group, within // INNER, chunk, OUTER, INNER) + within % INNER
    index = tl.minimum(index, V - 1)  # in a row with a NaN a group may be chosen that holds no token
    s = tl.load(theta + index, mask=inside, other=NOWHERE).to(tl.float32)
    t = load_folded(teacher, endings, folded, index, V, FOLDED)
    out = row * (2 * top_k) + column
    tl.store(ids + out, index, mask=inside)
    tl.store(log_theta + out, (s - top_theta) * inverse - sum_theta * LN_2, mask=inside)
    tl.store(log_teacher + out, (t - top_teacher) * inverse - sum_teacher * LN_2, mask=inside)
