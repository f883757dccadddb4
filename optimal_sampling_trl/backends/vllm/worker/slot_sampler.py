"""The mixture before the sampler of Model Runner V2, vLLM's on GPUs, which numbers requests by slots.

What a request asks for is written once, when it arrives, into a table on the host whose copy on the device the steps
read: no step waits for the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor

from ....mixture import METHODS
from ....mixture.kernels.launch import mix_logits
from ..wire import RECORD, mixture_of
from .records import Mixed, with_records

COLUMNS = ("method", "alpha_min", "alpha_max", "fixed_alpha", "epsilon", "temperature")
"""The columns of the table of slots, in the order of `mix_logits`' arguments."""


class SlotSampler:
    """Stands before the sampler of Model Runner V2; whatever it does not define is that sampler's.

    Args:
        base: vLLM's sampler.
        model: the fused model.
        slots: most requests at a time.
        device: where the steps run.
    """

    def __init__(self, base: Any, model: Any, slots: int, device: torch.device) -> None:
        self.base, self.model = base, model
        self.staged = UvaBackedTensor((slots, len(COLUMNS)), dtype=torch.float32)
        self.staged.np[:] = (0.0, 0.0, 1.0, 0.5, 0.05, 1.0)  # what vLLM's trial steps read
        self.table = torch.empty(slots, len(COLUMNS), device=device)
        self.has_changed = True
        self.wanted_np, self.masked_np = np.zeros(slots, dtype=bool), np.zeros(slots, dtype=bool)
        self.wanted = UvaBackedTensor(slots, dtype=torch.bool)
        self.apply_own_writes()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def add_request(self, slot: int, *args: Any) -> None:
        """vLLM's hook for a new request; its parameters come last in every version."""
        self.base.add_request(slot, *args)
        params = args[-1]
        mixture = mixture_of(params.extra_args, self.model.default_mixture)
        numbers = [getattr(mixture, name) for name in COLUMNS[1:-1]]
        self.staged.np[slot] = [METHODS.index(mixture.method), *numbers, params.temperature or 1.0]
        self.wanted.np[slot] = self.wanted_np[slot] = bool((params.extra_args or {}).get(RECORD))
        self.masked_np[slot] = params.structured_outputs is not None
        if self.wanted_np[slot]:  # our columns need none of the likeliest tokens
            self.base.sampling_states.num_logprobs[slot] = 0
        self.has_changed = True

    def apply_staged_writes(self) -> None:
        """vLLM's hook before a step."""
        self.base.apply_staged_writes()
        if self.has_changed:
            self.apply_own_writes()

    def apply_own_writes(self) -> None:
        """Bring the table to the device."""
        self.table.copy_(self.staged.copy_to_uva(), non_blocking=True)
        self.wanted.copy_to_uva()
        self.has_changed = False

    def __call__(self, logits: Tensor, batch: Any) -> Any:
        """What vLLM's sampler returns, drawn from the mixture; `logits` are the teacher's."""
        slots, slots_np = batch.expanded_idx_mapping, batch.idx_mapping_np
        method, low, high, fixed, epsilon, temperature = self.table[slots].unbind(1)
        masked = self._masked(slots_np, slots.device)
        theta, ending = self.model.theta_logits, self.model.ending
        mixed = mix_logits(
            theta, logits, method, low, high, fixed, epsilon, temperature, masked, ending.stop, ending.folded
        )
        step = Mixed(mixed.logits, mixed.alpha, theta, logits, mixed.theta_sum, mixed.teacher_sum, temperature, ending)
        output = self.base(step.logits, batch)
        wanted = self.wanted_np[slots_np]
        if wanted.any():
            rows = None if wanted.all() else self.wanted.gpu[slots][:, None]
            output.logprobs_tensors = with_records(output.logprobs_tensors, output.sampled_token_ids[:, 0], step, rows)
        return output

    def _masked(self, slots_np: np.ndarray, device: torch.device) -> Tensor | None:
        """The rows whose logits a grammar masks; None where there are none."""
        masked = self.masked_np[slots_np]
        return torch.from_numpy(masked).pin_memory().to(device, non_blocking=True) if masked.any() else None
