"""The mixture before the samplers of Model Runner V2, vLLM's on GPUs, which numbers requests by slots.

A request's settings are written once, when it arrives, into a table on the host. The steps read the table's copy on
the device, so that no step waits for the host.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor

from ....mixture import FIELDS, FORMS, SWAP, Mixture, MixtureRows
from ....mixture.kernels.launch import mix_logits
from ....rollouts.dense import Dense
from ..wire import dense_of, mixture_of, wants_record
from .dense import Group, Packed, group_rows, measure_groups, with_dense
from .grammar import rule_out
from .records import Mixed, with_records

SLOT_COLUMNS = (*FIELDS, "temperature")
"""The columns of the table of slots."""


class MixedSlots(NamedTuple):
    """Hold a step's rows, mixed: their slots, on the device and on the host, and what was measured of them."""

    mixed: Mixed
    slots: Int[Tensor, " N"]
    slots_np: np.ndarray
    measured: list[Packed]


class SlotSampler:
    """Stands before the sampler of Model Runner V2, whose other attributes it shares.

    Args:
        base: vLLM's sampler.
        model: the fused model.
        slots: the most requests at a time.
        device: where the steps run.
    """

    def __init__(self, base: Any, model: Any, slots: int, device: torch.device) -> None:
        self.base, self.model = base, model
        self.staged = UvaBackedTensor((slots, len(SLOT_COLUMNS)), dtype=torch.float32)
        self.staged.np[:] = (*Mixture().numbers(), 1.0)  # vLLM's trial steps read slots without a request
        self.table = torch.empty(slots, len(SLOT_COLUMNS), device=device)
        self.has_changed = True
        self.wanted_np, self.masked_np, self.arithmetic_np = (np.zeros(slots, dtype=bool) for _ in range(3))
        self.swapped_np = np.zeros(slots, dtype=np.int64)
        """K of the slots of `top_k_swap`, 0 of the others."""
        self.dense: list[Dense | None] = [None] * slots
        self.grouped: bytes | None = None
        """The slots of the step that `groups` are of; None where a request has come since."""
        self.groups: list[Group] = []
        self.wanted = UvaBackedTensor(slots, dtype=torch.bool)
        self.copy_table()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def add_request(self, slot: int, *args: Any) -> None:
        """Note a new request's settings. vLLM's hook; the request's parameters come last in every version."""
        self.base.add_request(slot, *args)
        params = args[-1]
        mixture = mixture_of(params.extra_args)
        self.staged.np[slot] = (*mixture.numbers(), params.temperature or 1.0)
        self.wanted.np[slot] = self.wanted_np[slot] = wants_record(params)
        self.masked_np[slot] = params.structured_outputs is not None
        self.arithmetic_np[slot] = mixture.form == "arithmetic"
        self.swapped_np[slot] = mixture.swap_top_k if mixture.method == SWAP else 0
        self.dense[slot] = dense_of(params.extra_args) if self.wanted_np[slot] else None
        self.grouped = None
        if self.wanted_np[slot]:  # a record's columns need none of the likeliest tokens
            self.base.sampling_states.num_logprobs[slot] = 0
        self.has_changed = True

    def apply_staged_writes(self) -> None:
        """Bring to the device what was noted since the last step. vLLM's hook before a step."""
        self.base.apply_staged_writes()
        if self.has_changed:
            self.copy_table()

    def copy_table(self) -> None:
        """Bring the table to the device."""
        self.table.copy_(self.staged.copy_to_uva(), non_blocking=True)
        self.wanted.copy_to_uva()
        self.has_changed = False

    def __call__(self, logits: Tensor, batch: Any) -> Any:
        """Return what vLLM's sampler returns, drawn from the mixture; `logits` are the teacher's."""
        step = self.mix(self.model.theta_logits, logits, batch.expanded_idx_mapping, batch.idx_mapping_np)
        return self.record(self.base(step.mixed.logits, batch), step)

    def mix(
        self, theta: Float[Tensor, "N V_theta"], logits: Float[Tensor, "N V"], slots: Tensor, slots_np: np.ndarray
    ) -> MixedSlots:
        """Mix the rows of a step, and measure those that ask for dense records: the sampler may change the logits.

        Args:
            theta: the student's logits.
            logits: the teacher's.
            slots: the slot of each row.
            slots_np: the same on the host.
        """
        table = self.table[slots]
        forms = FORMS if self.arithmetic_np[slots_np].any() else ("geometric",)
        most_swapped = int(self.swapped_np[slots_np].max(initial=0))
        rows, temperature = MixtureRows.from_table(table[:, :-1], forms, most_swapped), table[:, -1]
        masked = self._masked(slots_np, slots.device)
        if masked is not None:
            theta = rule_out(theta, logits, masked)
        ending = self.model.ending
        found = mix_logits(theta, logits, rows, temperature, ending.stop, ending.folded)
        mixed = Mixed(
            found.logits, found.alpha, theta, logits, found.theta_sum, found.teacher_sum, temperature, ending
        )
        return MixedSlots(mixed, slots, slots_np, measure_groups(mixed, self._groups(slots_np, slots.device)))

    def _groups(self, slots_np: np.ndarray, device: torch.device) -> list[Group]:
        """Group a step's rows by the dense records that they ask for: anew only where the step before had others."""
        if self.grouped != (slots := slots_np.tobytes()):
            self.grouped, self.groups = slots, group_rows([self.dense[slot] for slot in slots_np], device)
        return self.groups

    def record(self, output: Any, step: MixedSlots) -> Any:
        """Return what vLLM's sampler returned of a step, with the records of its tokens."""
        wanted, columns = self.wanted_np[step.slots_np], output.logprobs_tensors
        if wanted.any():
            some = None if wanted.all() else self.wanted.gpu[step.slots][:, None]
            columns = with_records(columns, columns.logprob_token_ids[:, 0], step.mixed, some)
        if step.measured:
            columns = with_dense(columns, step.measured)
        output.logprobs_tensors = columns
        return output

    def _masked(self, slots_np: np.ndarray, device: torch.device) -> Bool[Tensor, "N 1"] | None:
        """Return which rows a grammar masks; None where there are none."""
        masked = self.masked_np[slots_np]
        if not masked.any():
            return None
        return torch.from_numpy(masked)[:, None].pin_memory().to(device, non_blocking=True)
