"""The dense records of a batch in progress on plain transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...mixture.dense import Measured, measure
from ...rollouts.dense import Dense, DenseRecords
from ...rollouts.request import Request


class _Group(NamedTuple):
    """Hold the places in the batch of the rows that ask for the same, and the requests that they answer."""

    dense: Dense
    places: Int[Tensor, " R"]
    requests: Int[Tensor, " R"]


class DenseRows:
    """Measures the rows whose requests ask for dense records, step by step; the others cost nothing.

    Args:
        requests: one for each row of the batch.
        device: where the logits come from.
    """

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        self.requests, self.device = requests, device
        self.groups: list[_Group] = []
        self.steps: dict[Dense, list[tuple[Tensor, Measured]]] = {}

    def regroup(self, active: Sequence[int]) -> None:
        """Note which request each row of the batch answers from now on."""
        places: dict[Dense, list[int]] = {}
        for place, request in enumerate(active):
            dense = self.requests[request].dense
            if dense is not None:
                places.setdefault(dense, []).append(place)
        requests = torch.tensor(active, dtype=torch.int64, device=self.device)
        grouped = [(dense, torch.tensor(rows, device=self.device)) for dense, rows in places.items()]
        self.groups = [_Group(dense, rows, requests[rows]) for dense, rows in grouped]

    def measure(
        self,
        theta: Float[Tensor, "N V"],
        teacher: Float[Tensor, "N V"],
        mixed: Float[Tensor, "N V"],
        temperature: Float[Tensor, " N"],
    ) -> None:
        """Measure a step; the arguments are those of `mixture.dense.measure`."""
        for dense, places, requests in self.groups:
            measured = measure(theta, teacher, mixed, temperature, dense.scalars, dense.top_k, places)
            self.steps.setdefault(dense, []).append((requests, measured))

    def records(self, lengths: Sequence[int]) -> list[DenseRecords | None]:
        """Return the dense records of the first `lengths[i]` tokens of each request i; None if it asked for none."""
        found: list[DenseRecords | None] = [None] * len(self.requests)
        for dense, steps in self.steps.items():
            owners = torch.cat([requests for requests, _ in steps])
            order = owners.argsort(stable=True)  # a request's steps stay in their order
            columns = [torch.cat(column)[order].cpu() for column in zip(*(step for _, step in steps))]
            start = 0
            for request, count in enumerate(owners.bincount(minlength=len(lengths)).tolist()):
                if count:  # a row that ended may have been measured until it left the batch
                    rows = slice(start, start + lengths[request])
                    found[request] = _to_records(dense, Measured(*(column[rows].clone() for column in columns)))
                start += count
        return found


def _to_records(dense: Dense, measured: Measured) -> DenseRecords:
    scalars = dict(zip(dense.scalars, measured.scalars.T.contiguous().unbind(0), strict=True))
    return DenseRecords(scalars, measured.ids, measured.log_theta, measured.log_teacher)
