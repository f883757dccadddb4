"""Cells of the tables of real text: what an arm's runs at one rate come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import hypot, inf, sqrt
from statistics import mean

from horizon_report import error, short, spread
from real_text_report import RIGHT, shown_right
from runs import Line, by_rate

WHOLE = 0.97
"""Share of the updates that a run has to make to count in a mean."""
QUESTIONS = 512
"""Of a measurement, a sample of each."""
SEEDS = 3
"""Whole runs with which a rate is as well known as with more."""


def chosen(lines: Sequence[Line], arm: str) -> list[Line]:
    """The runs of an arm at the best of the rates that most of its seeds ended at, by seed; else at the usual rate.

    Three seeds count as much as more. One seed at each of several rates chooses none of them.
    """
    rates = [runs for runs in by_rate(lines, arm) if not is_cut(runs)]
    enough = min(SEEDS, max((len(whole(runs)) for runs in rates), default=0))
    known = [runs for runs in rates if len(whole(runs)) >= enough]
    return sorted(max(known, key=mean_end), key=lambda line: line["seed"]) if enough > 1 else usual(lines, arm)


def usual(lines: Sequence[Line], arm: str) -> list[Line]:
    """The runs of an arm at the rate that most seeds were run at, by seed."""
    return sorted(max(by_rate(lines, arm), key=len), key=lambda line: line["seed"])


def whole(runs: list[Line]) -> list[Line]:
    """Return the runs that made their updates; all where none did."""
    return [line for line in runs if line["done"] >= WHOLE * line["steps"]] or runs


def is_cut(runs: list[Line]) -> bool:
    """Return True where no run made its updates."""
    return whole(runs)[0]["done"] < WHOLE * runs[0]["steps"]


def mean_end(runs: list[Line]) -> float:
    """Right answers at the end, the mean over whole runs."""
    return mean(line["right"] for line in whole(runs))


def rate(runs: list[Line]) -> str:
    """The learning rate."""
    return f"{runs[0]['learning_rate']:.1e}".replace(".0e", "e").replace("e-0", "e-")


def by_seed(runs: list[Line], completions: float, seeds: Sequence[int]) -> str:
    """Right answers of each seed; the updates in brackets where a run was cut before."""
    of = {line["seed"]: shown_right(line, completions) for line in runs if "points" in line or completions == inf}
    return short(", ".join(of.get(seed, "–") for seed in seeds))


def end(runs: list[Line]) -> str:
    """Right answers at the end, the mean over seeds; "cut" where no run was whole."""
    return "cut" if is_cut(runs) else short(spread([line["right"] for line in whole(runs)]))


def average(runs: list[Line], name: str) -> str:
    """The mean over seeds of another measurement at the end."""
    return short(f"{mean(line[name] for line in whole(runs)):.3f}")


def of_teacher(runs: list[Line], name: str = "right") -> str:
    """The range of a share of the teacher, as it was measured at the end of each run."""
    shares = [line["of_teacher"][name] for line in runs]
    low, high = min(shares), max(shares)
    return short(f"{low:.3f}" if high - low < 5e-4 else f"{low:.3f} to {high:.3f}")


def above(runs: list[Line], teacher: Sequence[float]) -> str:
    """The difference of the mean over seeds from that of the teacher's draws, and its standard error.

    An arm's own error is the larger of those over its seeds and of its samples: few seeds may agree by chance.
    """
    if is_cut(runs):
        return "cut"
    shares = [line["right"] for line in whole(runs)]
    sampled = sqrt(mean(shares) * (1 - mean(shares)) / (QUESTIONS * len(shares)))
    return short(f"{mean(shares) - mean(teacher):.3f} ± {hypot(max(error(shares), sampled), error(teacher)):.3f}")


def highest(line: Line) -> float:
    """The highest share of right answers that a run measured."""
    return max(line["right"], *(point[RIGHT] for point in line["points"]))


def equal(runs: list[Line], share: float) -> list[float]:
    """Right answers of each run after a share of its updates, on a line between its measurements."""
    found = []
    for line in whole(runs):
        at, points = share * line["steps"] * line["points"][-1][0] / line["done"], line["points"]
        after = next((i for i, point in enumerate(points) if point[0] >= at), len(points) - 1)
        (x0, y0), (x1, y1) = ((point[0], point[RIGHT]) for point in points[max(after - 1, 0) : after + 1][-2:])
        found.append(y0 + (y1 - y0) * min((at - x0) / (x1 - x0), 1.0))
    return found


Column = Callable[[list[Line]], str]
"""A cell for the runs of an arm at one rate."""
CLOSING: dict[str, Column] = {
    "greedy": partial(average, name="greedy"),
    "pass@8": partial(average, name="any_right"),
    "entropy": partial(average, name="entropy"),
}
"""Measurements at the end beside right samples; the entropy in nats a token."""
