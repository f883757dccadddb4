# /// script
# dependencies = ["optimal-sampling-trl[plots]"]
# ///
"""Draw the first picture of the README from the runs that are stored beside this script.

    python recipes/studies/headline.py --output output/headline.png

One right answer, 41 tokens, a student that starts at 5.8 % (`past_the_teacher.MAIN`). Each arm is shown at its best
learning rate of three; the arms without a teacher are the same at every teacher.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from optimal_sampling_trl.panels import Points
from optimal_sampling_trl.plots import plot_learning
from runs import Line, by_rate, read_runs

RESULTS = Path(__file__).parent / "results"
ARMS = {
    "RAFT, mixture": "RAFT on the mixture",
    "Distillation, own": "distillation",
    "GRPO, half": "GRPO, half mixture",
    "RAFT, own": "RAFT without a teacher",
    "GRPO, own, positive only": "GRPO without a teacher, positives only",
    "GRPO, own": "GRPO without a teacher",
}
"""The words for each arm in the picture."""
GREEDY = "the teacher itself, greedy"


def seeds_at_best_rate(runs: list[Line], arm: str) -> list[float]:
    """The success of each seed at the end, at the learning rate with the best mean."""
    return max(([run["end"] for run in seeds] for seeds in by_rate(runs, arm)), key=mean, default=[])


def curves_of(runs: list[Line], teachers: dict[str, dict[str, float]]) -> dict[str, list[Points]]:
    """Points of each arm, a list for each seed: success of the teacher's samples in per cent, and of the student's."""
    places = {
        name: [run for run in runs if (run["task"], run["student"], run["teacher"]) == ("sums-40", "student-2", name)]
        for name in teachers
    }
    curves: dict[str, list[Points]] = {}
    for arm, words in ARMS.items():
        ends = {name: seeds_at_best_rate(here, arm) for name, here in places.items()}
        if "own" in arm and "Distillation" not in arm:  # no teacher: run at one place, and the same at all
            ends = dict.fromkeys(teachers, ends["teacher-50"])
        by_seed = zip(*ends.values())
        curves[words] = [[(100 * one["right"], end) for one, end in zip(teachers.values(), seed)] for seed in by_seed]
    return curves


def main() -> None:
    """Read the stored runs and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/headline.png"), help="the PNG (%(default)s)")
    options = parser.parse_args()
    runs = read_runs(RESULTS / "past_the_teacher.jsonl")
    teachers = json.loads((RESULTS / "past_the_teacher_teachers.json").read_text())
    curves = curves_of(runs, teachers)
    greedy = [(100 * one["right"], one["greedy"]) for one in teachers.values()]
    path = plot_learning(
        options.output,
        {**curves, GREEDY: greedy},
        x_label="the teacher's samples that are right, in %",
        y_label="the student's samples that are right",
        title="RAFT on the mixture ends above a teacher that is often wrong",
        percent=True,
    )
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
