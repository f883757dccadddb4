"""The arms of real text that the README shows, and its table: where each ends on both tasks, with both students."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean

from horizon_report import error
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


def ends_by_place(runs_of: Callable[[str, str], Sequence[Line]], results: Path) -> Iterator[str]:
    """A row for each student and task: the teacher, and right answers of each arm at the end, in per cent.

    Args:
        runs_of: the runs of a task and a student.
        results: the folder of the stored runs, whose draws of the teachers are read.
    """
    yield f"| right at the end, % | teacher, sampled | greedy | {' | '.join(ARMS.values())} |"
    yield "|---" + "|--:" * (2 + len(ARMS)) + "|"
    for student, words in STUDENTS.items():
        for task, title in TITLES.items():
            found, lines = draws(results, task), runs_of(task, student)
            teacher = (f"{100 * mean(shares[name] for shares in found):.1f}" for name in ("right", "greedy"))
            yield f"| {' | '.join((title + words, *teacher, *(end(lines, arm) for arm in ARMS)))} |"


def end(lines: Sequence[Line], arm: str) -> str:
    """Right answers of an arm at the end in per cent, mean ± standard error over its whole seeds."""
    shares = [100 * line["right"] for line in whole(chosen(lines, arm))]
    return f"{mean(shares):.1f}" + (f" ± {error(shares):.1f}" if len(shares) > 1 else "")
