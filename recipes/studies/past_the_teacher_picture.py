# /// script
# dependencies = ["optimal-sampling-trl[plots]", "matplotlib"]
# ///
"""Draw the end of each arm by its teacher, from what is stored of `past_the_teacher.py --around`.

    python recipes/studies/past_the_teacher_picture.py --output output/teachers.png

One right answer, 41 tokens, a student that starts at 6.0 % (`past_the_teacher.MAIN`), the third ladder of models.
Each arm is shown at its best learning rate, as the mean over three seeds: of most places no single run is stored.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

from optimal_sampling_trl.panels import Points
from optimal_sampling_trl.plots import plot_learning
from past_the_teacher_arms import MAIN
from past_the_teacher_around import TEACHERS, about

ARMS = {
    "RAFT, mixture": "RAFT on the mixture",
    "Distillation, own": "distillation",
    "GRPO, half": "GRPO, half mixture",
    "RAFT, own": "RAFT without a teacher",
    "GRPO, own, positive only": "GRPO without a teacher, positives only",
    "GRPO, own": "GRPO without a teacher",
}
"""The words for each arm in the picture."""
ALONE = ("RAFT, own", "GRPO, own, positive only", "GRPO, own")
GREEDY = "the teacher itself, greedy"


def curves() -> dict[str, Points]:
    """Points of each arm: success of the teacher's samples in per cent, and of the student's at the end."""
    found = {name: about(MAIN._replace(teacher=name), ARMS) for name in TEACHERS}
    alone = dict.fromkeys(TEACHERS, found[MAIN.teacher])  # without a teacher an arm is the same at all of them
    return {
        words: [
            (100 * TEACHERS[name]["right"], arms[arm].end) for name, arms in (alone if arm in ALONE else found).items()
        ]
        for arm, words in ARMS.items()
    }


def main() -> None:
    """Read the stored runs and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/teachers.png"), help="the PNG (%(default)s)")
    options = parser.parse_args()
    greedy = [(100 * one["right"], one["greedy"]) for one in TEACHERS.values()]
    path = plot_learning(
        options.output,
        {**curves(), GREEDY: greedy},
        x_label="the teacher's samples that are right, in %",
        y_label="the student's samples that are right",
        title="RAFT ends above a teacher that is often wrong",
        percent=True,
    )
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
