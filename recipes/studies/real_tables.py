# /// script
# dependencies = ["optimal-sampling-trl"]
# ///
"""Draw the tables of real text in the documents from the stored runs.

    python recipes/studies/real_tables.py

`TABLES` says which page holds each; a test holds the pages against it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import hypot, inf
from pathlib import Path
from statistics import mean
from typing import NamedTuple

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

from horizon_report import spread
from informed_arms import STUDY
from presets_report import error
from real_text_report import RIGHT, gain, shown_right
from runs import Line, by_rate, one_each, read_runs

RESULTS = Path(__file__).parent / "results"
SECONDS = "presets_real_seconds"
"""File of the seconds of each arm's update, alone on a card."""
EARLY = 14_400
"""Completions at which the published mixtures are compared early: the last measurement is after 224 updates or 240."""
WHOLE = 0.97
"""Share of the updates that a run has to make to count in a mean."""
Column = Callable[[list[Line]], str]
"""A cell for the runs of an arm at one rate."""


def stored(name: str, **place: str | int) -> list[Line]:
    """The runs of a file at a place, one of each."""
    lines = read_runs(RESULTS / f"{name}.jsonl")
    return one_each(line for line in lines if all(line[key] == value for key, value in place.items()))


def usual(lines: Sequence[Line], arm: str) -> list[Line]:
    """The runs of an arm at the rate that most seeds were run at, by seed."""
    return sorted(max(by_rate(lines, arm), key=len), key=lambda line: line["seed"])


def whole(runs: list[Line]) -> list[Line]:
    """Those that made their updates; all where none did."""
    return [line for line in runs if line["done"] >= WHOLE * line["steps"]] or runs


def table(lines: Sequence[Line], columns: dict[str, Column]) -> Iterator[str]:
    """A row for each arm at its usual rate, the best end first; arms with cut runs alone are last."""
    yield "| arm | " + " | ".join(columns) + " |"
    yield "|---" * (1 + len(columns)) + "|"
    rows = {arm: usual(lines, arm) for arm in dict.fromkeys(line["arm"] for line in lines)}
    for arm, runs in sorted(rows.items(), key=lambda row: (_is_cut(row[1]), -_end(row[1]))):
        yield f"| {arm} | " + " | ".join(column(runs) for column in columns.values()) + " |"


def _is_cut(runs: list[Line]) -> bool:
    return whole(runs)[0]["done"] < WHOLE * runs[0]["steps"]


def _end(runs: list[Line]) -> float:
    return mean(line["right"] for line in whole(runs))


def short(text: str) -> str:
    """Shares without the 0 before the point, and a minus as it is written."""
    return re.sub(r"(?<!\d)0(?=\.\d{3})", "", text).replace("-.", "−.")


def rate(runs: list[Line]) -> str:
    """The learning rate."""
    return f"{runs[0]['learning_rate']:.1e}".replace(".0e", "e").replace("e-0", "e-")


def by_seed(runs: list[Line], completions: float, seeds: Sequence[int]) -> str:
    """Right answers of each seed; the updates in brackets where a run was cut before."""
    of = {line["seed"]: shown_right(line, completions) for line in runs if "points" in line or completions == inf}
    return short(", ".join(of.get(seed, "–") for seed in seeds))


def end(runs: list[Line]) -> str:
    """Right answers at the end, the mean over seeds; "cut" where no run was whole."""
    return "cut" if _is_cut(runs) else short(spread([line["right"] for line in whole(runs)]))


def average(runs: list[Line], name: str) -> str:
    """The mean over seeds of another measurement at the end."""
    return short(f"{mean(line[name] for line in whole(runs)):.3f}")


def of_teacher(runs: list[Line], name: str = "right") -> str:
    """The range of a share of the teacher, as it was measured at the end of each run."""
    shares = [line["of_teacher"][name] for line in runs]
    low, high = min(shares), max(shares)
    return short(f"{low:.3f}" if high - low < 5e-4 else f"{low:.3f} to {high:.3f}")


