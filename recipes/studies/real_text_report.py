"""The tables and plots of real_text.py's runs."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, nan
from pathlib import Path
from statistics import mean

from horizon_report import MEASURES, error, spread
from optimal_sampling_trl.plots import plot_learning
from runs import Line, by_rate

RIGHT = 3
"""The column of a point that holds the share of right answers."""


def of_teacher(lines: list[Line], name: str) -> float:
    """A share of right answers of the teacher; runs of TRL's own trainers do not measure it."""
    values = [line["of_teacher"][name] for line in lines if line["of_teacher"]]
    return mean(values) if values else nan


def best(lines: list[Line], arm: str) -> list[Line]:
    """The seeds of an arm at the rate that ends best."""
    return max(by_rate(lines, arm), key=lambda seeds: mean(line["right"] for line in seeds), default=[])


def table(lines: list[Line]) -> Iterator[str]:
    """A row for each arm of one task and one student, the best end first."""
    shown = ", ".join(f"{word} {of_teacher(lines, name):.3f}" for name, word in MEASURES.items())
    first = mean(line["points"][0][RIGHT] for line in lines)
    yield f"### {lines[0]['task']}, {lines[0]['student']} student, {first:.3f} at the start; the teacher: {shown}"
    yield "| arm | rate | right | greedy | pass@8 | entropy | KL(θ‖t) | tokens | ended | seconds | GB | each rate |"
    yield "|---" * 12 + "|"
    arms = {arm: best(lines, arm) for arm in dict.fromkeys(line["arm"] for line in lines)}
    for arm, seeds in sorted(arms.items(), key=lambda item: -mean(line["right"] for line in item[1])):
        every = {runs[0]["learning_rate"]: mean(line["right"] for line in runs) for runs in by_rate(lines, arm)}
        names = ("greedy", "any_right", "entropy", "divergence", "tokens", "ended")
        ends = " | ".join(f"{mean(line[name] for line in seeds):.3f}" for name in names)
        seconds = mean(line["points"][-1][2] for line in seeds)
        gb = max(line.get("gb", nan) for line in seeds)
        tries = " ".join(f"{rate:g}: {every[rate]:.3f}" for rate in sorted(every))
        rate = seeds[0]["learning_rate"]
        right = spread([line["right"] for line in seeds])
        yield f"| {arm} | {rate:g} | {right} | {ends} | {seconds:.0f} | {gb:.1f} | {tries} |"


def curves(lines: list[Line], column: int, scale: float) -> dict[str, list[tuple[float, float]]]:
    """The mean of each arm's seeds at its best rate over one column of their points, and the teacher's three lines."""
    found = {}
    for arm in dict.fromkeys(line["arm"] for line in lines):
        points = zip(*(line["points"] for line in best(lines, arm)))
        found[arm] = [(mean(p[column] for p in ps) / scale, mean(p[RIGHT] for p in ps)) for ps in points]
    end = max(x for points in found.values() for x, _ in points)
    for name, word in MEASURES.items():
        value = of_teacher(lines, name)
        found[f"teacher, {word}"] = [(0.0, value), (end, value)]
    return found


def seeds(lines: list[Line], completions: float = inf) -> Iterator[str]:
    """A row for each arm and rate: right answers of each seed after `completions`, their mean, the rest at the end.

    A run counts with its last measurement by then. One that was cut earlier has its updates in brackets.
    """
    every = sorted({line["seed"] for line in lines})
    yield "| arm | rate | " + " | ".join(f"seed {seed}" for seed in every) + " | mean | greedy | pass@8 |"
    yield "|---" * (5 + len(every)) + "|"
    for arm in dict.fromkeys(line["arm"] for line in lines):
        for runs in by_rate(lines, arm):
            shown = {line["seed"]: shown_right(line, completions) for line in runs}
            means = [spread([right_after(line, completions) for line in runs])]
            if completions == inf:
                means += [f"{mean(line[name] for line in runs):.3f}" for name in ("greedy", "any_right")]
            cells = [shown.get(seed, "") for seed in every] + means + [""] * (3 - len(means))
            yield f"| {arm} | {runs[0]['learning_rate']:g} | " + " | ".join(cells) + " |"


def right_after(line: Line, completions: float) -> float:
    """The share of right answers that a run measured last by then; by the end, that of its closing exam."""
    if completions == inf:
        return line["right"]
    return [point[RIGHT] for point in line["points"] if point[0] <= completions][-1]


def shown_right(line: Line, completions: float) -> str:
    """The same as a cell, with the updates in brackets where the run was cut before."""
    whole = line["done"] == line["steps"] or (completions < inf and line["points"][-1][0] >= completions)
    return f"{right_after(line, completions):.3f}" + ("" if whole else f" ({line['done']})")


def gain(lines: list[Line], arm: str, other: str, completions: float = inf) -> tuple[float, float, int]:
    """Compare one arm's right answers with another's: the mean difference over common seeds, its error, their number.

    Each arm is taken at the first rate that it was run at. The error is the standard error of the paired differences,
    NaN with one seed.
    """
    of = [{line["seed"]: right_after(line, completions) for line in by_rate(lines, name)[0]} for name in (arm, other)]
    more = [of[0][seed] - of[1][seed] for seed in of[0].keys() & of[1].keys()]
    return mean(more), error(more) if len(more) > 1 else nan, len(more)


def report(lines: list[Line], output: Path) -> None:
    """Print a table for each task and student, and draw its curves over tokens and over seconds.

    Runs that were cut are in the table of seeds alone.
    """
    for task, student in dict.fromkeys((line["task"], line["student"]) for line in lines):
        here = [line for line in lines if (line["task"], line["student"]) == (task, student)]
        print(f"### {task}, {student} student: right answers by seed", *seeds(here), "", sep="\n")
    lines = [line for line in lines if line["done"] == line["steps"]]
    for task, student in dict.fromkeys((line["task"], line["student"]) for line in lines):
        here = [line for line in lines if (line["task"], line["student"]) == (task, student)]
        print("\n".join(table(here)), "\n", sep="\n")
        for name, column, scale, label in (
            ("tokens", 1, 1e3, "generated tokens (thousands)"),
            ("seconds", 2, 1.0, "seconds of training, sampling included"),
        ):
            drawn = curves(here, column, scale)
            labels = {"x_label": label, "y_label": "right answers", "title": f"{task}, {student} student"}
            print(plot_learning(output / f"real_{task}_{student}_{name}.png", drawn, **labels))
