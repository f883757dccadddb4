"""The records of a batch's rollouts, as tensors beside TRL's padded completions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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


def stack_dense(rollouts: Sequence[Rollout], completion_ids: Tensor) -> dict[str, Tensor]:
    """Stack the dense records of rollouts beside TRL's padded `completion_ids` (B, T).

    Returns:
        `dense_ids` and `dense_log_teacher`, (B, T, K), where K tokens were asked for, and each scalar as
        `dense_<name>` (B, T); 0 on padding.

    Raises:
        RuntimeError: where a rollout has no dense records, or has others.
    """
    records = [rollout.dense for rollout in rollouts if rollout.dense is not None]
    if len(records) != len(rollouts) or len({(*one.scalars, one.ids.shape[1]) for one in records}) > 1:
        raise RuntimeError(
            f"Of the batch's {len(rollouts)} rollouts {len(records)} have dense records, or they differ in what they "
            "record; all were asked for the same. Does a server of another version sample them?"
        )
    columns = {f"dense_{name}": [one.scalars[name] for one in records] for name in records[0].scalars}
    if records[0].ids.shape[1]:
        columns |= {
            "dense_ids": [one.ids for one in records],
            "dense_log_teacher": [one.log_teacher for one in records],
        }
    T, device = completion_ids.shape[1], completion_ids.device
    stacked = {name: pad_sequence(rows, batch_first=True) for name, rows in columns.items()}
    return {name: _padded(rows, T).to(device) for name, rows in stacked.items()}


def _padded(rows: Tensor, length: int) -> Tensor:
    """Rows (B, T, ...) with zeros up to a `length` that TRL padded to."""
    return torch.cat([rows, rows.new_zeros(len(rows), length - rows.shape[1], *rows.shape[2:])], dim=1)
