"""Dense records in the worker: measured before vLLM's sampler changes the logits, written behind the records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from vllm.v1.outputs import LogprobsTensors

from ....mixture.dense import measure
from ....rollouts.dense import Dense
from ..wire import NO_NUMBER, RECORD_COLUMNS, dense_ids
from .records import Mixed


class Group(NamedTuple):
    """Hold the rows of a batch that ask for the same dense records, as a tensor on the device."""

    dense: Dense
    rows: Int[Tensor, " R"]


class Columns(NamedTuple):
    """Hold the columns of a group: C for each of its R rows."""

    rows: Int[Tensor, " R"]
    ids: Int[Tensor, "R C"]
    values: Float[Tensor, "R C"]


def group_rows(asked: Sequence[Dense | None], device: torch.device) -> list[Group]:
    """Group the rows of a batch by what they ask for. Does not wait for a GPU."""
    groups: dict[Dense, list[int]] = {}
    for row, dense in enumerate(asked):
        if dense is not None:
            groups.setdefault(dense, []).append(row)
    return [Group(dense, _to_device(torch.tensor(rows), device)) for dense, rows in groups.items()]


def _to_device(rows: Tensor, device: torch.device) -> Tensor:
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)


def measure_groups(mixed: Mixed, groups: Sequence[Group]) -> list[Columns]:
    """Measure the rows of a step that ask for it. Call this before vLLM's sampler, which may write into the logits."""
    return [Columns(rows, *_measure_rows(mixed, dense, rows)) for dense, rows in groups]


def _measure_rows(
    mixed: Mixed, dense: Dense, rows: Int[Tensor, " R"]
) -> tuple[Int[Tensor, "R C"], Float[Tensor, "R C"]]:
    """Return the ids and the numbers of the columns of a few rows."""
    temperature = 1.0 if mixed.temperature is None else mixed.temperature
    logits, ending = (mixed.theta, mixed.teacher, mixed.logits), mixed.ending
    scalars, ids, *log_probabilities = measure(
        *logits, temperature, dense.scalars, dense.top_k, rows, ending.stop, ending.folded
    )
    values = torch.cat([-scalars, *log_probabilities], 1)
    values = values.nan_to_num(nan=NO_NUMBER, posinf=torch.inf, neginf=-torch.inf)
    return dense_ids(ids, scalars.shape[1], mixed.logits.shape[1]), values


def with_dense(columns: LogprobsTensors, measured: Sequence[Columns]) -> LogprobsTensors:
    """Return the log-probabilities of a step with dense records behind the records that `with_records` wrote."""
    first = 1 + RECORD_COLUMNS
    width = max(columns.logprobs.shape[1], *(first + one.ids.shape[1] for one in measured))
    missing = (0, width - columns.logprobs.shape[1])
    ids = nn.functional.pad(columns.logprob_token_ids.long(), missing)
    values = nn.functional.pad(columns.logprobs, missing)
    for one in measured:
        part = slice(first, first + one.ids.shape[1])
        ids[:, part].index_copy_(0, one.rows, one.ids)
        values[:, part].index_copy_(0, one.rows, one.values)
    return columns._replace(logprob_token_ids=ids, logprobs=values)
