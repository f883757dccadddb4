"""Drafts in a paged cache: what the student reads and writes, over many cycles of drafting and verification."""

from __future__ import annotations

import random

import pytest
import torch

from optimal_sampling_trl.backends.vllm.worker.drafts import (
    SALT,
    certain_drafts,
    draft_stream,
    ends,
    finite,
    first_positions,
)
from optimal_sampling_trl.backends.vllm.worker.shift import NOWHERE

BLOCK, LONGEST, K = 4, 24, 3


class Sequence:
    """A request's tokens as they are scheduled, and the student's cache of them; its stream is `shift` behind."""

    def __init__(self, source: random.Random, shift: int, first_block: int) -> None:
        self.shift, self.source = shift, source
        self.tokens = [source.randrange(1000) for _ in range(shift + source.randrange(1, 6))]
        self.blocks = [first_block + index for index in source.sample(range(8), 8)]
        self.own_blocks = [*self.blocks[shift // BLOCK :], *self.blocks[-1:] * (shift // BLOCK)]

    def read_by_theta(self) -> list[int]:
        return self.tokens[self.shift :]

    def place(self, position: int) -> int:
        return self.own_blocks[position // BLOCK] * BLOCK + position % BLOCK


@pytest.mark.parametrize("seed", range(5))
def test_a_draft_reads_what_was_verified_and_what_was_drafted(seed: int) -> None:
    """Each cycle verifies K drafts and keeps some; a sequence near its end has fewer, and one at its end none."""
    source = random.Random(seed)
    sequences = [Sequence(source, shift, 10 * index) for index, shift in enumerate((0, 3, 4, 9))]
    cache: dict[int, int] = {}
    while min(len(one.tokens) for one in sequences) < LONGEST:
        lengths, rejected, sampled = [], [], []
        for one in sequences:
            drafts = min(K, LONGEST - 1 - len(one.tokens))
            refused = source.randint(0, max(drafts, 0))
            is_over = len(one.tokens) >= LONGEST
            for position, token in enumerate(one.read_by_theta()):  # the pass that verifies writes all of it
                cache[one.place(position)] = token
            kept = [] if is_over else [source.randrange(1000) for _ in range(max(drafts, 0) - refused)]
            for position, token in enumerate(kept, len(one.read_by_theta())):
                cache[one.place(position)] = token
            lengths.append(len(one.tokens) + max(drafts, 0))
            rejected.append(0 if is_over else refused)
            sampled.append(0 if is_over else len(kept) + 1)
            if not is_over:
                one.tokens += [*kept, source.randrange(1000)]
        shift = torch.tensor([one.shift for one in sequences])
        first = first_positions(torch.tensor(lengths), torch.tensor(rejected), shift)
        end = ends(torch.tensor(sampled), shift, LONGEST)
        blocks = torch.tensor([one.own_blocks for one in sequences], dtype=torch.int32)
        ids, read = [one.tokens[-1] for one in sequences], [one.read_by_theta() for one in sequences]
        for step in range(K):
            stream = draft_stream(torch.tensor(ids), first + step, end, blocks, BLOCK)
            for row, one in enumerate(sequences):
                position, place = int(stream.positions[row]), int(stream.places[row])
                if not sampled[row] or one.shift + int(first[row]) + step >= LONGEST:
                    assert (position, place, int(stream.lengths[row])) == (0, NOWHERE, 1)
                    continue
                assert position == len(read[row]) - 1
                cache[place] = ids[row]
                seen = [cache[one.place(i)] for i in range(int(stream.lengths[row]))]
                assert seen == read[row]
            ids = [source.randrange(1000) for _ in sequences]
            read = [[*one, token] for one, token in zip(read, ids, strict=True)]


def test_a_broken_student_drafts_some_token() -> None:
    logits = finite(torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0]]))
    assert logits.tolist() == [[0.0, 0.0, -torch.inf, 1.0]]


def test_a_new_request_has_certain_drafts() -> None:
    cache = torch.zeros(3, 2, 5)
    certain_drafts(cache, 1)
    assert cache[1].softmax(-1).tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]] * 2
    assert not cache[[0, 2]].any()


def test_a_shorter_prompt_that_has_not_begun_is_read_nowhere() -> None:
    shift, blocks = torch.tensor([9]), torch.tensor([[1, 2]])
    first = first_positions(torch.tensor([4]), torch.tensor([0]), shift)
    stream = draft_stream(torch.tensor([5]), first, ends(torch.tensor([0]), shift, LONGEST), blocks, BLOCK)
    assert (stream.positions.tolist(), stream.places.tolist(), stream.lengths.tolist()) == ([0], [NOWHERE], [1])


def test_noise_of_drafts_is_that_of_no_position() -> None:
    assert SALT > 2**28  # further than any model reads
    assert SALT + 2**28 < 2**31
