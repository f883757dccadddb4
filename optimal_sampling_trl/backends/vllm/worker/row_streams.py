"""Two prompts on Model Runner V1, vLLM's on a CPU: each model's stream of a step, and the plan of its attention.

No graph reads what stands here, so a model is handed only the tokens that it reads: those before its first are left
out of its batch, and a request of which it reads none yet is, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..wire import teacher_shift_of, theta_prompt_of
from .shift import NOWHERE, Prompts, Stream, shift_stream


class Part(NamedTuple):
    """The tokens of a step that one model reads: their places among the scheduled ones, ids and positions."""

    rows: Int[Tensor, " M"]
    ids: Int[Tensor, " M"]
    positions: Int[Tensor, " M"]


class RowStreams:
    """The streams of both models in a batch of Model Runner V1, whose row i is `runner.input_batch.req_ids[i]`.

    Args:
        runner: vLLM's, with one table of blocks.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.requests: list[str] = []
        self.prompts: dict[str, Prompts] = {}

    def parts(self, ids: Int[Tensor, " N"], positions: Int[Tensor, " N"]) -> dict[str, Part]:
        """Return what a model reads in this step, by its role, and plan its attention; a model that reads all that is
        scheduled has no entry."""
        planned: Any = get_forward_context().attn_metadata
        if not planned:  # a trial step without caches
            return {}
        requests = self.runner.input_batch.req_ids
        if requests != self.requests:
            self.requests, self.prompts = list(requests), self._read_prompts(requests)
        return {role: self._part(role, ids, positions) for role in self.prompts}

    def _read_prompts(self, requests: Sequence[str]) -> dict[str, Prompts]:
        """Return the prompts of each model that reads others, or the same later, in some row."""
        states = [self.runner.requests[name] for name in requests]
        of_theta = [theta_prompt_of(state.sampling_params) or [] for state in states]
        lengths = torch.tensor([len(prompt) for prompt in of_theta])
        scheduled = torch.tensor([state.num_prompt_tokens for state in states])
        later = torch.tensor([teacher_shift_of(state.sampling_params) for state in states])
        prompts = {}
        if longest := int(lengths.max()):
            table = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in of_theta])
            prompts["theta"] = Prompts(table, lengths, (scheduled - lengths).where(lengths > 0, 0))
        if later.any():
            prompts["teacher"] = Prompts(later.new_zeros(len(later), 1), torch.zeros_like(later), later)
        return prompts

    def _part(self, role: str, ids: Tensor, positions: Tensor) -> Part:
        model, context = self.runner.model, get_forward_context()
        layers = model.theta_layers if role == "theta" else model.teacher_layers
        planned: Any = context.attn_metadata
        plan = planned[layers[0]]
        scheduled = Stream(ids, positions, plan.slot_mapping, plan.seq_lens, plan.block_table)
        starts, slots = plan.query_start_loc, torch.arange(len(plan.seq_lens))
        stream = shift_stream(scheduled, starts, slots, self.prompts[role], self._block_size())
        read = (stream.places != NOWHERE).nonzero()[:, 0]
        part = Part(read, stream.ids[read], stream.positions[read])
        if len(read):
            batch = _batch_of(stream, starts, read)
            for group in self.runner.attn_groups[0]:
                if group.layer_names[0] in layers:
                    anew = group.get_metadata_builder(0).build(0, batch)
                    planned.update(dict.fromkeys(group.layer_names, anew))
            written: Any = context.slot_mapping
            written.update(dict.fromkeys(layers, batch.slot_mapping))
        return part

    def _block_size(self) -> int:
        return int(self.runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)


def _batch_of(stream: Stream, starts: Int[Tensor, " R_1"], read: Int[Tensor, " M"]) -> CommonAttentionMetadata:
    """Return vLLM's description of the batch of the tokens that are read, by the requests that have some."""
    row = torch.searchsorted(starts[1:].contiguous(), read.to(starts.dtype), right=True)
    rows, counts = row.unique_consecutive(return_counts=True)
    starts = torch.cat([starts.new_zeros(1), counts.cumsum(0).to(starts.dtype)])
    lengths = stream.lengths[rows]
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=len(rows),
        num_actual_tokens=len(read),
        max_query_len=int(counts.max()),
        max_seq_len=int(lengths.max()),
        block_table_tensor=stream.blocks[rows],
        slot_mapping=stream.places[read],
        causal=True,
    )
