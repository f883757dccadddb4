"""The mixture before the rejection sampler of Model Runner V2, which verifies the student's drafts.

A step of B requests with k drafts each has B·(k + 1) rows of logits. Mixing and verifying hold several copies of a row
in float32, so that whole requests are taken at a time, no more rows than a step without drafts may have: the memory is
then that of an engine without speculation, which vLLM measures when it starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.v1.outputs import LogprobsTensors

from .slot_sampler import SlotSampler


class SlotRejection:
    """Stands before vLLM's rejection sampler, and has it verify drafts against the mixture.

    Args:
        base: vLLM's rejection sampler, over vLLM's own sampler.
        slots: the sampler of steps without drafts.
    """

    def __init__(self, base: Any, slots: SlotSampler) -> None:
        self.base, self.slots = base, slots

    def __call__(self, logits: Tensor, batch: Any, draft_logits: Tensor | None = None) -> Any:
        """Return what vLLM's rejection sampler returns, drawn from the mixture.

        Args:
            logits: the teacher's, a row for each draft and one more for each request.
            batch: the step's requests.
            draft_logits: what the drafts were drawn from, by slot.
        """
        theta, cuts = self.slots.model.theta_logits, list(whole_requests(batch, len(self.slots.table)))
        parts = [self._verify(theta[rows], logits[rows], part, draft_logits) for rows, part in cuts]
        return parts[0] if len(parts) == 1 else join(parts, batch.cu_num_logits_np)

    def _verify(self, theta: Tensor, logits: Tensor, batch: Any, draft_logits: Tensor | None) -> Any:
        slots_np = np.repeat(batch.idx_mapping_np, np.diff(batch.cu_num_logits_np))
        step = self.slots.mix(theta, logits, batch.expanded_idx_mapping, slots_np)
        return self.slots.record(self.base(step.mixed.logits, batch, draft_logits), step)


def whole_requests(batch: Any, most: int) -> Iterator[tuple[slice, Any]]:
    """Cut a step into parts of whole requests, each with the rows of its logits.

    Args:
        batch: the step's requests.
        most: rows of logits in a part, unless one request has more.
    """
    ends = batch.cu_num_logits_np
    first, count = 0, len(ends) - 1
    while first < count:
        fitting = int(np.searchsorted(ends, ends[first] + most, side="right")) - 1
        last = min(max(fitting, first + 1), count)
        yield slice(int(ends[first]), int(ends[last])), _part(batch, first, last)
        first = last


def _part(batch: Any, first: int, last: int) -> Any:
    """Return the requests from `first` to `last` as a step of their own, in all that the sampler reads of a step."""
    ends = batch.cu_num_logits_np
    start, requests, rows = int(ends[first]), slice(first, last), slice(int(ends[first]), int(ends[last]))
    of_requests = {name: getattr(batch, name)[requests] for name in ("idx_mapping", "idx_mapping_np", "seq_lens")}
    names = ("expanded_idx_mapping", "expanded_local_pos", "logits_indices")
    return replace(
        batch,
        num_reqs=last - first,
        cu_num_logits=batch.cu_num_logits[first : last + 1] - start,
        cu_num_logits_np=ends[first : last + 1] - start,
        **of_requests,
        **{name: getattr(batch, name)[rows] for name in names},
    )


def join(parts: Sequence[Any], ends: np.ndarray) -> Any:
    """Return what the sampler returned of the parts of a step as what it would have returned of the step.

    Args:
        parts: in their order.
        ends: where the rows of each request begin, and where the last ones end.
    """
    names = ["sampled_token_ids", "num_sampled", "num_rejected"]
    names += [] if parts[0].num_nans is None else ["num_nans"]
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    counts = np.cumsum([0, *(len(part.num_sampled) for part in parts)])
    columns = [part.logprobs_tensors for part in parts]
    return replace(parts[0], logprobs_tensors=_join_columns(columns, np.diff(ends[counts]), ends), **joined)


def _join_columns(
    parts: Sequence[LogprobsTensors | None], counts: np.ndarray, ends: np.ndarray
) -> LogprobsTensors | None:
    """Return the columns of all parts under each other; a part may have fewer, or none where none was asked for."""
    found = [part for part in parts if part is not None]
    if not found:
        return None

    def under(name: str, fill: Tensor) -> Tensor:
        width = max(getattr(part, name).shape[1] for part in found)
        blocks = [fill.new_zeros(count, 1) if one is None else getattr(one, name) for one, count in zip(parts, counts)]
        return torch.cat([nn.functional.pad(block, (0, width - block.shape[1])) for block in blocks])

    ids, values, ranks = found[0][:3]
    ranks = torch.cat(
        [ranks.new_zeros(count) if one is None else one.selected_token_ranks for one, count in zip(parts, counts)]
    )
    return LogprobsTensors(under("logprob_token_ids", ids), under("logprobs", values), ranks, ends.tolist())
