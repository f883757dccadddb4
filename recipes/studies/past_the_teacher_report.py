"""The tables and the picture of past_the_teacher.py's runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from horizon_report import MEASURES, best, end, spread
from optimal_sampling_trl.panels import Curve, draw_curves, finish, show_percent
from past_the_teacher_arms import ARMS, CORE, MAIN, MANY
from past_the_teacher_cells import at
from past_the_teacher_effects import main_effects
from runs import Line, by_rate
from stacks import Setting

STARTS = ("student-0", "student-2", "student-40")
TEACHERS = ("teacher-20", "teacher-50", "teacher-80", "teacher")
PANELS: tuple[tuple[str, Setting, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("Rollouts × start", MAIN, "student", STARTS, (
        "RAFT, own", "RAFT, half", "RAFT, mixture", "RAFT, teacher", "GRPO, own", "GRPO, half", "Distillation, own",
    )),
    ("Loss × teacher, one right answer", MAIN, "teacher", TEACHERS, (
        "RAFT, own", "RAFT, mixture", "RAFT, mixture + dense 1", "GRPO, half", "GRPO, half + dense 1",
        "Distillation, own",
    )),
    ("Loss × teacher, many right answers", MANY, "teacher", TEACHERS[1:3], (
        "RAFT, own", "RAFT, mixture", "RAFT, mixture + dense 1", "GRPO, half", "GRPO, half + dense 1",
        "Distillation, own",
    )),
)  # fmt: skip
"""Of each panel and table of an interaction: its title, the place from which the axis goes, the axis, the arms."""


def of_teacher(lines: Sequence[Line]) -> dict[str, float]:
    """Return how good the teacher of a place is."""
    found: dict[str, float] = next((line["of_teacher"] for line in lines if "of_teacher" in line), {})
    return found


def column(seeds: list[Line], name: str) -> str:
    """The mean of a measurement at the end."""
    values = [line[name] for line in seeds if name in line]
    return f"{mean(values):.3f}" if values else "–"


def at_share(seeds: list[Line], share: float) -> list[float]:
    """The success of each seed after a share of the updates, on the line between two points."""
    ends = []
    for line in seeds:
        curve = [y for _, y in line["curve"]]
        place = share * (len(curve) - 1)
        low = min(int(place), len(curve) - 2)
        ends.append(curve[low] + (place - low) * (curve[low + 1] - curve[low]))
    return ends


def at_seconds(seeds: list[Line], share: float) -> float:
    """The mean over seeds of the success after a share of the updates."""
    return mean(at_share(seeds, share))


def place_table(lines: list[Line], place: Setting, seconds: dict[str, float]) -> Iterator[str]:
    """A row for each arm at one place, each at its best rate; the best end first."""
    teacher, start = of_teacher(lines), lines[0]["curve"][0][1]
    prompts = f", {place.prompts} prompts" if place.prompts else ""
    yield f"### {place.task}, verifier {place.verifier}{prompts}: {place.teacher}, {place.student}"
    if teacher:
        yield (
            f"The teacher's samples are right in {teacher['right']:.3f}, greedy {teacher['greedy']:.3f}, "
            f"pass@8 {teacher['any_right']:.3f}; the student starts at {start:.4f}."
        )
    yield "| arm | rate | end | half-way | at equal seconds | greedy | pass@8 | entropy | KL(θ‖t) | at each rate |"
    yield "|---" * 10 + "|"
    found = {arm: seeds for arm in ARMS if (seeds := best(lines, arm))}
    least = min((seconds[arm] for arm in found if arm in seconds), default=0.0)
    for arm, seeds in sorted(found.items(), key=lambda item: -mean(map(end, item[1]))):
        every = {runs[0]["learning_rate"]: mean(map(end, runs)) for runs in by_rate(lines, arm)}
        rate = seeds[0]["learning_rate"]
        edge = " (edge)" if rate in (min(every), max(every)) else ""
        tries = " ".join(f"{x:g}: {every[x]:.3f}" for x in sorted(every))
        equal = f"{at_seconds(seeds, least / seconds[arm]):.3f}" if arm in seconds else "–"
        ends = " | ".join(column(seeds, name) for name in ("greedy", "any_right", "entropy", "divergence"))
        half = at_seconds(seeds, 0.5)
        yield f"| {arm} | {rate:g}{edge} | {spread([*map(end, seeds)])} | {half:.3f} | {equal} | {ends} | {tries} |"


def axis_of(lines: list[Line], panel: tuple[Any, ...]) -> tuple[list[tuple[str, list[Line]]], tuple[str, ...]]:
    """The levels of a panel's axis that were run, each with its runs, and its arms."""
    _, place, axis, levels, arms = panel
    found = [(level, at(lines, place._replace(**{axis: level}))) for level in levels]
    return [(level, runs) for level, runs in found if runs], arms


