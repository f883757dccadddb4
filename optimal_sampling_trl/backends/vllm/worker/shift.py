"""The student's own prompt as arithmetic on a batch: where its stream of tokens lies beside the teacher's.

vLLM schedules one stream of tokens, the teacher's. Where the student's prompt is d tokens shorter, the student reads
its token g at the step in which the teacher reads g + d, and nothing before. Both write to the same blocks of the
cache, each into its own layers: the student's table of blocks starts d // block_size blocks later than the teacher's,
so that its token g has the teacher's place less d % block_size. It never needs a block that is not there yet.

Such blocks may be shared between requests only as long as no completion token of the student falls into them: see
`blocks.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

NOWHERE = -1
"""The place of a token that is not written to the cache; vLLM's own number for it."""


class Stream(NamedTuple):
    """One model's input of a step: N tokens of R requests, whose caches have up to B blocks.

    Args:
        ids: the tokens.
        positions: their positions in the model's own stream.
        places: where each token's keys and values are written, a block's number times its size plus an offset.
        lengths: tokens of each request so far, those of this step included.
        blocks: each request's table of blocks.
    """

    ids: Int[Tensor, " N"]
    positions: Int[Tensor, " N"]
    places: Int[Tensor, " N"]
    lengths: Int[Tensor, " R"]
    blocks: Int[Tensor, "R B"]


class Prompts(NamedTuple):
    """The student's own prompts of up to S requests, by the slot in which a request lives.

    Args:
        ids: the tokens, (S, L).
        length: how many of them; 0 for a request whose student reads the teacher's prompt.
        shift: by how many tokens the student's stream is behind; 0 likewise.
    """

    ids: Int[Tensor, "S L"]
    length: Int[Tensor, " S"]
    shift: Int[Tensor, " S"]


def shift_stream(
    teacher: Stream, starts: Int[Tensor, " R_1"], slots: Int[Tensor, " R"], prompts: Prompts, block_size: int
) -> Stream:
    """The student's stream in the step in which the teacher reads `teacher`; waits for no device.

    A token before the student's first has id and position 0 and is written nowhere; its hidden state means nothing.

    Args:
        teacher: the teacher's stream.
        starts: where each request's tokens start among the N, and N.
        slots: the slot of each request.
        prompts: the student's own prompts.
        block_size: tokens in a block of the cache.
    """
    device = teacher.ids.device
    token = torch.arange(len(teacher.ids), device=device)
    row = torch.searchsorted(starts[1:].contiguous(), token.to(starts.dtype), right=True)
    shift, slot = prompts.shift[slots].long(), slots.long()[row]
    position = teacher.positions - shift[row]
    inside = position >= 0
    position = position.clamp(min=0)
    is_prompt = position < prompts.length[slot]
    prompt = prompts.ids[slot, position.clamp(max=prompts.ids.shape[1] - 1)]
    skipped = (shift // block_size)[:, None]
    last = teacher.blocks.shape[1] - 1
    column = torch.arange(last + 1, device=device) + skipped
    blocks = teacher.blocks.gather(1, column.clamp(max=last))
    place = blocks[row, position // block_size].long() * block_size + position % block_size
    return Stream(
        torch.where(is_prompt, prompt, teacher.ids).to(teacher.ids.dtype).masked_fill(~inside, 0),
        position.to(teacher.positions.dtype),
        torch.where(inside, place, NOWHERE).to(teacher.places.dtype),
        (teacher.lengths - shift).clamp(min=0).to(teacher.lengths.dtype),
        blocks,
    )
