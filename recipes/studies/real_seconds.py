"""Seconds of the arms of real text, each alone on a card, and the columns of the tables that they give."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

from horizon_report import short, spread
from real_cells import Column, equal, is_cut
from runs import Line, read_runs

TIMED = "real_seconds"
"""File of the runs that were timed, by call; their student is the teacher, so that completions are long."""
REFERENCE = "RAFT, mixture"
"""The arm that every call times, since machines differ."""


def alone(line: Line) -> float:
    """Seconds for 64 completions of a run, the median over the spans between its measurements without the first."""
    spans = [(after[2] - before[2]) / (after[0] - before[0]) for before, after in pairwise(line["points"][1:])]
    return 64 * median(spans)


def seconds_of(results: Path, task: str) -> dict[str, float]:
    """Seconds for 64 completions of each arm of a task; a later call's are put on the first one's scale.

    They are multiplied by what the reference took in the first call over what it took in theirs.

    Args:
        results: the folder of the stored runs.
    """
    calls: dict[int, dict[str, float]] = {}
    for line in read_runs(results / f"{TIMED}.jsonl"):
        if line["task"] == task:
            calls.setdefault(line["call"], {})[line["arm"]] = alone(line)
    found: dict[str, float] = {}
    for _, here in sorted(calls.items()):
        scale = found[REFERENCE] / here[REFERENCE] if found else 1.0
        found = {arm: scale * seconds for arm, seconds in here.items()} | found
    return found


def timed(results: Path, task: str, lines: Sequence[Line]) -> dict[str, Column]:
    """The seconds of each arm, and its right answers when the quickest has ended; none where no arm was timed."""
    arms = {line["arm"] for line in lines}
    seconds = {arm: seconds for arm, seconds in seconds_of(results, task).items() if arm in arms}

    def span(runs: list[Line]) -> str:
        return f"{seconds[runs[0]['arm']]:.2f}" if runs[0]["arm"] in seconds else "–"

    def end(runs: list[Line]) -> str:
        if runs[0]["arm"] not in seconds:
            return "–"
        share = min(seconds.values()) / seconds[runs[0]["arm"]]
        return "cut" if is_cut(runs) else short(spread(equal(runs, share)))

    return {"s for 64 completions": span, "at equal seconds": end} if seconds else {}
