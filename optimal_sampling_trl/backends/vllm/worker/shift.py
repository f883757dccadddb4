"""Two prompts as arithmetic on a batch: where the stream of the model with the shorter one lies beside the other's.

vLLM schedules one stream of tokens, as long as the longer prompt. The model whose prompt is d tokens shorter reads its
token g at the step in which the other reads g + d, and nothing before. Both write to the same blocks of the cache,
each into its own layers: the shorter one's table of blocks starts d // block_size blocks later, so that its token g
has the place of the scheduled token g + d less d % block_size. It never needs a block that is not there yet.

The scheduled tokens are the teacher's, behind d that no model reads where its prompt is the shorter one
(`wire.scheduled_prompt`). The student's are handed over beside them wherever they are others.

Blocks may be shared between requests only as long as no completion token of a shifted stream falls into them: see
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
    """Prompts that one model reads instead of the scheduled ones of up to S requests, by the slot of each.

    Args:
        ids: the tokens, (S, L).
        length: how many of them; 0 for a request whose scheduled tokens are the model's own.
        shift: by how many tokens the model's stream is behind the scheduled one.
    """

    ids: Int[Tensor, "S L"]
    length: Int[Tensor, " S"]
    shift: Int[Tensor, " S"]


class StreamBuffers:
    """One model's stream in tensors that stay where they are, as CUDA graphs read from the same ones in every step.

    Args:
        tokens: most tokens of a step.
        requests: most requests of a step.
        device: where they are.
    """

    def __init__(self, tokens: int, requests: int, device: torch.device) -> None:
        self.ids = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.positions = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.places = torch.full((tokens,), NOWHERE, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(requests, dtype=torch.int32, device=device)
        self.blocks: Tensor | None = None  # as wide as the runner's own

    def fill(self, stream: Stream) -> Stream:
        """Copy a stream to the front, and return these parts. `places` and `blocks` say how many are read."""
        if self.blocks is None:
            self.blocks = stream.blocks.new_zeros(len(self.lengths), stream.blocks.shape[1])
        tokens, requests = len(stream.places), len(stream.blocks)
        parts = Stream(
            self.ids[:tokens],
            self.positions[:tokens],
            self.places[:tokens],
            self.lengths[:requests],
            self.blocks[:requests],
        )
        for part, value in zip(parts, stream):  # also what pads a graph's batch, which no request is
            part[: len(value)].copy_(value)
        return parts


def shift_stream(
    scheduled: Stream, starts: Int[Tensor, " R_1"], slots: Int[Tensor, " R"], prompts: Prompts, block_size: int
) -> Stream:
    """Return one model's stream in the step in which vLLM schedules `scheduled`; waits for no device.

    A token before the model's first has id and position 0 and is written nowhere; its hidden state means nothing. One
    that vLLM writes nowhere stays so: a trial step is in slots that still hold the prompts of earlier requests.

    Args:
        scheduled: vLLM's stream.
        starts: where each request's tokens start among the N, and N.
        slots: the slot of each request.
        prompts: what the model reads instead.
        block_size: tokens in a block of the cache.
    """
    device = scheduled.ids.device
    token = torch.arange(len(scheduled.ids), device=device)
    row = torch.searchsorted(starts[1:].contiguous(), token.to(starts.dtype), right=True)
    shift, slot = prompts.shift[slots].long(), slots.long()[row]
    position = scheduled.positions - shift[row]
    inside = position >= 0
    position = position.clamp(min=0)
    is_prompt = position < prompts.length[slot]
    prompt = prompts.ids[slot, position.clamp(max=prompts.ids.shape[1] - 1)]
    skipped = (shift // block_size)[:, None]
    last = scheduled.blocks.shape[1] - 1
    column = torch.arange(last + 1, device=device) + skipped
    blocks = scheduled.blocks.gather(1, column.clamp(max=last))
    place = blocks[row, position // block_size].long() * block_size + position % block_size
    is_written = inside & (scheduled.places != NOWHERE)
    return Stream(
        torch.where(is_prompt, prompt, scheduled.ids).to(scheduled.ids.dtype).masked_fill(~inside, 0),
        position.to(scheduled.positions.dtype),
        torch.where(is_written, place, NOWHERE).to(scheduled.places.dtype),
        (scheduled.lengths - shift).clamp(min=0).to(scheduled.lengths.dtype),
        blocks,
    )
