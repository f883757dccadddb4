"""The main effects of past_the_teacher.py's design, with what the seeds say of their noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import hypot
from statistics import mean

from horizon_report import best, end, error, short
from past_the_teacher_arms import DENSE, FACTORIAL, ROLLOUTS
from past_the_teacher_cells import head
from runs import Line

Cell = list[float]
"""The ends of the seeds of an arm at its best rate."""


def effects(lines: list[Line]) -> dict[tuple[str, str], list[Cell]]:
    """The factorial's cells by factor and level, of GRPO and RAFT alone, which have all cells."""
    cells = {arm: [*map(end, seeds)] for arm in FACTORIAL if (seeds := best(lines, arm))}
    full = {arm: cell for arm, cell in cells.items() if not arm.startswith("Distillation")}
    levels = {"loss": ("GRPO", "RAFT"), "dense": tuple(DENSE), "rollouts": tuple(ROLLOUTS)}
    found = {
        (factor, level.strip(" +") or "none"): [cell for arm, cell in full.items() if _levels(arm)[factor] == level]
        for factor, names in levels.items()
        for level in names
    }
    return {level: cells for level, cells in found.items() if cells}


def _levels(arm: str) -> dict[str, str]:
    """The levels of a cell's factors, by its name."""
    method, _, rest = arm.partition(", ")
    rollouts, plus, dense = rest.partition(" + ")
    return {"loss": method, "rollouts": rollouts, "dense": plus + dense}


def over_cells(cells: Sequence[Cell]) -> str:
    """The mean over cells, with its standard error over the seeds of each."""
    return short(f"{mean(map(mean, cells)):.3f} ± {hypot(*map(error, cells)) / len(cells):.3f}")


def main_effects(columns: Mapping[str, list[Line]]) -> Iterator[str]:
    """The mean end over all cells that share a level, a column for each place that has all cells."""
    found = {words: effects(lines) for words, lines in columns.items()}
    yield from head("factor", "level", "cells", *found)
    for (factor, level), cells in next(iter(found.values())).items():
        means = (over_cells(cells_of[factor, level]) for cells_of in found.values())
        yield f"| {factor} | {level} | {len(cells)} | " + " | ".join(means) + " |"
