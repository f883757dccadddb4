"""The arms of real text that the README shows, and its table: where each ends on both tasks, with both students."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean

from horizon_report import MEASURES, error
from real_cells import chosen, whole
from real_draws import draws
from runs import Line

ARMS = {
    "RAFT, mixture + dense 1 faded": "RAFT + dense term that fades",
    "RAFT, mixture": "RAFT",
    "Distillation": "distillation",
    "GRPO, half mixture": "GRPO, half mixture",
    "GRPO": "GRPO without a teacher",
}
"""Its arms, as it calls them."""
TITLES = {"sums": "Sums of two numbers", "steps": "Sums of four, with running totals"}
"""Its tasks."""
STUDENTS = {"whole": "", "pruned": ", a third of the layers cut"}
UPDATES, LONGER = 340, 1020
"""Of a run, and of the longer runs of the steps."""
LENGTHS = {UPDATES: "", LONGER: ", three times the updates"}
RUNS = (("sums", UPDATES), ("steps", UPDATES), ("steps", LONGER))
"""Tasks and updates that each student ran."""
PLACES = [(task, student, updates) for student in STUDENTS for task, updates in RUNS]
"""Tasks, students and updates, a row each."""


def ends_by_place(runs_of: Callable[[str, str, int], Sequence[Line]], results: Path) -> Iterator[str]:
    """A row for each place: the teacher, and right answers of each arm at the end, in per cent.

    Args:
        runs_of: the runs of a task and a student with that many updates.
        results: the folder of the stored runs, whose draws of the teachers are read.
    """
    yield f"| right at the end, % | teacher, {' | '.join(MEASURES.values())} | {' | '.join(ARMS.values())} |"
    yield "|---" + "|--:" * (len(MEASURES) + len(ARMS)) + "|"
    for task, student, updates in PLACES:
        found, lines = draws(results, task), runs_of(task, student, updates)
        title = TITLES[task] + STUDENTS[student] + LENGTHS[updates]
        teacher = (f"{100 * mean(shares[name] for shares in found):.1f}" for name in MEASURES)
        yield f"| {' | '.join((title, *teacher, *(end(lines, arm) for arm in ARMS)))} |"


def end(lines: Sequence[Line], arm: str) -> str:
    """Right answers of an arm at the end in per cent, mean ± standard error over its whole seeds, or over cut ones."""
    if all(line["arm"] != arm for line in lines):
        return "–"
    shares = [100 * line["right"] for line in whole(chosen(lines, arm))]
    return f"{mean(shares):.1f}" + (f" ± {error(shares):.1f}" if len(shares) > 1 else "")
