"""The hooks of Model Runner V2, vLLM's on GPUs: the fused model's sampler, and the student's own stream of tokens.

Under CUDA graphs a model reads from the same buffers in every step, so that the student has its own for tokens,
positions, lengths and blocks, also where it reads what the teacher reads; they are then copies.
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

from ..wire import theta_prompt_of
from .shift import NOWHERE, Prompts, Stream, shift_stream
from .slot_sampler import SlotSampler


class OptimalSamplingModelState(DefaultModelState):
    """vLLM's own state of a decoder, with the mixture before its sampler and a stream for the student."""

    model: Any

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        tokens, slots = self.max_num_tokens, self.max_num_reqs
        self.theta_ids = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.theta_positions = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.theta_places = torch.full((tokens,), NOWHERE, dtype=torch.int64, device=device)
        self.theta_lengths = torch.zeros(slots, dtype=torch.int32, device=device)
        self.theta_blocks: Tensor | None = None  # as wide as the runner's own
        self.prompts = StagedWriteTensor((slots, self.max_model_len), torch.int32, device)
        self.prompt_lengths = StagedWriteTensor(slots, torch.int32, device)
        self.shifts = StagedWriteTensor(slots, torch.int32, device)
        self.shifts_np = np.zeros(slots, dtype=np.int32)
        model.theta_places = self.theta_places

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        """The sampler, and no rejection sampler: a draft model is refused."""
        return SlotSampler(sampler, self.model, self.max_num_reqs, self.device), None

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """vLLM's hook for a new request, or one that was preempted and comes back."""
        super().add_request(req_index, new_req_data)
        prompt = theta_prompt_of(new_req_data.sampling_params)
        shift = 0 if prompt is None else len(new_req_data.prompt_token_ids) - len(prompt)
        if prompt is not None:
            self.prompts.stage_write(req_index, 0, prompt)
        self.prompt_lengths.stage_write_elem(req_index, 0 if prompt is None else len(prompt))
        self.shifts.stage_write_elem(req_index, shift)
        # The student reads the same tokens later, or others: either way its buffers are no copies.
        self.shifts_np[req_index] = -1 if prompt is not None and not shift else shift

    def apply_staged_writes(self) -> None:
        """vLLM's hook before a step with new requests."""
        super().apply_staged_writes()
        for staged in (self.prompts, self.prompt_lengths, self.shifts):
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
        """vLLM's hook before the model runs: plans the attention of both models, each by its own stream."""
        block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        theta = self._fill_stream(input_batch, block_tables[0], slot_mappings[0], block_size)
        groups: dict[bool, list[Any]] = {True: [], False: []}
        for group in attn_groups[0]:
            groups[group.layer_names[0] in self.model.theta_layers].append(group)
        plan = super().prepare_attn
        theta_batch = replace(input_batch, seq_lens=theta.lengths, positions=theta.positions)
        rest = (kv_cache_config, *args)
        return {
            **plan(input_batch, cudagraph_mode, block_tables, slot_mappings, [groups[False]], *rest, **kwargs),
            **plan(theta_batch, cudagraph_mode, (theta.blocks,), theta.places[None], [groups[True]], *rest, **kwargs),
        }

    def _fill_stream(self, batch: Any, blocks: Tensor, places: Tensor, block_size: int) -> Stream:
        """Write the student's stream into its buffers, and return their parts that this step reads."""
        if self.theta_blocks is None:
            self.theta_blocks = blocks.new_zeros(self.max_num_reqs, blocks.shape[1])
        N, R, all_tokens, all_rows = batch.num_tokens, batch.num_reqs, len(places), len(blocks)
        teacher = Stream(batch.input_ids, batch.positions, places, batch.seq_lens, blocks)
        theta = Stream(
            self.theta_ids[:all_tokens],
            self.theta_positions[:all_tokens],
            self.theta_places[:all_tokens],
            self.theta_lengths[:all_rows],
            self.theta_blocks[:all_rows],
        )
        for buffer, value in zip(theta, teacher):  # also what pads a graph's batch, which no request is
            buffer[: len(value)].copy_(value)
        if self.shifts_np[batch.idx_mapping_np].any():
            part = Stream(teacher.ids[:N], teacher.positions[:N], places[:N], teacher.lengths[:R], blocks[:R])
            prompts = Prompts(self.prompts.gpu, self.prompt_lengths.gpu, self.shifts.gpu)
            shifted = shift_stream(part, batch.query_start_loc[: R + 1], batch.idx_mapping, prompts, block_size)
            for buffer, value in zip(theta, shifted):
                buffer[: len(value)].copy_(value)
        return theta

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """vLLM's hook for what the model is called with, after `prepare_attn`."""
        return super().prepare_inputs(input_batch, req_states) | self._inputs(input_batch.num_tokens_after_padding)

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """The same for trial steps and the capture of CUDA graphs."""
        return super().prepare_dummy_inputs(num_reqs, num_tokens) | self._inputs(num_tokens)

    def _inputs(self, tokens: int) -> dict[str, Any]:
        return {"theta_ids": self.theta_ids[:tokens], "theta_positions": self.theta_positions[:tokens]}
