"""Drafts as arithmetic on a batch: which token the student reads next in each sequence, and where it is cached.

A draft is written behind the verified tokens of its sequence, into blocks that vLLM's scheduler set aside for it, and
is written anew by the pass that verifies it. Nothing of a draft outlives that pass.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .shift import NOWHERE, Stream

SALT = 1 << 30
"""Added to a position where noise for a draft is drawn: further than any position, so that no other draw shares it."""


def first_positions(
    lengths: Int[Tensor, " R"], rejected: Int[Tensor, " R"], shift: Int[Tensor, " R"]
) -> Int[Tensor, " R"]:
    """Return the position of each request's newest token in the student's stream: it is the first to be read.

    Args:
        lengths: tokens of each request after the step that was verified, drafts included.
        rejected: drafts of that step that were not kept.
        shift: by how many tokens the student's stream is behind the scheduled one.
    """
    return (lengths - rejected - shift).clamp(min=0).long()  # in its prompt it may not have begun


def ends(sampled: Int[Tensor, " R"], shift: Int[Tensor, " R"], max_model_len: int) -> Int[Tensor, " R"]:
    """Return the position from which on nothing of a request may be written; 0 where its prompt is not read yet.

    Args:
        sampled: tokens that the step gave each request; 0 in the middle of a prompt.
        shift: by how many tokens the student's stream is behind the scheduled one.
        max_model_len: most tokens of a sequence.
    """
    return torch.where(sampled > 0, max_model_len - shift.long(), 0)


def draft_stream(
    ids: Int[Tensor, " R"],
    positions: Int[Tensor, " R"],
    end: Int[Tensor, " R"],
    blocks: Int[Tensor, "R B"],
    block_size: int,
) -> Stream:
    """Return the student's stream of a step in which it reads one token of each request.

    A row at or behind its end reads one token at position 0 and is written nowhere; its draft means nothing.

    Args:
        ids: the tokens.
        positions: their positions in the student's stream.
        end: see `ends`.
        blocks: each request's table of blocks, as the student reads it.
        block_size: tokens in a block of the cache.
    """
    inside = positions < end
    position = torch.where(inside, positions, 0)
    block = blocks.gather(1, (position // block_size)[:, None])[:, 0].long()
    place = block * block_size + position % block_size
    return Stream(ids, position, torch.where(inside, place, NOWHERE), position + 1, blocks)


def finite(logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """Return logits that a draft can be drawn from: where the student is broken, any token will do.

    The mixture's own row says that it is broken, and verification keeps no draft that q does not have.
    """
    return logits.nan_to_num(nan=0.0, posinf=0.0, neginf=-torch.inf)


def certain_drafts(cache: Float[Tensor, "S K V"], slot: int, token: int = 0) -> None:
    """Set the drafts of a slot to one token, for certain: vLLM gives a new request such drafts where it pads a batch.

    Args:
        cache: logits of each slot's drafts, over temperature.
        slot: the new request's.
        token: the token; vLLM's is 0.
    """
    cache[slot].fill_(-torch.inf)
    cache[slot, :, token] = 0.0