def interaction_table(lines: list[Line], panel: tuple[Any, ...]) -> Iterator[str]:
    """A row for each arm, a column for each level of the axis; the teacher above them."""
    levels, arms = axis_of(lines, panel)
    yield f"### {panel[0]}"
    yield "| arm | " + " | ".join(level for level, _ in levels) + " |"
    yield "|---" * (1 + len(levels)) + "|"
    for name, words in MEASURES.items():
        cells = [f"{of_teacher(runs).get(name, float('nan')):.3f}" for _, runs in levels]
        yield f"| teacher, {words} | " + " | ".join(cells) + " |"
    for arm in arms:
        cells = [spread([*map(end, seeds)]) if (seeds := best(runs, arm)) else "–" for _, runs in levels]
        yield f"| {arm} | " + " | ".join(cells) + " |"


def draw(lines: list[Line], path: Path) -> None:
    """One panel for each interaction: arms over the levels of its axis, seeds as a band, the teacher dashed."""
    figure = Figure(figsize=(6.5 * len(PANELS), 5), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    shown = [axis_of(lines, panel) for panel in PANELS]
    for panel, axis, (levels, arms) in zip(PANELS, axes, shown):
        curves: dict[str, Curve] = {}
        for arm in arms:
            ends = {i: [*map(end, seeds)] for i, (_, runs) in enumerate(levels) if (seeds := best(runs, arm))}
            if ends:
                curves[arm] = [list(zip(ends, values)) for values in zip(*ends.values())]
        teacher = {
            f"teacher, {words}": [(i, of_teacher(runs).get(name, float("nan"))) for i, (_, runs) in enumerate(levels)]
            for name, words in MEASURES.items()
        }
        if levels:
            greys = dict(zip(teacher, ("#b0b0b0", "#707070", "#303030")))
            draw_curves(axis, {**curves, **teacher}, "right at the end", colors=greys, dashed=[*teacher])
        axis.set_title(panel[0])
    finish(figure, axes, "", None)
    for axis, (levels, _) in zip(axes, shown):
        axis.set_xticks(range(len(levels)), [level for level, _ in levels])
        show_percent(axis.yaxis)
    figure.savefig(path)


def report(lines: list[Line], alone: list[Line], output: Path, settings: Sequence[Setting]) -> None:
    """Print every table and draw the picture of what has been run."""
    lines = [line for line in lines if not line["stopped"]]
    if not lines:
        print("Nothing has been run to its end.")
        return
    for place in dict.fromkeys(setting._replace(arms=()) for setting in settings):
        if here := at(lines, place):
            seconds = {line["arm"]: line["seconds"] for line in alone if line["task"] == place.task}
            print("\n".join(place_table(here, place, seconds)), "\n", sep="\n")
    print("\n".join(main_effects({"mean end": at(lines, MAIN)})), "\n", sep="\n")
    for panel in PANELS:
        if axis_of(lines, panel)[0]:
            print("\n".join(interaction_table(lines, panel)), "\n", sep="\n")
    print(f"{len(lines)} runs, {len([arm for arm in CORE if best(lines, arm)])} of {len(CORE)} core arms.")
    draw(lines, output / "past_the_teacher.png")