def ends(lines: Sequence[Line]) -> Iterator[str]:
    """The end of each arm at a place."""
    seeds = sorted({line["seed"] for line in lines})
    of_seeds = partial(by_seed, completions=inf, seeds=seeds)
    columns: dict[str, Column] = {"rate": rate, f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}": of_seeds}
    columns |= {"mean": end, "greedy": partial(average, name="greedy"), "pass@8": partial(average, name="any_right")}
    columns |= {"KL(θ‖t)": partial(average, name="divergence"), "its teacher": of_teacher}
    return table(lines, columns)


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
        "greedy": partial(average, name="greedy"),
        "pass@8": partial(average, name="any_right"),
    }
    alone = {line["arm"]: line["seconds"] for line in read_runs(RESULTS / f"{SECONDS}.jsonl")}
    if alone:
        quickest = min(alone.values())
        columns["s an update"] = lambda runs: f"{alone[runs[0]['arm']]:.2f}"
        columns["at equal seconds"] = lambda runs: short(spread(equal(runs, quickest / alone[runs[0]["arm"]])))
    return table(lines, columns)


def equal(runs: list[Line], share: float) -> list[float]:
    """Right answers of each run after a share of its updates, on a line between its measurements."""
    found = []
    for line in whole(runs):
        at, points = share * line["steps"] * line["points"][-1][0] / line["done"], line["points"]
        after = next((i for i, point in enumerate(points) if point[0] >= at), len(points) - 1)
        (x0, y0), (x1, y1) = ((point[0], point[RIGHT]) for point in points[max(after - 1, 0) : after + 1][-2:])
        found.append(y0 + (y1 - y0) * min((at - x0) / (x1 - x0), 1.0))
    return found


def rates(lines: Sequence[Line], seed: int = 0) -> Iterator[str]:
    """One seed of each arm at each rate that it was run at, in brackets the highest on the way."""
    of_seed = [line for line in lines if line["seed"] == seed]
    yield "| arm | a third | usual | threefold |"
    yield "|---|---|---|---|"
    for arm in dict.fromkeys(line["arm"] for line in lines):
        base, runs = usual(lines, arm)[0]["learning_rate"], by_rate(of_seed, arm)
        found = {line["learning_rate"] / base: line for ((line),) in runs}
        cells = []
        for factor in (1 / 3, 1.0, 3.0):
            line = next((line for ratio, line in found.items() if abs(ratio / factor - 1) < 0.01), None)
            cells.append("–" if line is None else short(f"{shown_right(line, inf)} [{highest(line):.3f}]"))
        if len(found) > 1:
            yield f"| {arm} | " + " | ".join(cells) + " |"


def highest(line: Line) -> float:
    """The highest share of right answers that a run measured."""
    return max(line["right"], *(point[RIGHT] for point in line["points"]))


def informed(student: str) -> Iterator[str]:
    """The student as its own teacher: ends, and what they are above GRPO's."""
    lines = stored("informed", task="sums", student=student)
    counted = [line for arm in dict.fromkeys(line["arm"] for line in lines) for line in whole(usual(lines, arm))]
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
        "greedy": partial(average, name="greedy"),
        "pass@8": partial(average, name="any_right"),
        "above GRPO": above,
        "highest on the way": lambda runs: short(", ".join(f"{highest(line):.3f}" for line in runs)),
        "teacher at the end": of_teacher,
    })  # fmt: skip


TEACHERS = {"self": "as it is", "start": "as at the start", "separate": "separate"}


class Table(NamedTuple):
    """A table of a page below the repository's root."""

    page: str
    rows: Callable[[], Iterator[str]]


def place(task: str, student: str) -> Iterator[str]:
    """The arms of real_text.py at 340 updates."""
    return ends(stored("real_text", task=task, student=student, steps=340))


STUDIES, PRESETS = "recipes/studies/README.md", "docs/presets.md"
TABLES = {
    "presets": Table(PRESETS, presets),
    "rates of presets": Table(PRESETS, lambda: rates(stored("presets_real"))),
    "steps, whole": Table(STUDIES, partial(place, "steps", "whole")),
    "sums, pruned": Table(STUDIES, partial(place, "sums", "pruned")),
    "steps, pruned": Table(STUDIES, partial(place, "steps", "pruned")),
    "dense records": Table(STUDIES, lambda: ends(stored("dense_real", steps=240))),
    "informed, whole": Table(STUDIES, partial(informed, "whole")),
    "informed, pruned": Table(STUDIES, partial(informed, "pruned")),
    "rates of informed": Table(STUDIES, lambda: rates(stored("informed", student="whole"))),
}


def main() -> None:
    """Print all of them that have a run."""
    for name, drawn in TABLES.items():
        if len(rows := list(drawn.rows())) > 2:
            print(f"### {name}, of {drawn.page}", *rows, "", sep="\n")


if __name__ == "__main__":
    main()
