# /// script
# dependencies = ["optimal-sampling-trl[plots]", "matplotlib", "reasoning-gym"]
# ///
"""Draw the pictures of real text in the documents from the stored runs.

    python recipes/studies/real_pictures.py --output recipes/studies

real_text.png: the arms of both tasks over completions, and the longer runs, for the README. real_text_pruned.png:
those of the student without a third of its layers. presets_real.png: the arms of the table of real
text in docs/presets.md. Each arm is at the rate of its row in the tables. flagship.png: every trainer of `flagship.py`
beside TRL's own, over tokens and over seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

from horizon_report import MEASURES
from optimal_sampling_trl.panels import PALETTE, Curve, draw_curves, finish, show_percent
from real_cells import chosen, whole
from real_draws import draws
from real_places import ARMS, LENGTHS, PLACES, TITLES
from real_tables import RESULTS, of_place, stored
from real_text_report import RIGHT, curves
from runs import Line

GREYS = dict(zip((f"teacher, {word}" for word in MEASURES.values()), ("#b0b0b0", "#707070", "#303030")))
"""The colours of the teacher's lines."""
COLORS = GREYS | dict(zip(ARMS.values(), PALETTE))
"""Theirs, and those of the README's arms, which are the same in every panel."""
PANELS = {
    "Imitation": (
        "RAFT, mixture", "RAFT, mixture + dense 1 faded", "TRB", "Distillation", "MiniLLM", "SKD", "SFT, teacher",
        "RAFT, fixed 0.5", "RAFT, half", "RAFT, own + dense 1 faded",
    ),
    "Policy gradients": ("GRPO, half mixture", "GRPO", "MENTOR", "Logit Fusion"),
}  # fmt: skip
"""The arms of presets_real.png, those that were run."""
WIDEST = 17
"""Inches of a picture: a page shrinks a wider one until its words are too small."""


def over_completions(runs: Sequence[Line]) -> list[list[tuple[float, float]]]:
    """Right answers of each seed over completions; those of the closing exam are in the tables alone.

    Where a run was cut shortly before its end, its last measurement stands at the mean of the seeds'.
    """
    points = list(zip(*(line["points"] for line in runs)))
    at = [round(mean(point[0] for point in seeds)) for seeds in points]
    return [[(x, seeds[i][RIGHT]) for x, seeds in zip(at, points)] for i in range(len(runs))]


def of_teacher(task: str, end: float) -> dict[str, Curve]:
    """The lines of a task's teacher, its samples, its greedy decoding and pass@8, from 0 to `end` completions."""
    found = draws(RESULTS, task)
    return {
        f"teacher, {words}": [(0.0, share), (end, share)]
        for name, words in MEASURES.items()
        for share in [mean(shares[name] for shares in found)]
    }


def last(lines: Sequence[Line]) -> float:
    """Completions at the last measurement of all runs."""
    return max(line["points"][-1][0] for line in lines)


def of_student(student: str) -> dict[str, dict[str, Curve]]:
    """The curves of a student's panels, the arms of the README that were run, and of their teachers."""
    panels = {}
    for task, _, updates in (place for place in PLACES if place[1] == student):
        here = of_place(task, student, updates)
        ran = {line["arm"] for line in here}
        drawn = {words: over_completions(whole(chosen(here, arm))) for arm, words in ARMS.items() if arm in ran}
        panels[TITLES[task] + LENGTHS[updates]] = drawn | of_teacher(task, last(here))
    return panels


def of_presets(lines: Sequence[Line]) -> dict[str, dict[str, Curve]]:
    """The curves of each panel of presets_real.png, and the teacher's."""
    ran, teacher = {line["arm"] for line in lines}, of_teacher("sums", last(lines))
    return {
        title: {arm: over_completions(whole(chosen(lines, arm))) for arm in arms if arm in ran} | teacher
        for title, arms in PANELS.items()
    }


def of_flagship(lines: list[Line]) -> dict[str, dict[str, Curve]]:
    """The curves of each panel of flagship.png, by the label of its x."""
    return {
        "generated tokens (thousands)": {**curves(lines, 1, 1e3)},
        "seconds of training, sampling included": {**curves(lines, 2, 1.0)},
    }


def draw(
    path: Path,
    panels: Mapping[str, Mapping[str, Curve]],
    title: str,
    labels: Sequence[str],
    colors: Mapping[str, str] = MappingProxyType(GREYS),
) -> Path:
    """Draw panels beside each other, with one y.

    A legend stands below each, or below all where the first has every curve.

    Args:
        panels: the curves of each by its heading.
        labels: what stands below each.
        colors: colours by curve, in place of the palette's.
    """
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(min(7 * len(panels), WIDEST), 5.6), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, label, (heading, shown) in zip(axes, labels, panels.items()):
        axis.autoscale(axis="y")  # drawing curves ends it for all panels
        draw_curves(axis, shown, "right answers", colors=colors, dashed=[*GREYS])
        axis.set_title("" if heading == label else heading, fontsize="medium")
        show_percent(axis.yaxis)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "handlelength": 3.6}  # long enough for a dash
        axis.legend(**below, ncols=2, fontsize="small", frameon=False)
        finish(figure, [axis], label, title)
    first, *others = panels.values()
    if all(shown.keys() <= first.keys() for shown in others):
        handles, _ = axes[0].get_legend_handles_labels()  # its labels tell its own number of seeds
        figure.legend(handles, [*first], loc="outside lower center", ncols=5, frameon=False, handlelength=3.6)
        for axis in axes:
            axis.get_legend().remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def main() -> None:
    """Draw all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/real_pictures"), help="folder (%(default)s)")
    folder = parser.parse_args().output
    beside = of_flagship(stored("flagship"))
    presets = of_presets(stored("presets_real"))
    one = "Sums of reasoning-gym, SmolLM2-135M, one H200, one seed, one rate for each arm"
    ten = "Sums of reasoning-gym, SmolLM2-135M, equal completions"
    both = "SmolLM2-135M under a teacher that is right half of the time, one seed to three"
    cut = "SmolLM2-135M without a third of its layers under the same teachers, two seeds or three"
    for name, student, title in (("real_text", "whole", both), ("real_text_pruned", "pruned", cut)):
        panels = of_student(student)
        print(f"Picture: {draw(folder / f'{name}.png', panels, title, ['completions'] * len(panels), COLORS)}")
    print(f"Picture: {draw(folder / 'flagship.png', beside, one, [*beside])}")
    print(f"Picture: {draw(folder / 'presets_real.png', presets, ten, ['completions'] * len(presets))}")


if __name__ == "__main__":
    main()
