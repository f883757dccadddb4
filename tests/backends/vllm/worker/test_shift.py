"""Both models' streams beside the scheduled one, on caches of plain integers: what their attention would read."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from optimal_sampling_trl.backends.vllm.blocks import shared_end
from optimal_sampling_trl.backends.vllm.wire import scheduled_prompt, teacher_shift
from optimal_sampling_trl.backends.vllm.worker.shift import NOWHERE, Prompts, Stream, StreamBuffers, shift_stream
from optimal_sampling_trl.rollouts.request import Request

BLOCK = 4
SLOTS, WIDTH = 8, 24


@dataclass
class Sequence:
    """A request in a pretended engine: both models' tokens, its blocks, and how far it was scheduled."""

    slot: int
    prompt: list[int]
    theta_prompt: list[int]
    completion: list[int]
    blocks: list[int] = field(default_factory=list)
    read: int = 0

    @property
    def request(self) -> Request:
        return Request(self.prompt, self.theta_prompt)

    @property
    def scheduled(self) -> list[int]:
        return scheduled_prompt(self.request) + self.completion

    @property
    def own(self) -> dict[str, list[int]]:
        return {"teacher": self.prompt + self.completion, "theta": self.theta_prompt + self.completion}

    @property
    def behind(self) -> int:
        """By how many tokens the shorter prompt is shorter."""
        return abs(len(self.prompt) - len(self.theta_prompt))


class Engine:
    """Blocks, caches whose entries are the tokens written there, and steps over chunks of any size."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.caches = {role: torch.full((400 * BLOCK,), NOWHERE) for role in ("teacher", "theta")}
        self.free = list(range(399, 0, -1))
        ids, nothing = torch.zeros(SLOTS, 64, dtype=torch.int32), torch.zeros(SLOTS, dtype=torch.int32)
        self.prompts = {role: Prompts(ids, nothing.clone(), nothing.clone()) for role in self.caches}
        for one in sequences:
            theta = self.prompts["theta"]
            theta.ids[one.slot, : len(one.theta_prompt)] = torch.tensor(one.theta_prompt, dtype=torch.int32)
            theta.length[one.slot] = len(one.theta_prompt)
            theta.shift[one.slot] = len(scheduled_prompt(one.request)) - len(one.theta_prompt)
            self.prompts["teacher"].shift[one.slot] = teacher_shift(one.request)

    def step(self, chunks: list[tuple[Sequence, int]]) -> None:
        """Schedule some more tokens of some requests, and check what each model reads and finds."""
        table = torch.zeros(len(chunks), WIDTH, dtype=torch.int32)
        ids, positions, starts = [], [], [0]
        for row, (one, tokens) in enumerate(chunks):
            while len(one.blocks) * BLOCK < one.read + tokens:
                one.blocks.append(self.free.pop())
            table[row, : len(one.blocks)] = torch.tensor(one.blocks, dtype=torch.int32)
            ids += one.scheduled[one.read : one.read + tokens]
            positions += range(one.read, one.read + tokens)
            starts.append(starts[-1] + tokens)
            one.read += tokens
        scheduled = Stream(
            torch.tensor(ids, dtype=torch.int32),
            torch.tensor(positions),
            torch.zeros(len(ids), dtype=torch.int64),
            torch.tensor([one.read for one, _ in chunks], dtype=torch.int32),
            table,
        )
        slots = torch.tensor([one.slot for one, _ in chunks], dtype=torch.int32)
        for role, prompts in self.prompts.items():
            stream = shift_stream(scheduled, torch.tensor(starts, dtype=torch.int32), slots, prompts, BLOCK)
            self.check(role, stream, chunks, starts)

    def check(self, role: str, stream: Stream, chunks: list[tuple[Sequence, int]], starts: list[int]) -> None:
        """Write one model's stream into its cache, and fail where a request does not find its own tokens there."""
        cache, written = self.caches[role], stream.places != NOWHERE
        cache[stream.places[written]] = stream.ids[written].long()
        for row, (one, tokens) in enumerate(chunks):
            length = int(stream.lengths[row])
            assert length == max(one.read - (len(one.scheduled) - len(one.own[role])), 0)
            found = cache.view(-1, BLOCK)[stream.blocks[row].long()].flatten()[:length]
            assert found.tolist() == one.own[role][:length]
            part = slice(starts[row], starts[row + 1])
            new = min(tokens, length)
            assert stream.positions[part].tolist() == [0] * (tokens - new) + list(range(length - new, length))
            assert written[part].tolist() == [False] * (tokens - new) + [True] * new

    def run(self, rng: random.Random) -> None:
        """Read all sequences to their ends, in chunks of random sizes and batches of random rows."""
        while left := [one for one in self.sequences if one.read < len(one.scheduled)]:
            batch = rng.sample(left, rng.randint(1, len(left)))
            self.step([(one, rng.randint(1, len(one.scheduled) - one.read)) for one in batch])


