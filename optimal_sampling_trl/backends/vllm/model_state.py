"""The mixture under Model Runner V2, which vLLM uses on GPUs. NOT YET RUN ON A GPU: written from vLLM's sources.

All but the installation is `sampler.py`'s. V2 numbers requests by slots that stay while a request lives: what a
request asks for is written to arrays on the host when it arrives, and mirrored to the device by vLLM's own buffers, so
that no step waits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from ...mixture import MixtureRows, precision
from ...solver import METHODS
from .sampler import RECORD, Plan, mix_step, mixture_of, with_records

NUMBERS = ("alpha_min", "alpha_max", "fixed_alpha", "epsilon", "temperature")


class OptimalSamplingModelState(DefaultModelState):
    """vLLM's own state of a decoder, with the mixture before its sampler."""

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        """The sampler, and no rejection sampler: a draft model is refused."""
        return SlotSampler(sampler, self.model, self.max_num_reqs), None


class SlotSampler:
    """Stands before the sampler of Model Runner V2; whatever it does not define is that sampler's."""

    def __init__(self, base: Any, model: Any, slots: int) -> None:
        self.base, self.model = base, model
        self.numbers = {name: UvaBackedTensor(slots, dtype=torch.float32) for name in NUMBERS}
        self.method = UvaBackedTensor(slots, dtype=torch.int32)
        self.wanted = UvaBackedTensor(slots, dtype=torch.bool)
        self.masked_np = np.zeros(slots, dtype=bool)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def add_request(self, slot: int, *args: Any) -> None:
        """vLLM's hook for a new request; its parameters come last in every version."""
        self.base.add_request(slot, *args)
        params = args[-1]
        mixture = mixture_of(params.extra_args, self.model.default_mixture)
        for name in NUMBERS[:-1]:
            self.numbers[name].np[slot] = getattr(mixture, name)
        self.numbers["temperature"].np[slot] = params.temperature or 1.0
        self.method.np[slot] = METHODS.index(mixture.method)
        self.wanted.np[slot] = bool((params.extra_args or {}).get(RECORD))
        self.masked_np[slot] = params.structured_outputs is not None
        if self.wanted.np[slot]:  # our columns need none of the likeliest tokens
            self.base.sampling_states.num_logprobs[slot] = 0

    def apply_staged_writes(self) -> None:
        """vLLM's hook before a step."""
        self.base.apply_staged_writes()
        for buffer in (*self.numbers.values(), self.method, self.wanted):
            buffer.copy_to_uva()

    def __call__(self, logits: Tensor, batch: Any) -> Any:
        """What vLLM's sampler returns, drawn from the mixture; `logits` are the teacher's."""
        slots, slots_np = batch.expanded_idx_mapping, batch.idx_mapping_np
        mixed = mix_step(self.model.theta_logits, logits, self._plan(slots, slots_np), self.model.ending)
        output = self.base(mixed.logits, batch)
        if self.wanted.np[slots_np].any():
            output.logprobs_tensors = with_records(
                output.logprobs_tensors, output.sampled_token_ids[:, 0], mixed, self.wanted.gpu[slots][:, None]
            )
        return output

    def _plan(self, slots: Tensor, slots_np: np.ndarray) -> Plan:
        low, high = (self.numbers[name].np[slots_np] for name in ("alpha_min", "alpha_max"))
        methods = self.method.np[slots_np]
        unknown = bool(((low < high) & (methods != METHODS.index("fixed"))).any())
        numbers = [self.numbers[name].gpu[slots].to(precision(slots.device)) for name in NUMBERS]
        present = frozenset(METHODS[index] for index in np.unique(methods))
        rows = MixtureRows(present, self.method.gpu[slots].long(), *numbers[:4])
        known = torch.where(rows.alpha_min == rows.alpha_max, rows.alpha_min, rows.fixed_alpha)
        nothing = slots.new_zeros(0, dtype=torch.int64)
        mask = slots.new_ones((1, 1), dtype=torch.bool) if self.masked_np[slots_np].any() else None
        return Plan(rows, numbers[4], known, None if unknown else nothing, mask)
