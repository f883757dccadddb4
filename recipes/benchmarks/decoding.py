"""A model of the time of a decoding step: three constants, fitted to measured steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch

from memory import CARDS, GB, stored
from random_pair import SHAPES, Shape

CARD = CARDS["80 GB (H100 SXM)"].memory
MEASURED = Path(__file__).parent / "results" / "rollouts.json"
MORE = SHAPES | {
    "8b": Shape(4096, 32, 14336, 32, 8, 128256),
    "32b": Shape(5120, 64, 27648, 40, 8, 152064),
    "70b": Shape(8192, 80, 28672, 64, 8, 128256),
}
"""The sizes of Qwen2.5, and of Llama 3 for 8B and 70B."""
BANDWIDTH = 2.9e12
"""Bytes/s of a large copy on one H100, measured."""
ALL_REDUCE = 20e-6
"""Seconds of one sum over the cards of an engine, two for each layer: an assumption."""


class Speed(NamedTuple):
    """Seconds that a decoding step takes beside reading: of its own, of each row, and of each operation."""

    fixed: float
    row: float
    operation: float


class ShapePair(NamedTuple):
    """A teacher and a student."""

    teacher: Shape
    student: Shape

    @property
    def parameters(self) -> int:
        """Number of those that decoding reads, of both models."""
        return self.teacher.parameters + self.student.parameters

    @property
    def weights(self) -> float:
        """GB of both in bfloat16."""
        return 2 * (stored(self.teacher) + stored(self.student)) / GB

    def reads(self, rows: float, context: float) -> float:
        """Seconds of reading weights and caches once on one card."""
        return 2 * (self.parameters + rows * context * (self.teacher.cached + self.student.cached)) / BANDWIDTH

    def split(self) -> int:
        """The cards of one engine: the least power of two that leaves half of each card to the caches."""
        return next(1 << power for power in count() if self.weights / (1 << power) <= CARD / 2)


def pair_of(teacher: str, student: str) -> ShapePair:
    """Return the pair of two sizes."""
    return ShapePair(MORE[teacher], MORE[student])


class MeasuredStep(NamedTuple):
    """A measured decoding step: the names of teacher and student, rows, ms, and tokens of the prompt and after it.

    One that is not `fitted` checks the model.
    """

    teacher: str
    student: str
    batch: int
    step_ms: float
    prompt: int
    tokens: int
    fitted: bool


def measured() -> list[MeasuredStep]:
    """Read the measured steps."""
    rows = json.loads(MEASURED.read_text())["rows"]
    return [MeasuredStep(**{name: row[name] for name in MeasuredStep._fields}) for row in rows]


def fit(rows: list[MeasuredStep]) -> Speed:
    """Fit what a step takes beside reading, by least squares of the relative errors."""
    rows = [row for row in rows if row.fitted]
    pairs = [pair_of(row.teacher, row.student) for row in rows]
    steps = torch.tensor([row.step_ms / 1e3 for row in rows], dtype=torch.float64)
    reads = torch.tensor(
        [pair.reads(row.batch, row.prompt + row.tokens / 2) for pair, row in zip(pairs, rows)], dtype=torch.float64
    )
    work = [operations(pair, row.batch, row.prompt, row.tokens) for pair, row in zip(pairs, rows)]
    columns = torch.tensor([[1.0, row.batch, each] for row, each in zip(rows, work)], dtype=torch.float64)
    scale = columns.amax(dim=0)
    found = torch.linalg.lstsq(columns / scale / steps[:, None], ((steps - reads) / steps)[:, None]).solution[:, 0]
    return Speed(*(found / scale).tolist())


def operations(pair: ShapePair, rows: int, prompt: int, tokens: int) -> float:
    """Count the operations of a decoding step: those of its rows, and its share of the prompts' tokens."""
    return 2.0 * pair.parameters * rows * (1 + prompt / tokens)


def step(pair: ShapePair, rows: int, prompt: int, tokens: int, speed: Speed, split: int = 1) -> float:
    """Compute the mean seconds of a decoding step of one engine over `split` cards."""
    work = operations(pair, rows, prompt, tokens) * speed.operation
    alone = pair.reads(rows, prompt + tokens / 2) + work
    sums = 2 * (pair.teacher.layers + pair.student.layers) * ALL_REDUCE if split > 1 else 0.0
    return speed.fixed + rows * speed.row + alone / split + sums


def computed(row: MeasuredStep, speed: Speed) -> float:
    """Compute the ms of a step that was measured."""
    return 1e3 * step(pair_of(row.teacher, row.student), row.batch, row.prompt, row.tokens, speed)


def check_table(speed: Speed, rows: list[MeasuredStep]) -> Iterator[str]:
    """Lines of the table of measured and computed steps."""
    yield "| teacher, student | batch | measured, ms | computed, ms | error |"
    yield "|---|--:|--:|--:|--:|"
    for row in rows:
        name, here = f"{row.teacher}, {row.student}".upper(), computed(row, speed)
        name += "" if row.fitted else ", not fitted"
        error = round(100 * (here / row.step_ms - 1))
        yield f"| {name} | {row.batch} | {row.step_ms:.2f} | {here:.2f} | {error:+d} % |"
