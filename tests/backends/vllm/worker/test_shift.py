"""The student's stream beside the teacher's, on caches of plain integers: what a model's attention would read."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from optimal_sampling_trl.backends.vllm.blocks import shared_end
from optimal_sampling_trl.backends.vllm.worker.shift import NOWHERE, Prompts, Stream, shift_stream

BLOCK = 4
SLOTS, WIDTH = 8, 24


@dataclass
class Sequence:
    """A request in a pretended engine: both models' tokens, its blocks, and how far the teacher has read."""

    slot: int
    prompt: list[int]
    theta_prompt: list[int]
    completion: list[int]
    blocks: list[int] = field(default_factory=list)
    read: int = 0

    @property
    def teacher(self) -> list[int]:
        return self.prompt + self.completion

    @property
    def theta(self) -> list[int]:
        return self.theta_prompt + self.completion


class Engine:
    """Blocks, caches whose entries are the tokens written there, and steps over chunks of any size."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.cache = torch.full((400 * BLOCK,), NOWHERE)
        self.free = list(range(399, 0, -1))
        lengths = torch.zeros(SLOTS, dtype=torch.int32)
        self.prompts = Prompts(torch.zeros(SLOTS, 64, dtype=torch.int32), lengths, lengths.clone())
        for one in sequences:
            self.prompts.ids[one.slot, : len(one.theta_prompt)] = torch.tensor(one.theta_prompt, dtype=torch.int32)
            self.prompts.length[one.slot] = len(one.theta_prompt)
            self.prompts.shift[one.slot] = len(one.prompt) - len(one.theta_prompt)

    def step(self, chunks: list[tuple[Sequence, int]]) -> None:
        """Let the teacher read some more tokens of some requests, and check what the student reads and finds."""
        table = torch.zeros(len(chunks), WIDTH, dtype=torch.int32)
        ids, positions, starts = [], [], [0]
        for row, (one, tokens) in enumerate(chunks):
            while len(one.blocks) * BLOCK < one.read + tokens:
                one.blocks.append(self.free.pop())
            table[row, : len(one.blocks)] = torch.tensor(one.blocks, dtype=torch.int32)
            ids += one.teacher[one.read : one.read + tokens]
            positions += range(one.read, one.read + tokens)
            starts.append(starts[-1] + tokens)
            one.read += tokens
        teacher = Stream(
            torch.tensor(ids, dtype=torch.int32),
            torch.tensor(positions),
            torch.zeros(len(ids), dtype=torch.int64),
            torch.tensor([one.read for one, _ in chunks], dtype=torch.int32),
            table,
        )
        slots = torch.tensor([one.slot for one, _ in chunks], dtype=torch.int32)
        theta = shift_stream(teacher, torch.tensor(starts, dtype=torch.int32), slots, self.prompts, BLOCK)
        written = theta.places != NOWHERE
        self.cache[theta.places[written]] = theta.ids[written].long()
        for row, (one, tokens) in enumerate(chunks):
            length = int(theta.lengths[row])
            assert length == max(one.read - (len(one.prompt) - len(one.theta_prompt)), 0)
            found = self.cache.view(-1, BLOCK)[theta.blocks[row].long()].flatten()[:length]
            assert found.tolist() == one.theta[:length]
            part = slice(starts[row], starts[row + 1])
            new = min(tokens, length)
            assert theta.positions[part].tolist() == [0] * (tokens - new) + list(range(length - new, length))
            assert written[part].tolist() == [False] * (tokens - new) + [True] * new

    def run(self, rng: random.Random) -> None:
        """Read all sequences to their ends, in chunks of random sizes and batches of random rows."""
        while left := [one for one in self.sequences if one.read < len(one.teacher)]:
            batch = rng.sample(left, rng.randint(1, len(left)))
            self.step([(one, rng.randint(1, len(one.teacher) - one.read)) for one in batch])


def tokens(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(1, 1000) for _ in range(rng.randint(low, high))]


@pytest.mark.parametrize("seed", range(40))
def test_the_student_finds_its_own_stream(seed: int) -> None:
    rng = random.Random(seed)
    sequences = []
    for slot in rng.sample(range(SLOTS), 5):
        prompt = tokens(rng, 1, 40)
        theta_prompt = prompt if rng.random() < 0.2 else tokens(rng, 1, len(prompt))
        sequences.append(Sequence(slot, prompt, theta_prompt, tokens(rng, 1, 30)))
    Engine(sequences).run(rng)


@pytest.mark.parametrize("seed", range(40))
def test_what_a_group_may_share_holds_no_completion(seed: int) -> None:
    """Requests with the same prompts and different completions on shared blocks: none harms another, in any order."""
    rng = random.Random(seed)
    prompt = tokens(rng, 2, 50)
    theta_prompt = tokens(rng, 1, len(prompt))
    group = [Sequence(slot, prompt, theta_prompt, tokens(rng, 1, 30)) for slot in range(4)]
    engine = Engine(group)
    engine.step([(group[0], len(prompt))])
    shared = min(shared_end(len(prompt), len(theta_prompt), BLOCK), (len(prompt) - 1) // BLOCK * BLOCK)
    for one in group[1:]:
        one.blocks, one.read = group[0].blocks[: shared // BLOCK], shared
    engine.run(rng)
    for row in group:  # what the others wrote last must have left each one's stream whole
        row.read -= 1
        engine.step([(row, 1)])


def test_one_block_more_would_be_overwritten() -> None:
    """The bound is sharp: with 10 + 3 tokens a third block of 4 holds the students' completions of two requests."""
    prompt, theta_prompt = list(range(1, 14)), [50] * 10
    assert shared_end(len(prompt), len(theta_prompt), BLOCK) == 8
    first, second = (Sequence(slot, prompt, theta_prompt, [token] * 3) for slot, token in ((0, 60), (1, 70)))
    engine = Engine([first, second])
    engine.step([(first, 16)])
    second.blocks, second.read = first.blocks[:3], 12
    engine.step([(second, 4)])
    first.read -= 1
    with pytest.raises(AssertionError):
        engine.step([(first, 1)])
