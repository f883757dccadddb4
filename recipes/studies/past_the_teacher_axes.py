# /// script
# dependencies = ["optimal-sampling-trl[plots]", "matplotlib"]
# ///
"""Draw the tables of "Past the teacher" by task and verifier, the main effects, and dense records on a short task.

    python recipes/studies/past_the_teacher_axes.py

The stored runs are of three ladders of models. They are shown beside each other and are never averaged: one ladder's
teacher is not the other's. A test holds README.md against what this prints.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from math import inf
from pathlib import Path
from statistics import mean

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

from horizon_report import best, end, spread
from past_the_teacher_arms import ARMS, CORE, FEW, MAIN, MANY
from past_the_teacher_report import at, effects
from real_cells import short
from runs import Line, by_rate, read_runs

RESULTS = Path(__file__).parent / "results"
FIRST, AXES, SHORT = "past_the_teacher", "past_the_teacher_axes", "dense_sums"
"""The files of the three ladders."""
PLACES = {
    "41 tokens": MAIN,
    "start .45": MAIN._replace(student="student-40"),
    "noisy": MAIN._replace(verifier="noisy"),
    "noisy, start .0008": MAIN._replace(verifier="noisy", student="student-0"),
    "graded": MAIN._replace(verifier="graded"),
    "21 tokens": MAIN._replace(task="sums-20"),
    "81 tokens": MAIN._replace(task="sums-80"),
    f"{FEW} prompts": MAIN._replace(prompts=FEW),
    "many right": MANY,
}
"""The columns: the main place, and one thing changed in each of the others."""
ROWS = (*CORE, "RAFT, mixture, by reward")
READ = {
    "k = 1": "Dense 1", "k = 4": "Dense 4", "k = 32": "Dense 32", "whole vocabulary": "Distillation",
    "sampled token": "Sampled tokens",
}  # fmt: skip
"""Parts of a token's distributions that distillation reads, and its arms' names before the rollouts'."""
MEASURES = {"right": "sampled", "greedy": "greedy", "any_right": "pass@8"}


def stored(name: str) -> list[Line]:
    """The runs of a file that holds the end of each curve alone."""
    return [line | {"curve": [[0, line["end"]]]} for line in read_runs(RESULTS / f"{name}.jsonl")]


def at_edge(lines: list[Line], arm: str) -> bool:
    """Return whether the best rate of an arm is the smallest or the largest that was run."""
    rates = [runs[0]["learning_rate"] for runs in by_rate(lines, arm)]
    return best(lines, arm)[0]["learning_rate"] in (min(rates), max(rates))


def cell(lines: list[Line], arm: str, highest: float) -> str:
    """The end of an arm at its best rate: bold where it is the highest, with a star where the rate is at an edge."""
    if not (seeds := best(lines, arm)):
        return "–"
    text = short(spread([*map(end, seeds)]))
    bold = "**" if mean(map(end, seeds)) == highest else ""
    return f"{bold}{text}{bold}{' *' * at_edge(lines, arm)}"


def by_place(lines: list[Line], teachers: dict[str, dict[str, float]]) -> Iterator[str]:
    """A row for each arm, a column for each place; the teachers above them."""
    columns = [at(lines, place) for place in PLACES.values()]
    tops = [max((mean(map(end, best(runs, arm))) for arm in ROWS if best(runs, arm)), default=0.0) for runs in columns]
    yield "| arm | " + " | ".join(PLACES) + " |"
    yield "|---" * (1 + len(PLACES)) + "|"
    for name, words in MEASURES.items():
        cells = [short(f"{teachers[place.task][name]:.3f}") for place in PLACES.values()]
        yield f"| teacher, {words} | " + " | ".join(cells) + " |"
    for arm in ROWS:
        yield f"| {arm} | " + " | ".join(cell(runs, arm, top) for runs, top in zip(columns, tops)) + " |"


def main_effects(columns: dict[str, list[Line]]) -> Iterator[str]:
    """The mean end over all cells of the factorial that share a level, a column for each place that has all cells."""
    found = {words: effects(lines) for words, lines in columns.items()}
    yield "| factor | level | cells | " + " | ".join(found) + " |"
    yield "|---" * (3 + len(found)) + "|"
    for (factor, level), cells in next(iter(found.values())).items():
        means = [short(f"{mean(ends[factor, level]):.3f}") for ends in found.values()]
        yield f"| {factor} | {level} | {len(cells)} | " + " | ".join(means) + " |"


def by_records(lines: list[Line]) -> Iterator[str]:
    """A row for each kind of rollouts, a column for what distillation reads."""
    yield "| rollouts | " + " | ".join(READ) + " |"
    yield "|---" * (1 + len(READ)) + "|"
    for rollouts, words in (("own", "student's"), ("mixture", "mixture")):
        cells = (cell(lines, f"{arm}, {rollouts}", highest=inf) for arm in READ.values())
        yield f"| {words} | " + " | ".join(cells) + " |"


def edges(lines: list[Line]) -> Iterator[str]:
    """Yield how many arms of each place were best at the smallest or the largest rate."""
    for words, place in PLACES.items():
        here = at(lines, place)
        arms = [arm for arm in ARMS if best(here, arm)]
        yield f"{words}: {sum(at_edge(here, arm) for arm in arms)} of {len(arms)}"


def tables() -> dict[str, list[str]]:
    """The rows of each table, by its title."""
    first, axes = stored(FIRST), stored(AXES)
    teachers = json.loads((RESULTS / f"{AXES}_teachers.json").read_text())
    return {
        "by task and verifier": [*by_place(axes, teachers)],
        "main effects": [
            *main_effects(
                {
                    "one right answer, first ladder": at(first, MAIN),
                    "one right answer, second": at(axes, MAIN),
                    "many right answers, second": at(axes, MANY),
                }
            )
        ],
        "dense records": [*by_records(stored(SHORT))],
    }


def main() -> None:
    """Print the tables, and the arms whose best rate is at an edge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for title, rows in tables().items():
        print(f"### {title}", *rows, "", sep="\n")
    print("Best at an edge: " + "; ".join(edges(stored(AXES))) + ".")


if __name__ == "__main__":
    main()
