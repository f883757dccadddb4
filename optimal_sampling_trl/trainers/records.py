"""The records of a batch's rollouts, as tensors beside TRL's padded completions.

A completion that calls tools has several turns, each a rollout whose prompt is all that the model read before it.
Their records stand where their tokens do, and are 0 on what tools and environments wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..rollouts.dense import DenseRecords
from ..rollouts.rollout import RECORDS, Rollout
from . import columns

Turns = Sequence[Sequence[Rollout]]
"""The rollouts of each completion of a batch, one for each turn."""


def loss_mask(batch: dict[str, Any]) -> Tensor:
    """1 on the tokens (B, T) that are trained on, 0 on padding and on what tools and environments wrote."""
    mask: Tensor = batch["completion_mask"]
    return mask if batch.get("tool_mask") is None else mask * batch["tool_mask"]


def stack_records(turns: Turns, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Stack the records of rollouts beside TRL's padded completions.

    Args:
        turns: of each of B completions.
        batch: TRL's, with `completion_ids` (B, T) and its masks.

    Returns:
        each of `RECORDS` as (B, T), 0 where no token was sampled, and `mixture_rows` (B,), True where the mixture did.

    Raises:
        RuntimeError: where TRL's completions are not those of the rollouts, or a token is trained on that was not
            sampled.
    """
    ids: Tensor = batch["completion_ids"]
    records, is_sampled = torch.zeros(len(RECORDS), *ids.shape), torch.zeros(ids.shape, dtype=torch.bool)
    for row, place, rollout in placed(turns, ids):
        records[:, row, place] = torch.stack([getattr(rollout, name) for name in RECORDS])
        is_sampled[row, place] = True
    _check_sampled(loss_mask(batch).cpu().bool(), is_sampled)
    mixed = torch.tensor([not of_row[0].mixture.is_theta_only for of_row in turns])
    stacked = dict(zip(RECORDS, records.unbind(0), strict=True)) | {columns.MIXTURE_ROWS: mixed}
    return {name: tensor.to(ids.device) for name, tensor in stacked.items()}


def placed(turns: Turns, completion_ids: Tensor) -> Iterator[tuple[int, slice, Rollout]]:
    """Yield each turn with its row and its place among the row's tokens.

    Args:
        turns: of each of B completions.
        completion_ids: TRL's (B, T), padded.

    Raises:
        RuntimeError: where the tokens at a place, or those before it, are not the turn's own.
    """
    if len(turns) != len(completion_ids):
        raise RuntimeError(f"The batch has {len(completion_ids)} completions, but {len(turns)} were sampled for it.")
    for row, (of_row, ids) in enumerate(zip(turns, completion_ids.tolist(), strict=True)):
        if not of_row:
            raise RuntimeError(f"Completion {row} of the batch was not sampled: it has no turn.")
        prompt = of_row[0].theta_prompt_ids
        for turn, rollout in enumerate(of_row):
            start = len(rollout.theta_prompt_ids) - len(prompt)
            place = slice(start, start + len(rollout.completion_ids))
            if rollout.theta_prompt_ids != [*prompt, *ids[:start]] or ids[place] != rollout.completion_ids:
                raise RuntimeError(
                    f"Completion {row} of the batch is not the one that was sampled for it (turn {turn}), so its "
                    "record does not belong to it. Does a subclass or a callback of the trainer change completions?"
                )
            yield row, place, rollout


def _check_sampled(mask: Tensor, is_sampled: Tensor) -> None:
    """Refuse tokens (B, T) that are trained on and have no record."""
    if found := (mask & ~is_sampled).nonzero()[:1].tolist():
        row, place = found[0]
        raise RuntimeError(
            f"Token {place} of completion {row} would be trained on, and no model sampled it; wanted a turn for it, "
            "or 0 in the `env_mask` of `rollout_func`."
        )


def stack_dense(turns: Turns, completion_ids: Tensor, top_k: int) -> dict[str, Tensor]:
    """Stack the dense records of rollouts beside TRL's padded completions.

    Args:
        turns: of each of B completions.
        completion_ids: TRL's (B, T), padded.
        top_k: how many of each model's likeliest tokens the loss reads; a user may have more of them recorded, which
            must not change the loss.

    Returns:
        `dense_ids` and `dense_log_teacher`, (B, T, K), with K twice `top_k` or all that is recorded, where `top_k` is
        above 0, and each scalar as `dense_<name>` (B, T); 0 where no token was sampled.

    Raises:
        RuntimeError: where a rollout has no dense records, or has others.
    """
    rollouts = [rollout for of_row in turns for rollout in of_row]
    records = [rollout.dense for rollout in rollouts if rollout.dense is not None]
    if len(records) != len(rollouts) or len({(*one.scalars, one.ids.shape[1]) for one in records}) > 1:
        raise RuntimeError(
            f"Of the batch's {len(rollouts)} rollouts {len(records)} have dense records, or they differ in what they "
            "record; all were asked for the same. Does a server of another version sample them?"
        )
    shape = completion_ids.shape
    stacked = {name: one.new_zeros(*shape, *one.shape[1:]) for name, one in _columns(records[0], top_k).items()}
    for row, place, rollout in placed(turns, completion_ids):
        assert rollout.dense is not None
        for name, values in _columns(rollout.dense, top_k).items():
            stacked[name][row, place] = values
    return {name: values.to(completion_ids.device) for name, values in stacked.items()}


def _columns(dense: DenseRecords, top_k: int) -> dict[str, Tensor]:
    """Name the dense records of T tokens as a batch has them, each (T,) or (T, K)."""
    named = {columns.dense_scalar(name): values for name, values in dense.scalars.items()}
    if dense.ids.shape[1] and top_k:
        named[columns.DENSE_IDS] = _first(dense.ids, top_k)
        named[columns.DENSE_LOG_TEACHER] = _first(dense.log_teacher, top_k)
    return named


def _first(values: Tensor, top_k: int) -> Tensor:
    """Return the columns of each model's `top_k` likeliest tokens, of a record (T, K) whose halves are in order."""
    return torch.cat([half[:, :top_k] for half in values.chunk(2, 1)], 1)
