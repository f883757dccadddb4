"""A model of the time of an update and of a step's memory: two constants of the time, fitted to measured updates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from decoding import ShapePair, pair_of
from memory import ENGINE_GB, GB, stored
from training_tables import STORED, size_of

GIB = 2**30
COMPLETIONS, PROMPT = 64, 128
"""Of a measured step."""


class Rate(NamedTuple):
    """Seconds of a forward and backward pass whatever is in it, and of each operation."""

    a_pass: float
    operation: float


class Update(NamedTuple):
    """A measured step: its arm, the sizes of the models, what is trained on, and the seconds and GiB that it took."""

    arm: str
    teacher: str
    student: str
    tokens: int
    micro_batch: int
    seconds: float
    gib: float

    @property
    def pair(self) -> ShapePair:
        """Its models."""
        return pair_of(self.teacher, self.student)


def measured() -> list[Update]:
    """Read the measured steps of this package whose trainer holds no teacher, those of a size together."""
    tables = json.loads(STORED.read_text())["tables"]
    found = []
    for table in tables.values():
        size, micro_batch = size_of(table["command"])
        rows = table["arms"].items() if table.get("fitted", True) else ()
        kept = ((arm, row) for arm, row in rows if not arm.startswith(("TRL", "divergence")))
        found += [Update(arm, *size, micro_batch, row["update"], row["GiB"]) for arm, row in kept]
    return sorted(found, key=lambda row: (row.teacher, row.tokens))


def work(pair: ShapePair, tokens: int) -> float:
    """Count the operations of an update: 6 a parameter of the student and token, 2 more for the checkpoints."""
    return 8.0 * stored(pair.student) * tokens


def seconds(pair: ShapePair, completions: int, length: int, micro_batch: int, rate: Rate) -> float:
    """Compute the seconds of an update on one card.

    Args:
        length: tokens of a completion and its prompt.
        micro_batch: completions of a pass.
    """
    passes = math.ceil(completions / micro_batch)
    return passes * rate.a_pass + work(pair, completions * length) * rate.operation


def computed(row: Update, rate: Rate) -> float:
    """Compute the seconds of an update that was measured."""
    return seconds(row.pair, COMPLETIONS, PROMPT + row.tokens, row.micro_batch, rate)


def fit(rows: list[Update]) -> Rate:
    """Fit both constants by least squares of the relative errors."""
    took = torch.tensor([row.seconds for row in rows], dtype=torch.float64)
    columns = torch.tensor(
        [[COMPLETIONS / row.micro_batch, work(row.pair, COMPLETIONS * (PROMPT + row.tokens))] for row in rows],
        dtype=torch.float64,
    )
    scale = columns.amax(dim=0)
    found = torch.linalg.lstsq(columns / scale / took[:, None], torch.ones_like(took)[:, None]).solution[:, 0]
    return Rate(*(found / scale).tolist())


def memory(pair: ShapePair) -> float:
    """Compute GiB of a step on one card without the engine's cache and the trainer's activations."""
    return (pair.weights + 16 * stored(pair.student) / GB + ENGINE_GB) * GB / GIB


def update_table(rate: Rate, rows: list[Update]) -> Iterator[str]:
    """Lines of the table of measured and computed updates and memory."""
    head = ("teacher, student", "tokens", "arm", "update measured, s", "computed, s", "error")
    yield f"| {' | '.join(head)} | memory measured, GiB | computed, GiB |"
    yield "|---|--:|---|--:|--:|--:|--:|--:|"
    for row in rows:
        here, held = computed(row, rate), memory(row.pair)
        name, error = f"{row.teacher}, {row.student}".upper(), round(100 * (here / row.seconds - 1))
        yield (
            f"| {name} | {row.tokens} | {row.arm} | {row.seconds:.2f} | {here:.2f} | {error:+d} % | {row.gib:.1f} "
            f"| {held:.1f} |"
        )
