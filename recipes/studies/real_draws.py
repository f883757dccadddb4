"""Shares of the teachers of real text over all of their draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mode

from horizon_report import short, spread
from runs import Line, read_runs

MEASURED = "real_text", "presets_real", "dense_real", "informed"
"""Files of the runs at whose ends the teachers were measured."""


def draws(results: Path, task: str) -> list[Line]:
    """The shares of the teacher that most runs of a task had, each sampling of it once, cut runs among them.

    The greedy share tells which teacher it is. Runs of one seed and length sample it alike.
    """
    lines = [line for name in MEASURED for line in read_runs(results / f"{name}.jsonl") if line["task"] == task]
    found = [line["of_teacher"] for line in lines if line["of_teacher"]]
    greedy = mode(shares["greedy"] for shares in found)
    return list({(s["right"], s["any_right"]): s for s in found if s["greedy"] == greedy}.values())


def teachers(results: Path) -> Iterator[str]:
    """A row for the teacher of each task."""
    yield "| task | draws | right | lowest to highest | greedy | pass@8 |"
    yield "|---|---|---|---|---|---|"
    for task in ("sums", "steps"):
        found = draws(results, task)
        right, passed = ([shares[name] for shares in found] for name in ("right", "any_right"))
        words = f"{min(right):.3f} to {max(right):.3f} | {found[0]['greedy']:.3f} | {spread(passed)}"
        yield short(f"| {task} | {len(found)} | {spread(right)} | {words} |")
