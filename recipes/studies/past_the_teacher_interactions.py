"""The two interactions of past_the_teacher.py's design: rollouts by start, and losses by teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import hypot
from typing import NamedTuple

from horizon_report import short
from past_the_teacher_arms import CORE, MAIN, MANY
from past_the_teacher_around import ARMS_AROUND, PLACES_AROUND, about
from past_the_teacher_cells import Summary, at, head, stored, summed
from runs import Line

ROLLOUTS_OF_RAFT, LOSSES = ("RAFT, mixture", "RAFT, own"), ("RAFT, mixture", "Distillation, own")
"""Arms whose difference is an interaction's: by the start, and by the teacher."""


class Interaction(NamedTuple):
    """Two arms of a ladder, and their ends at two levels of an axis."""

    arms: tuple[str, str]
    ladder: str
    axis: str
    levels: dict[str, Mapping[str, Summary]]


def interactions() -> Iterator[str]:
    """A row for each: the difference of the two arms at each level, and how far the differences lie apart."""
    yield from head("above", "ladder", "by", "at one end", "at the other", "apart")
    for (one, other), ladder, axis, levels in _interactions():
        gains = [_above(arms[one], arms[other]) for arms in levels.values()]
        cells = [f"{level}: {_show(gain)}" for level, gain in zip(levels, gains)]
        first, second = gains
        change = _show((first[0] - second[0], hypot(first[1], second[1])))
        yield f"| {one} above {other} | {ladder} | {axis} | {' | '.join(cells)} | {change} |"


def _interactions() -> Iterator[Interaction]:
    first, axes = stored("past_the_teacher"), stored("past_the_teacher_axes")
    by_start = {".0007": _arms(first, student="student-0"), ".058": _arms(first)}
    yield Interaction(ROLLOUTS_OF_RAFT, "first", "start", by_start)
    by_start = {".060": _arms(axes), ".45": _arms(axes, student="student-40")}
    yield Interaction(ROLLOUTS_OF_RAFT, "second", "start", by_start)
    by_teacher = {".21": _arms(first, teacher="teacher-20"), ".997": _arms(first, teacher="teacher")}
    yield Interaction(LOSSES, "first", "teacher", by_teacher)
    by_teacher = {words: about(PLACES_AROUND[f"teacher right {words}"], ARMS_AROUND) for words in (".30", "1.00")}
    yield Interaction(LOSSES, "third", "teacher", by_teacher)
    yield Interaction(("RAFT, mixture + dense 1, faded", LOSSES[1]), "third", "teacher", by_teacher)
    of_many = {".54": _arms(first, task=MANY.task), ".82": _arms(first, task=MANY.task, teacher="teacher-80")}
    yield Interaction(LOSSES, "first, many right answers", "teacher", of_many)


def _arms(lines: list[Line], **changes: str) -> dict[str, Summary]:
    """The core arms where the main place is changed so."""
    return summed(at(lines, MAIN._replace(**changes)), CORE)  # type: ignore[arg-type]


def _above(one: Summary, other: Summary) -> tuple[float, float]:
    """The difference of two ends, and its standard error."""
    return one.end - other.end, hypot(one.error or 0.0, other.error or 0.0)


def _show(gain: tuple[float, float]) -> str:
    return short(f"{gain[0]:.3f} ± {gain[1]:.3f}")
