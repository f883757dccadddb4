"""The table of the ladder with rates beyond every edge about its first place: other teachers, other verifiers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from past_the_teacher_arms import CORE, FADED, GRADED, GRADUAL, MAIN, NOISY
from past_the_teacher_cells import RESULTS, Summary, at, grid_of, stored, summaries, summed, teacher_rows
from past_the_teacher_rates import THIRD
from runs import read_runs
from stacks import Setting

AROUND = "past_the_teacher_around"
"""The file of the means of its arms, at the places of which no single run was kept."""
TEACHERS: dict[str, dict[str, float]] = json.loads((RESULTS / f"{AROUND}_teachers.json").read_text())
"""The measurements of each teacher of the ladder."""
PLACES_AROUND = {
    "teacher right .30": MAIN._replace(teacher="teacher-20"),
    "teacher right .56": MAIN,
    "teacher right .81": MAIN._replace(teacher="teacher-80"),
    "teacher right 1.00": MAIN._replace(teacher="teacher"),
    "noisy": NOISY,
    "graded": GRADUAL,
}
ARMS_AROUND = (*CORE, *FADED, *GRADED)


def about(place: Setting, arms: Iterable[str]) -> dict[str, Summary]:
    """The summary of each arm at a place of the ladder, from single runs where they are stored."""
    lines = at(stored(THIRD), place)
    return summed(lines, arms) if lines else summaries(at(read_runs(RESULTS / f"{AROUND}.jsonl"), place))


def around() -> Iterator[str]:
    """A row for each arm, a column for each place, the teachers above."""
    columns = {words: about(place, ARMS_AROUND) for words, place in PLACES_AROUND.items()}
    return grid_of(ARMS_AROUND, columns, teacher_rows([TEACHERS[place.teacher] for place in PLACES_AROUND.values()]))
