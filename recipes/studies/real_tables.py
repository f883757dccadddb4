# /// script
# dependencies = ["optimal-sampling-trl[plots]", "matplotlib", "reasoning-gym"]
# ///
"""Draw the tables of real text in the documents from the stored runs.

    python recipes/studies/real_tables.py

`TABLES` says which page holds each; a test holds the pages against it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import hypot, inf
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import NamedTuple

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

from horizon_report import error, short
from informed_arms import STUDY
from real_cells import (
    CLOSING,
    Column,
    above,
    average,
    by_seed,
    chosen,
    end,
    highest,
    is_cut,
    mean_end,
    of_teacher,
    rate,
    whole,
)
from real_draws import draws, teachers
from real_places import LONGER, UPDATES, ends_by_place
from real_rates import rates
from real_seconds import timed
from real_text_report import gain
from runs import Line, one_each, read_runs

RESULTS = Path(__file__).parent / "results"
EARLY, LATE = 14_400, 54_400
"""Completions of an early measurement, after 224 updates or 240, and of the last of all longer runs, after 850."""


def stored(name: str, **place: str | int) -> list[Line]:
    """The runs of a file at a place, one of each."""
    lines = read_runs(RESULTS / f"{name}.jsonl")
    return one_each(line for line in lines if all(line[key] == value for key, value in place.items()))


def table(lines: Sequence[Line], columns: dict[str, Column]) -> Iterator[str]:
    """A row for each arm at its best rate, the best end first; arms with cut runs alone are last."""
    yield "| arm | " + " | ".join(columns) + " |"
    yield "|---" * (1 + len(columns)) + "|"
    rows = {arm: chosen(lines, arm) for arm in dict.fromkeys(line["arm"] for line in lines)}
    for arm, runs in sorted(rows.items(), key=lambda row: (is_cut(row[1]), -mean_end(row[1]))):
        yield f"| {arm} | " + " | ".join(column(runs) for column in columns.values()) + " |"


def ends(lines: Sequence[Line], more: Mapping[str, Column] = MappingProxyType({})) -> Iterator[str]:
    """The end of each arm at a place, and more columns."""
    seeds = sorted({line["seed"] for line in lines})
    of_seeds = partial(by_seed, completions=inf, seeds=seeds)
    columns: dict[str, Column] = {"rate": rate, f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}": of_seeds}
    columns |= {"mean": end} | CLOSING
    columns |= {"KL(θ‖t)": partial(average, name="divergence"), "its teacher": of_teacher}
    return table(lines, columns | dict(more))


def presets() -> Iterator[str]:
    """Published mixtures and our defaults: early, at the end, and at equal seconds where these were measured."""
    lines = stored("presets_real")
    seeds = sorted({line["seed"] for line in lines})
    words = ", ".join(map(str, seeds))
    columns: dict[str, Column] = {
        "rate": rate,
        f"after 224 updates, seeds {words}": partial(by_seed, completions=EARLY, seeds=seeds),
        "at the end": partial(by_seed, completions=inf, seeds=seeds),
        "mean": end,
        "above the teacher": partial(above, teacher=[shares["right"] for shares in draws(RESULTS, "sums")]),
    } | CLOSING
    return table(lines, columns | timed(RESULTS, "sums", lines))


def informed(student: str) -> Iterator[str]:
    """The student as its own teacher: ends, and what they are above GRPO's."""
    lines = stored("informed", task="sums", student=student)
    counted = [line for arm in dict.fromkeys(line["arm"] for line in lines) for line in whole(chosen(lines, arm))]
    seeds = sorted({line["seed"] for line in lines})

    def above(runs: list[Line]) -> str:
        if runs[0]["arm"] == "GRPO":
            return ""
        more, paired, count = gain(counted, runs[0]["arm"], "GRPO")
        if count < 2:
            return short(f"{more:.3f}")
        one, other = ([line["right"] for line in counted if line["arm"] == arm] for arm in (runs[0]["arm"], "GRPO"))
        return short(
            f"{more:.3f} ± {paired:.3f} / {mean(one) - mean(other):.3f} ± {hypot(error(one), error(other)):.3f}"
        )

    return table(lines, {
        "teacher": lambda runs: TEACHERS[STUDY[runs[0]["arm"]].teacher],
        "right at the end": end,
        f"of seeds {', '.join(map(str, seeds))}": partial(by_seed, completions=inf, seeds=seeds),
        **CLOSING,
        "above GRPO": above,
        "highest on the way": lambda runs: short(", ".join(f"{highest(line):.3f}" for line in runs)),
        "teacher at the end": of_teacher,
    })  # fmt: skip


TEACHERS = {"self": "as it is", "start": "as at the start", "separate": "separate"}


class Table(NamedTuple):
    """A table of a page below the repository's root."""

    page: str
    rows: Callable[[], Iterator[str]]


def of_place(task: str, student: str, updates: int = UPDATES) -> list[Line]:
    """The runs of real_text.py with that many updates, and those beside published mixtures."""
    if (task, student) == ("sums", "whole"):
        return stored("presets_real")
    return stored("real_text", task=task, student=student, steps=updates)


def place(task: str, student: str, updates: int = UPDATES) -> Iterator[str]:
    """Their arms."""
    lines = of_place(task, student, updates)
    more: dict[str, Column] = {
        "above the teacher": partial(above, teacher=[one["right"] for one in draws(RESULTS, task)])
    }
    if updates == LONGER:
        more["after 850 updates"] = partial(by_seed, completions=LATE, seeds=sorted({line["seed"] for line in lines}))
    return ends(lines, more | (timed(RESULTS, task, lines) if student == "whole" else {}))


def rates_of(task: str, student: str) -> Iterator[str]:
    """Their rates; the corner tells the places on one page apart."""
    return rates(of_place(task, student), corner=f"{task}, {student}")


STUDIES, PRESETS = "recipes/studies/README.md", "docs/presets.md"
TABLES = {
    "places": Table("README.md", lambda: ends_by_place(of_place, RESULTS)),
    "presets": Table(PRESETS, presets),
    "rates of presets": Table(PRESETS, lambda: rates(stored("presets_real"))),
    "teachers": Table(STUDIES, partial(teachers, RESULTS)),
    "steps, whole": Table(STUDIES, partial(place, "steps", "whole")),
    "rates of steps, whole": Table(STUDIES, partial(rates_of, "steps", "whole")),
    "steps, whole, longer": Table(STUDIES, partial(place, "steps", "whole", LONGER)),
    "sums, pruned": Table(STUDIES, partial(place, "sums", "pruned")),
    "steps, pruned": Table(STUDIES, partial(place, "steps", "pruned")),
    "rates of sums, pruned": Table(STUDIES, partial(rates_of, "sums", "pruned")),
    "rates of steps, pruned": Table(STUDIES, partial(rates_of, "steps", "pruned")),
    "steps, pruned, longer": Table(STUDIES, partial(place, "steps", "pruned", LONGER)),
    "dense records": Table(STUDIES, lambda: ends(stored("dense_real", steps=240))),
    "informed, whole": Table(STUDIES, partial(informed, "whole")),
    "informed, pruned": Table(STUDIES, partial(informed, "pruned")),
    "rates of informed": Table(STUDIES, lambda: rates(stored("informed", student="whole"))),
}


def main() -> None:
    """Print all of them that have a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for name, drawn in TABLES.items():
        if len(rows := list(drawn.rows())) > 2:
            print(f"### {name}, of {drawn.page}", *rows, "", sep="\n")


if __name__ == "__main__":
    main()
