"""Dense records in the worker: measured before vLLM's sampler changes the logits, packed behind the records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from vllm.v1.outputs import LogprobsTensors

from ....mixture.dense import measure
from ....rollouts.dense import Dense
from ..wire import RECORD_COLUMNS, pack
from .records import Mixed


class Group(NamedTuple):
    """Hold the rows of a batch that ask for the same dense records, as a tensor on the device."""

    dense: Dense
    rows: Int[Tensor, " R"]


class Packed(NamedTuple):
    """Hold the dense records of a group: C numbers for each of its R rows."""

    rows: Int[Tensor, " R"]
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


def measure_groups(mixed: Mixed, groups: Sequence[Group]) -> list[Packed]:
    """Measure the rows of a step that ask for it. Call this before vLLM's sampler, which may write into the logits."""
    return [Packed(rows, _measure_rows(mixed, dense, rows)) for dense, rows in groups]


def _measure_rows(mixed: Mixed, dense: Dense, rows: Int[Tensor, " R"]) -> Float[Tensor, "R C"]:
    temperature = 1.0 if mixed.temperature is None else mixed.temperature
    logits, ending = (mixed.theta, mixed.teacher, mixed.logits), mixed.ending
    return pack(*measure(*logits, temperature, dense.scalars, dense.top_k, rows, ending.stop, ending.folded))


def with_dense(columns: LogprobsTensors, measured: Sequence[Packed]) -> LogprobsTensors:
    """Return the log-probabilities of a step with dense records behind the records that `with_records` wrote.

    They have no ids: vLLM hands on ids and numbers side by side, and rows of the one may be wider than of the other.
    """
    first, values = 1 + RECORD_COLUMNS, columns.logprobs
    if len(measured[0].rows) == len(values):  # all rows, in their order
        values = torch.cat([values[:, :first], measured[0].values], 1)
    else:
        width = max(values.shape[1], *(first + one.values.shape[1] for one in measured))
        values = nn.functional.pad(values, (0, width - values.shape[1]))
        for one in measured:
            values[:, first : first + one.values.shape[1]].index_copy_(0, one.rows, one.values)
    return columns._replace(logprob_token_ids=columns.logprob_token_ids.long(), logprobs=values)
