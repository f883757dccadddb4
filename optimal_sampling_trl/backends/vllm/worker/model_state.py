"""The hooks of Model Runner V2, vLLM's on GPUs: the fused model's sampler, and a stream of tokens for each model.

A pair with several tables of blocks has one prompt for both models, which then read what vLLM schedules.

Under CUDA graphs a model reads from the same buffers in every step, so that each has its own for tokens, positions,
places, lengths and blocks, also where it reads what vLLM schedules; they are then copies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from ..wire import teacher_shift_of, theta_prompt_of
from .shift import NOWHERE, Prompts, Stream, StreamBuffers, shift_stream
from .slot_rejection import SlotRejection
from .slot_sampler import SlotSampler


class MixtureSampling:
    """The hook by which a state hands vLLM's runner the mixture's sampler."""

    model: Any
    vllm_config: Any
    max_num_reqs: int
    device: torch.device

    def custom_sampler(self, sampler: Any) -> tuple[SlotSampler, SlotRejection | None]:
        """Return the sampler, and the one that verifies the student's drafts where there are some: vLLM's hook."""
        slots = SlotSampler(sampler, self.model, self.max_num_reqs, self.device)
        settings = self.vllm_config.speculative_config
        if settings is None:
            return slots, None
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

        return slots, SlotRejection(RejectionSampler(sampler, settings, self.device), slots)


class DecoderState(MixtureSampling, DefaultModelState):
    """vLLM's own state of a decoder, whose layers may have several tables of blocks.

    Its whole CUDA graphs of mixed batches hold for requests of any length.
    """

    def prepare_attn(self, input_batch: Any, cudagraph_mode: CUDAGraphMode, *args: Any, **kwargs: Any) -> Any:
        """Plan a step's attention: vLLM's hook before the model runs.

        Symptom: with `cudagraph_mode` FULL and bfloat16, tokens of a short prompt and drafts are off by several nats.
        Cause: a graph of a few tokens is captured with one of each request, for which FlashAttention 3 leaves out
            the causal mask where a head has at most 64 numbers, or more than 128; other steps replay that graph.
        Safe: such a step is planned as if one request had all of its tokens, when it is captured and when it is
            replayed. The kernel reads how many each has from the device.
        Upstream: since 0.31 or before, graphs are captured so (`prepare_inputs_to_capture`).
        Delete when: 0.26 is no longer accepted, and test_short_prompts passes without this function.
        """
        mixed = self.vllm_config.compilation_config.cudagraph_mode.mixed_mode()
        if mixed == CUDAGraphMode.FULL and (kwargs.get("for_capture") or cudagraph_mode == CUDAGraphMode.FULL):
            tokens = np.array([input_batch.num_tokens_after_padding], dtype=np.int32)
            input_batch = replace(input_batch, num_scheduled_tokens=tokens)
        return super().prepare_attn(input_batch, cudagraph_mode, *args, **kwargs)


class OptimalSamplingModelState(DecoderState):
    """The state with one table of blocks, and a stream of tokens for each model."""

    speculator: Any = None

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        tokens, slots = self.max_num_tokens, self.max_num_reqs
        self.teacher, self.theta = (StreamBuffers(tokens, slots, device) for _ in range(2))
        self.prompts = StagedWriteTensor((slots, self.max_model_len), torch.int32, device)
        self.prompt_lengths = StagedWriteTensor(slots, torch.int32, device)
        self.theta_shifts = StagedWriteTensor(slots, torch.int32, device)
        self.teacher_shifts = StagedWriteTensor(slots, torch.int32, device)
        self.no_lengths = torch.zeros(slots, dtype=torch.int32, device=device)
        # Slots in which a model reads other tokens than the scheduled ones, or the same later.
        self.of_theta_np, self.of_teacher_np = (np.zeros(slots, dtype=bool) for _ in range(2))
        model.teacher_places, model.theta_places = self.teacher.places, self.theta.places

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Note a request's prompts: vLLM's hook for a new request, or one that comes back after a preemption."""
        super().add_request(req_index, new_req_data)
        if self.speculator is not None:
            self.speculator.forget(req_index, new_req_data.sampling_params)
        prompt, shift = theta_prompt_of(new_req_data.sampling_params), teacher_shift_of(new_req_data.sampling_params)
        if prompt is not None:
            self.prompts.stage_write(req_index, 0, prompt)
        self.prompt_lengths.stage_write_elem(req_index, 0 if prompt is None else len(prompt))
        behind = 0 if prompt is None else len(new_req_data.prompt_token_ids) - len(prompt)
        self.theta_shifts.stage_write_elem(req_index, behind)
        self.teacher_shifts.stage_write_elem(req_index, shift)
        self.of_theta_np[req_index], self.of_teacher_np[req_index] = prompt is not None, shift > 0

    def apply_staged_writes(self) -> None:
        """Bring the noted prompts to the device: vLLM's hook before a step with new requests."""
        super().apply_staged_writes()
        for staged in (self.prompts, self.prompt_lengths, self.theta_shifts, self.teacher_shifts):
            staged.apply_write()

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list[list[Any]],
        kv_cache_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Plan the attention of both models, each by its own stream: vLLM's hook before the model runs."""
        block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        both = self._fill_streams(input_batch, block_tables[0], slot_mappings[0], block_size)
        groups: dict[bool, list[Any]] = {True: [], False: []}
        for group in attn_groups[0]:
            groups[group.layer_names[0] in self.model.theta_layers].append(group)
        planned: dict[str, Any] = {}
        for is_theta, stream in both.items():
            batch = replace(input_batch, seq_lens=stream.lengths, positions=stream.positions)
            read = ((stream.blocks,), stream.places[None], [groups[is_theta]], kv_cache_config)
            planned |= super().prepare_attn(batch, cudagraph_mode, *read, *args, **kwargs)
        return planned

    def _fill_streams(self, batch: Any, blocks: Tensor, places: Tensor, block_size: int) -> dict[bool, Stream]:
        """Write both streams into their buffers, and return the parts that this step reads, the student's at True."""
        N, R = batch.num_tokens, batch.num_reqs
        scheduled = Stream(batch.input_ids, batch.positions, places, batch.seq_lens, blocks)
        part = Stream(scheduled.ids[:N], scheduled.positions[:N], places[:N], scheduled.lengths[:R], blocks[:R])
        prompts = {
            False: Prompts(self.prompts.gpu, self.no_lengths, self.teacher_shifts.gpu),
            True: Prompts(self.prompts.gpu, self.prompt_lengths.gpu, self.theta_shifts.gpu),
        }
        both = {False: self.teacher.fill(scheduled), True: self.theta.fill(scheduled)}
        for is_theta, differs_np in ((False, self.of_teacher_np), (True, self.of_theta_np)):
            if differs_np[batch.idx_mapping_np].any():
                starts = batch.query_start_loc[: R + 1]
                shifted = shift_stream(part, starts, batch.idx_mapping, prompts[is_theta], block_size)
                for buffer, value in zip(both[is_theta], shifted):
                    buffer[: len(value)].copy_(value)
        return both

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Return what the model is called with: vLLM's hook after `prepare_attn`."""
        return super().prepare_inputs(input_batch, req_states) | self._inputs(input_batch.num_tokens_after_padding)

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Return the same for trial steps and the capture of CUDA graphs, which write nothing into the caches.

        `alone.py` captures between two calls, when the places are still those of the last step's tokens; piecewise
        graphs are captured without `prepare_attn`, which would set them.
        """
        for stream in (self.teacher, self.theta):
            stream.places.fill_(NOWHERE)
        return super().prepare_dummy_inputs(num_reqs, num_tokens) | self._inputs(num_tokens)

    def _inputs(self, tokens: int) -> dict[str, Any]:
        return {
            "teacher_ids": self.teacher.ids[:tokens],
            "teacher_positions": self.teacher.positions[:tokens],
            "theta_ids": self.theta.ids[:tokens],
            "theta_positions": self.theta.positions[:tokens],
        }
