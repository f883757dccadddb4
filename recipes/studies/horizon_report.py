"""The tables and plots of horizon.py's runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from optimal_sampling_trl.plots import plot_learning
from runs import Line, by_rate
from stacks import place_of

DRAWN = (
    "GRPO",
    "GRPO, half mixture",
    "GRPO, half mixture, positive only",
    "GRPO, half mixture + sampled tokens, 0.1",
    "Distillation",
    "Distillation, mixture",
    "Distillation, trust region, annealed",
    "Sampled tokens, mixture",
    "SFT on the teacher's samples",
)
MEASURES = {"right": "sampled", "greedy": "greedy", "any_right": "pass@8"}
"""The measurements of a teacher, and the words for them."""


def end(run: Line) -> float:
    """Exact match at the end of a run."""
    return float(run["curve"][-1][1])


def best(lines: Iterable[Line], arm: str) -> list[Line]:
    """The seeds of an arm at the rate whose mean at the end is highest, of the rates that most seeds ran at."""
    rates = by_rate((line for line in lines if not line["stopped"]), arm)
    most = max(map(len, rates), default=0)
    full = [runs for runs in rates if len(runs) == most]
    return max(full, key=lambda runs: mean(map(end, runs)), default=[])


def error(values: Sequence[float]) -> float:
    """Standard error of a mean over seeds, 0 for one seed."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def spread(values: Sequence[float]) -> str:
    """A mean with its standard error over seeds."""
    return f"{mean(values):.3f}" + (f" ± {error(values):.3f}" if len(values) > 1 else "")


def short(text: str) -> str:
    """Shares without the 0 before the point, and a minus as it is written."""
    return re.sub(r"(?<!\d)0(?=\.\d{3})", "", text).replace("-.", "−.")


def area(run: Line) -> float:
    """The mean of a curve over the tokens that were generated: high where it rises early."""
    points = run["curve"]
    parts = [(x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(points)]
    return float(sum(parts) / max(points[-1][0] - points[0][0], 1))


def arms_table(lines: list[Line], arms: Iterable[str]) -> Iterable[str]:
    """A row for each arm at one place."""
    yield "| arm | rate | at its best rate: end | mean of the curve | at all rates: end | tokens (millions) | seeds |"
    yield "|---|---|---|---|---|---|---|"
    for arm in arms:
        seeds = best(lines, arm)
        if not seeds:
            continue
        rates = sorted({line["learning_rate"] for line in lines if line["arm"] == arm})
        ends = [
            mean([end(line) for line in lines if (line["arm"], line["learning_rate"]) == (arm, rate)])
            for rate in rates
        ]
        every = " ".join(f"{value:.3f}" for value in ends)
        tokens = mean([run["curve"][-1][0] for run in seeds]) / 1e6
        numbers = f"{spread([end(run) for run in seeds])} | {mean(map(area, seeds)):.3f} | {every}"
        yield f"| {arm} | {seeds[0]['learning_rate']:g} | {numbers} | {tokens:.2f} | {len(seeds)} |"


def axes_table(lines: list[Line], settings: Sequence[Any]) -> Iterable[str]:
    """A row for each arm that was run along the axes, a column for each place; the start in the head."""
    places = list(dict.fromkeys(place_of(setting) for setting in settings))
    found = {place: [line for line in lines if place_of(line) == place] for place in places}
    places = [place for place in places if found[place]]
    starts = [f"{found[place][0]['curve'][0][1]:.4f}" for place in places]
    yield "| arm | " + " | ".join("<br>".join((*place[:3], f"from {x}")) for place, x in zip(places, starts)) + " |"
    yield "|---" * (len(places) + 1) + "|"
    for arm in dict.fromkeys(arm for setting in settings[2:-1] for arm in setting.arms):
        cells = [[end(run) for run in best(found[place], arm)] for place in places]
        yield f"| {arm} | " + " | ".join(spread(cell) if cell else "–" for cell in cells) + " |"


def curve(runs: list[Line]) -> list[list[tuple[float, float]]]:
    """The seeds' curves over the mean of their tokens, in millions."""
    tokens = [mean([x for x, _ in points]) / 1e6 for points in zip(*(run["curve"] for run in runs))]
    return [[(x, y) for x, (_, y) in zip(tokens, run["curve"])] for run in runs]


def timed(runs: list[Line], alone: Line) -> list[list[tuple[float, float]]]:
    """The seeds' curves over the seconds of training of a run that had the device to itself."""
    return [[(seconds, y) for seconds, (_, y) in zip(alone["clock"], run["curve"], strict=True)] for run in runs]


def report(lines: list[Line], alone: list[Line], output: Path, arms: Iterable[str], settings: Sequence[Any]) -> None:
    """Print both tables and draw the plots of what has been run; `alone` holds the runs that were timed."""
    here = [line for line in lines if place_of(line) == place_of(settings[0])]
    print("\n".join(arms_table(here, arms)), "\n", sep="\n")
    print("\n".join(axes_table(lines, settings)))
    curves = {arm: curve(seeds) for arm in DRAWN if (seeds := best(here, arm))}
    clocks = {line["arm"]: line for line in alone if place_of(line) == place_of(settings[0])}
    seconds = {arm: timed(best(here, arm), clocks[arm]) for arm in curves if arm in clocks}
    for name, x_label, drawn in (
        ("horizon.png", "generated tokens (millions)", curves),
        ("horizon_time.png", "seconds of training, sampling included", seconds),
    ):
        labels = {"x_label": x_label, "y_label": "exact match", "percent": True}
        if drawn:
            print(plot_learning(output / name, drawn, **labels))