def tokens(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(1, 1000) for _ in range(rng.randint(low, high))]


@pytest.mark.parametrize("seed", range(40))
def test_each_model_finds_its_own_stream(seed: int) -> None:
    """The teacher's prompt is longer, shorter, as long as the student's, or the same, all in one batch."""
    rng = random.Random(seed)
    sequences = []
    for slot in rng.sample(range(SLOTS), 5):
        prompt = tokens(rng, 1, 40)
        theta_prompt = prompt if rng.random() < 0.2 else tokens(rng, 1, 40)
        sequences.append(Sequence(slot, prompt, theta_prompt, tokens(rng, 1, 30)))
    Engine(sequences).run(rng)


@pytest.mark.parametrize("seed", range(40))
def test_what_a_group_may_share_holds_no_completion(seed: int) -> None:
    """Requests with the same prompts and different completions on shared blocks: none harms another, in any order."""
    rng = random.Random(seed)
    prompt, theta_prompt = tokens(rng, 2, 50), tokens(rng, 1, 50)
    group = [Sequence(slot, prompt, theta_prompt, tokens(rng, 1, 30)) for slot in range(4)]
    engine = Engine(group)
    length = max(len(prompt), len(theta_prompt))
    engine.step([(group[0], length)])
    shared = min(shared_end(length, group[0].behind, BLOCK), (length - 1) // BLOCK * BLOCK)
    for one in group[1:]:
        one.blocks, one.read = group[0].blocks[: shared // BLOCK], shared
    engine.run(rng)
    for row in group:  # what the others wrote last must have left each one's stream whole
        row.read -= 1
        engine.step([(row, 1)])


@pytest.mark.parametrize("swapped", [False, True], ids=["student shorter", "teacher shorter"])
def test_one_block_more_would_be_overwritten(swapped: bool) -> None:
    """The bound is sharp: with 10 + 3 tokens a third block of 4 holds the shifted completions of two requests."""
    prompt, theta_prompt = list(range(1, 14)), [50] * 10
    if swapped:
        prompt, theta_prompt = theta_prompt, prompt
    assert shared_end(13, 3, BLOCK) == 8
    first, second = (Sequence(slot, prompt, theta_prompt, [token] * 3) for slot, token in ((0, 60), (1, 70)))
    engine = Engine([first, second])
    engine.step([(first, 16)])
    second.blocks, second.read = first.blocks[:3], 12
    engine.step([(second, 4)])
    first.read -= 1
    with pytest.raises(AssertionError):
        engine.step([(first, 1)])


def test_buffers_stay_where_they_are() -> None:
    """A graph reads from the same tensors in each step; what pads its batch is copied, what lies behind stays."""
    buffers = StreamBuffers(8, 4, torch.device("cpu"))
    wide = Stream(
        torch.arange(1, 7, dtype=torch.int32),
        torch.arange(6),
        torch.arange(10, 16),
        torch.tensor([3, 3], dtype=torch.int32),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.int32),
    )
    first = buffers.fill(wide)
    narrow = Stream(wide.ids[:1] + 20, wide.positions[:1] + 5, wide.places[:2], wide.lengths[:1], wide.blocks[:1])
    second = buffers.fill(narrow)
    assert [part.data_ptr() for part in first] == [part.data_ptr() for part in second]
    assert second.ids.tolist() == [21, 2]
    assert second.places.tolist() == [10, 11]
    assert (len(second.lengths), len(second.blocks)) == (1, 1)
    assert buffers.ids.tolist() == [21, 2, 3, 4, 5, 6, 0, 0]
    assert buffers.places.tolist()[6:] == [NOWHERE] * 2
