"""The student drafts: a speculator of Model Runner V2 that runs the fused model's own student, one token at a time.

The pass that verifies runs both models over all drafts, so that the student's cache has no holes and drafting starts
from the newest token. It reads the student's buffers of the model state, which are free between two passes. All that
changes from step to step is on the device: one CUDA graph holds all drafts of a batch, and nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial, wraps
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from ..speculation import METHOD, NUM_SPECULATIVE_TOKENS
from .drafts import SALT, certain_drafts, draft_stream, ends, finite, first_positions

BACKENDS = {"FLASH_ATTN", "TRITON_ATTN"}
"""Kinds of attention that read lengths, blocks and places from the device alone, so that a plan of them never ages."""


class ThetaSpeculator(DraftModelSpeculator):
    """Drafts with the student of the fused model, whose weights and cache it shares."""

    supports_mm_inputs = False
    model: Any
    model_state: Any
    dtype: Any
    draft_logits: Tensor

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        if self.method != METHOD:  # vLLM guesses it from a folder's name
            raise ValueError(
                f"vLLM takes the teacher for a draft of the kind {self.method!r}; wanted {METHOD!r}. Rename its "
                f"folder, or drop `{NUM_SPECULATIVE_TOKENS}`."
            )
        self.positions, self.ends = torch.zeros(2, self.max_num_reqs, dtype=torch.int64, device=device)
        self.starts_cpu = torch.arange(self.max_num_reqs + 1, dtype=torch.int32)
        self.starts = self.starts_cpu.to(device)
        self.plans: dict[int, dict[str, Any]] = {}
        table = self.speculative_config.num_speculative_tokens_per_batch_size or [(1, 1, self.num_speculative_steps)]
        self.counts = sorted({entry[-1] for entry in table} - {0})
        self.count = self.num_speculative_steps

    def load_draft_model(self, target_model: Any, target_attn_layer_names: set[str]) -> Any:
        """Return the student: vLLM's hook, which would load another model."""
        return target_model.theta

    def load_model(self, target_model: Any) -> None:
        """Take the student from the fused model: vLLM's hook after that is loaded."""
        super().load_model(target_model)
        self.draft_attn_layer_names = set(target_model.theta_layers)
        common = min(self.vocab_size, target_model.theta_config.model_config.get_vocab_size())
        self.draft_logits = self.draft_logits[..., :common]  # the mixture has no token beyond it

    def set_attn(self, model_state: Any, kv_cache_config: Any, block_tables: Any, *args: Any) -> None:
        """Take the engine's caches and the model state's buffers: vLLM's hook once the caches are planned."""
        super().set_attn(model_state, kv_cache_config, block_tables, *args)
        names = {group.backend.get_name() for groups in self.attn_groups for group in groups}
        if names - BACKENDS:
            raise ValueError(
                f"The student's attention runs on {sorted(names)}; drafts were checked with {sorted(BACKENDS)}. Drop "
                f"`{NUM_SPECULATIVE_TOKENS}`, or choose another `attention_backend`."
            )
        self.block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        if block_tables.kernel_block_sizes != [self.block_size]:
            raise ValueError(
                f"The attention reads blocks of {block_tables.kernel_block_sizes} tokens out of blocks of "
                f"{self.block_size}; wanted the same for drafts. Set `block_size`, or drop `{NUM_SPECULATIVE_TOKENS}`."
            )
        self.plans.clear()
        model_state.speculator = self

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Plan the graphs of drafts: vLLM's hook; as many requests in each as the whole step's graphs have tokens."""
        is_full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if is_full else CUDAGraphMode.NONE
        # A draft reads one token of each request, whatever number of them a whole step verifies.
        config = copy(self.vllm_config)
        config.speculative_config = copy(self.speculative_config)
        config.speculative_config.num_speculative_tokens_per_batch_size = None
        self.graphs = {count: CudaGraphManager(config, self.device, mode, decode_query_len=1) for count in self.counts}

    def capture(self) -> None:
        """Capture the graphs: vLLM's hook after those of the whole step."""
        for count, graphs in self.graphs.items():
            graphs.capture(partial(self._to_capture, count), progress_bar_desc=f"Capturing {count} drafts")

    def _to_capture(self, count: int, desc: Any, warmup: bool) -> Callable[[CUDAGraphMode], None]:
        self._empty(0)
        self._plan(desc.num_reqs)
        return lambda mode: self._draft(desc.num_reqs, count)

    def forget(self, slot: int, params: Any) -> None:
        """Take a new request into a slot, whose last one may have left drafts.

        Symptom: tokens of the first step are not the mixture's where a request joins a batch by one last token.
        Cause: vLLM pads such a request with drafts of token 0, and verifies them by what the slot's last one drafted.
        Safe: the slot's cache says that token 0 was drafted for certain, which is what happened.
        Upstream: fixed in 0.29, which refuses such drafts and draws from the target.
        Delete when: vLLM 0.26 is no longer accepted.

        Raises:
            ValueError: on a request with a grammar, whose drafts vLLM takes back after they were drawn.
        """
        if params is not None and params.structured_outputs is not None:
            raise ValueError(
                f"A request has structured outputs in an engine with `{NUM_SPECULATIVE_TOKENS}`; wanted one of them."
            )
        certain_drafts(self.draft_logits, slot)

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Any,
        aux_hidden_states: Any,
        num_sampled: Int[Tensor, " R"],
        num_rejected: Int[Tensor, " R"],
        last_sampled: Int[Tensor, "S 1"],
        next_prefill_tokens: Any,
        temperature: Float[Tensor, " S"],
        seeds: Int[Tensor, " S"],
        *args: Any,
        dummy_run: bool = False,
        is_profile: bool = False,
        **kwargs: Any,
    ) -> Int[Tensor, "R K"]:
        """Return the drafts of each request: vLLM's hook after a step was sampled.

        Args:
            input_batch: the step's R requests.
            num_sampled: tokens that the step gave each.
            num_rejected: drafts of the step that were not kept.
            last_sampled: the newest token of each slot.
            temperature: of each slot.
            seeds: of each slot.
            dummy_run: a trial step, of which nothing may be written.
            is_profile: a trial step by which vLLM measures the memory of a step.
        """
        R = input_batch.num_reqs
        if is_profile:
            self._take_memory()
        if dummy_run or not self.count:
            return self.draft_tokens[:R]
        self._copy_request_inputs(R, input_batch.idx_mapping, temperature, seeds)
        slots, shifts = input_batch.idx_mapping, self.model_state.theta_shifts.gpu
        shift = shifts[slots]
        self.model_state.theta.ids[:R] = last_sampled[slots, 0]
        self.positions[:R] = first_positions(input_batch.seq_lens[:R], num_rejected, shift)
        self.ends[:R] = ends(num_sampled, shift, self.max_model_len)
        self._empty(R)
        graphs = self.graphs[self.count]
        batch = graphs.dispatch(R, R, 1, 0)
        if batch.cg_mode == CUDAGraphMode.FULL:
            graphs.run_fullgraph(batch)
        else:
            self._draft(R, self.count)
        return self.draft_tokens[:R]

    def _empty(self, first: int) -> None:
        """Mark the rows from `first` on as those of no request."""
        self.ends[first:] = 0
        self.idx_mapping[first:] = -1

    def _draft(self, rows: int, count: int) -> None:
        """Draft so many tokens of each row of a batch, whose newest tokens and positions are in the buffers."""
        buffers = self.model_state.theta
        places = {name: buffers.places[:rows] for name in self.draft_attn_layer_names}
        for step in range(count):
            at = self.positions[:rows] + step
            read = draft_stream(buffers.ids[:rows], at, self.ends[:rows], buffers.blocks[:rows], self.block_size)
            buffers.positions[:rows] = read.positions
            buffers.places[:rows] = read.places
            buffers.lengths[:rows] = read.lengths
            with set_forward_context(self._plan(rows), self.vllm_config, num_tokens=rows, slot_mapping=places):
                hidden = self.model(buffers.ids[:rows], buffers.positions[:rows])
            drafts = self._draw(self.model.compute_logits(hidden), at, step)
            self.draft_tokens[:rows, step] = drafts
            buffers.ids[:rows] = drafts

    def _plan(self, rows: int) -> dict[str, Any]:
        """Plan the attention of a batch. A plan says where lengths and blocks stand, and so holds for every step."""
        if rows not in self.plans:
            buffers = self.model_state.theta
            common = CommonAttentionMetadata(
                query_start_loc=self.starts[: rows + 1],
                query_start_loc_cpu=self.starts_cpu[: rows + 1],
                seq_lens=buffers.lengths[:rows],
                num_reqs=rows,
                num_actual_tokens=rows,
                max_query_len=1,
                max_seq_len=self.max_model_len,
                block_table_tensor=buffers.blocks[:rows],
                slot_mapping=buffers.places[:rows],
            )
            plans = [
                (group, group.get_metadata_builder(0).build_for_drafting(common, 0)) for group in self.attn_groups[0]
            ]
            self.plans[rows] = {name: plan for group, plan in plans for name in group.layer_names}
        return self.plans[rows]

    def _draw(self, logits: Float[Tensor, "R V_theta"], at: Int[Tensor, " R"], step: int) -> Int[Tensor, " R"]:
        """Draw one draft of each row, and note the logits over temperature that it was drawn from.

        Symptom: on vLLM 0.26 to 0.28 a speculator's tokens are not the target's, by 13 standard deviations.
        Cause: a draft and the draw that replaces it share their noise, so that the two are not independent.
        Safe: a draft's noise is that of a position which no token has.
        Upstream: vLLM issues 47386 and 54282, fixed in 0.29.
        Delete when: vLLM 0.26 is no longer accepted.
        """
        draw: Any = gumbel_sample  # 0.31 names its arguments otherwise
        return draw(
            finite(logits[:, : self.draft_logits.shape[-1]]),
            self.idx_mapping[: len(logits)],
            self.temperature,
            self.seeds,
            at + SALT,
            apply_temperature=True,
            output_processed_logits=self.draft_logits[:, step],
            use_fp64=self.use_fp64_gumbel,
        )

    def _take_memory(self) -> None:
        """Hold for a moment what the rows of a verification take: vLLM measures one row of logits a request."""
        both = 2 * self.max_num_reqs * (self.num_speculative_steps + 1)
        held = torch.empty(both, self.vocab_size, dtype=self.dtype, device=self.device)
        held_too = torch.empty(2 * self.max_num_reqs, self.vocab_size, device=self.device)  # as many are verified
        del held, held_too


def tell_counts() -> None:
    """Let the speculator know how many tokens a step's requests are to be drafted. May be called any number of times.

    Symptom: a step in which the scheduler wants fewer drafts, or none, drafts all.
    Cause: the runner is told the number with each step, and does not pass it on to its speculator.
    Safe: the number is set before the step runs that it came with; other speculators have no use for it.
    Upstream: `propose` gets it as an argument since 0.28.
    Delete when: vLLM 0.26 is no longer accepted.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    execute = GPUModelRunner.execute_model
    if execute.__module__ == __name__:
        return

    @wraps(execute, assigned=("__name__", "__doc__"))
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.speculator, ThetaSpeculator):
            self.speculator.count = scheduler_output.num_spec_tokens_to_schedule
        return execute(self, scheduler_output, *args, **kwargs)

    setattr(GPUModelRunner, execute_model.__name__, execute_model)
