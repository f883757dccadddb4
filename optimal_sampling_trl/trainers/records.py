"""The records of a batch's rollouts, as tensors beside TRL's padded completions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..rollouts.rollout import RECORDS, Rollout


def stack_records(rollouts: Sequence[Rollout], completion_ids: Tensor) -> dict[str, Tensor]:
    """Stack the records of rollouts beside TRL's padded `completion_ids` (B, T).

    Returns:
        each of `RECORDS` as (B, T), 0 on padding, and `mixture_rows` (B,), True where the mixture sampled.

    Raises:
        RuntimeError: where TRL's completions are not those of the rollouts.
    """
    B, T = completion_ids.shape
    if len(rollouts) != B:
        raise RuntimeError(f"The batch has {B} completions, but {len(rollouts)} were sampled for it.")
    records, sampled = torch.zeros(len(RECORDS), B, T), completion_ids.tolist()
    for row, rollout in enumerate(rollouts):
        length = len(rollout.completion_ids)
        if sampled[row][:length] != rollout.completion_ids:
            raise RuntimeError(
                f"Completion {row} of the batch is not the one that was sampled for it, so its record does not belong "
                "to it. Does a subclass or a callback of the trainer change completions?"
            )
        records[:, row, :length] = torch.stack([getattr(rollout, name) for name in RECORDS])
    mixed = torch.tensor([not rollout.mixture.is_theta_only for rollout in rollouts])
    stacked = dict(zip(RECORDS, records.unbind(0), strict=True)) | {"mixture_rows": mixed}
    return {name: tensor.to(completion_ids.device) for name, tensor in stacked.items()}
