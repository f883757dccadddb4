"""The two interactions of past_the_teacher.py's design: rollouts by start, and losses by teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import hypot
from typing import NamedTuple

from horizon_report import short
from past_the_teacher_arms import CORE, MAIN
from past_the_teacher_around import ARMS_AROUND, PLACES_AROUND, about
from past_the_teacher_cells import Summary, at, head, stored, summed
from past_the_teacher_places import AXES, FIRST, OF_MANY, PLACES, QUALITY, STARTS
from stacks import Setting

ROLLOUTS_OF_RAFT, LOSSES = ("RAFT, mixture", "RAFT, own"), ("RAFT, mixture", "Distillation, own")
"""Arms whose difference is an interaction's: by the start, and by the teacher."""


class Interaction(NamedTuple):
    """Two arms of a ladder, and their ends at two levels of an axis, each by the words of its column."""

    arms: tuple[str, str]
    ladder: str
    levels: dict[str, Mapping[str, Summary]]


def interactions() -> Iterator[str]:
    """A row for each: the difference of the two arms at each level, and how far the differences lie apart."""
    yield from head("above", "ladder", "by", "at one end", "at the other", "apart")
    for (one, other), ladder, levels in _interactions():
        gains = [_above(arms[one], arms[other]) for arms in levels.values()]
        (axis, *_), *_ = columns = [words.split() for words in levels]
        cells = [f"{level}: {_show(gain)}" for (*_, level), gain in zip(columns, gains)]
        first, second = gains
        change = _show((first[0] - second[0], hypot(first[1], second[1])))
        yield f"| {one} above {other} | {ladder} | {axis} | {' | '.join(cells)} | {change} |"


def _interactions() -> Iterator[Interaction]:
    by_start = {words: STARTS[words] for words in ("start .0007", "start .058")}
    yield Interaction(ROLLOUTS_OF_RAFT, "first", _arms(FIRST, by_start))
    by_start = {"start .060": MAIN, "start .45": PLACES["start .45"]}
    yield Interaction(ROLLOUTS_OF_RAFT, "second", _arms(AXES, by_start))
    by_teacher = {
        words: MAIN._replace(teacher=QUALITY[words]) for words in ("teacher right .21", "teacher right .997")
    }
    yield Interaction(LOSSES, "first", _arms(FIRST, by_teacher))
    third = {words: about(PLACES_AROUND[words], ARMS_AROUND) for words in ("teacher right .30", "teacher right 1.00")}
    for arms in (LOSSES, ("RAFT, mixture + dense 1, faded", LOSSES[1])):
        yield Interaction(arms, "third", third)
    yield Interaction(LOSSES, "first, many right answers", _arms(FIRST, OF_MANY))


def _arms(name: str, places: Mapping[str, Setting]) -> dict[str, Mapping[str, Summary]]:
    """The core arms of each place of a file."""
    return {words: summed(at(stored(name), place), CORE) for words, place in places.items()}


def _above(one: Summary, other: Summary) -> tuple[float, float]:
    """The difference of two ends, and its standard error."""
    return one.end - other.end, hypot(one.error or 0.0, other.error or 0.0)


def _show(gain: tuple[float, float]) -> str:
    return short(f"{gain[0]:.3f} ± {gain[1]:.3f}")
