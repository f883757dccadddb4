# /// script
# dependencies = ["optimal-sampling-trl[plots]", "matplotlib"]
# ///
"""Draw the tables of "Past the teacher" and of token credit, and that of dense records on a short task.

    python recipes/studies/past_the_teacher_tables.py
    python recipes/studies/past_the_teacher_tables.py --every

The stored runs are of five ladders of models. Three of them are shown beside each other and are never averaged: one
ladder's teacher is not the other's. `--every` prints every arm of the third, where the page has the telling ones. A
test holds README.md against what this prints.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

from past_the_teacher_arms import ARMS, CONTROLS, CORE, DENSE, MAIN, MANY, SHORT, SHORT_MANY
from past_the_teacher_around import PLACES_AROUND, about, around
from past_the_teacher_cells import (
    RESULTS,
    at,
    average,
    cell,
    edges,
    grid,
    head,
    stored,
    summed,
    teacher_rows,
    with_seeds,
)
from past_the_teacher_effects import main_effects
from past_the_teacher_interactions import interactions
from past_the_teacher_places import AXES, FIRST, OF_MANY, PLACES, QUALITY, STARTS
from past_the_teacher_rates import THIRD, at_rates, beyond_edges, first_rates, seconds_table
from runs import Line

RECORDS, CREDIT = "dense_sums", "token_credit"
"""The files of the ladders that have no place among those of the map."""
GROUPS = (1, 2, 4, 8)
SIZED = {"RAFT, mixture": 1, "RAFT, own": 1, "GRPO, half": 8, "GRPO, own": 8}
"""Arms that were run in groups of other sizes, and the size of their own."""
OTHERS = (*SIZED, *(arm for arm in CONTROLS if "groups of" not in arm))
NARROWED = (*CORE, "RAFT, own + dense 1, faded", "RAFT, mixture + dense 1, faded", "RAFT, half + dense 0.1")
DENSE_RAFT = tuple(f"RAFT, {rollouts}{dense}" for rollouts in ("own", "half", "mixture") for dense in DENSE if dense)
TELLING = tuple(dict.fromkeys((
    *CORE, *DENSE_RAFT, "GRPO, half + dense 0.1", "GRPO, mixture + dense 0.1", "GRPO, half + dense 1, faded", *OTHERS,
)))  # fmt: skip
"""Arms of the third ladder's tables."""
READ = {
    "k = 1": "Dense 1", "k = 4": "Dense 4", "k = 32": "Dense 32", "whole vocabulary": "Distillation",
    "sampled token": "Sampled tokens",
}  # fmt: skip
"""Parts of a token's distributions that distillation reads, and its arms' names before the rollouts'."""
CREDITED = {
    "GRPO, half": "GRPO's default",
    "RLAD, half": '**RLAD** (`credit="anchored"`)',
    "SRPO, half, KL(θ‖t)": '**SRPO, KL(θ‖t)** (`credit="routed"`)',
    "SRPO, half": "SRPO, Jensen-Shannon, as its source",
    "SRPO, half, sampled tokens": "SRPO, sampled tokens",
    "RLSD, half": "RLSD",
    "GRPO, half + dense 1": "the default + KL(θ‖t) on all completions",
}
"""The words for each arm in the table of token credit."""


def groups(ladders: Mapping[str, list[Line]]) -> Iterator[str]:
    """A row for each arm and ladder, a column for each size of its groups, at equal completions."""
    yield from head("arm", "ladder", *(f"groups of {size}" for size in GROUPS))
    for arm, usual in SIZED.items():
        names = [arm if size == usual else f"{arm}, groups of {size}" for size in GROUPS]
        for ladder, lines in ladders.items():
            yield f"| {arm} | {ladder} | " + " | ".join(cell(lines, name, inf) for name in names) + " |"


def diversity(columns: Mapping[str, list[Line]]) -> Iterator[str]:
    """A row for each arm, two columns for each place: pass@8 and entropy at the end."""
    measured = {"pass@8": "any_right", "entropy": "entropy"}
    yield from head("arm", *(f"{place}: {words}" for place in columns for words in measured))
    for arm in NARROWED:
        cells = (average(lines, arm, name) for lines in columns.values() for name in measured.values())
        yield f"| {arm} | " + " | ".join(cells) + " |"


def by_records(lines: list[Line]) -> Iterator[str]:
    """A row for each kind of rollouts, a column for what distillation reads."""
    yield from head("rollouts", *READ)
    for rollouts, words in (("own", "student's"), ("mixture", "mixture")):
        cells = (cell(lines, f"{arm}, {rollouts}", highest=inf) for arm in READ.values())
        yield f"| {words} | " + " | ".join(cells) + " |"


def token_credit(columns: Mapping[str, list[Line]]) -> Iterator[str]:
    """A row for each way to credit tokens, its rates and seeds in brackets."""
    yield from head("arm", *columns)
    for arm, words in CREDITED.items():
        yield f"| {words} | " + " | ".join(with_seeds(lines, arm) for lines in columns.values()) + " |"


def tables() -> dict[str, list[str]]:
    """The rows of each table, by its title."""
    first, axes, third, credit = stored(FIRST), stored(AXES), stored(THIRD), stored(CREDIT)
    of_first, of_axes = (json.loads((RESULTS / f"{name}_teachers.json").read_text()) for name in (FIRST, AXES))
    ladders = {"first": at(first, MAIN), "second": at(axes, MAIN)}
    by_teacher = {words: at(first, MAIN._replace(teacher=name)) for words, name in QUALITY.items()}
    by_place = {words: at(axes, place) for words, place in PLACES.items()}
    many = {"first": at(first, MANY), "second": at(axes, MANY)}
    beyond = {place: at(third, place) for place in (MAIN, MANY)}
    of_places = [of_axes[place.task] for place in PLACES.values()]
    narrowed = {f"one right answer, {name}": lines for name, lines in ladders.items()}
    mains = {
        "one right answer, first ladder": ladders["first"], "one right answer, second": ladders["second"],
        "one right answer, third": beyond[MAIN], "many right answers, second": many["second"],
        "many right answers, third": beyond[MANY],
    }  # fmt: skip
    credited = {"one right answer": at(credit, SHORT), "many right answers": at(credit, SHORT_MANY)}
    found: dict[str, Iterator[str]] = {
        "one right answer": grid(CORE, {words: at(first, place) for words, place in STARTS.items()}),
        "by the teacher's quality": grid(
            CORE, by_teacher, teacher_rows([of_first[name] for name in QUALITY.values()])
        ),
        "many right answers": grid(CORE, {words: at(first, place) for words, place in OF_MANY.items()}),
        "groups at equal completions": groups(ladders),
        "controls": grid(OTHERS, {f"{name} ladder": lines for name, lines in ladders.items()}),
        "diversity at the end": diversity(narrowed | {f"many, {name}": lines for name, lines in many.items()}),
        "by task and verifier": grid((*CORE, "RAFT, mixture, by reward"), by_place, teacher_rows(of_places)),
        "main effects": main_effects(mains),
        "interactions": interactions(),
        "one right answer, rates beyond every edge": at_rates(beyond[MAIN], TELLING, MAIN),
        "many right answers, rates beyond every edge": at_rates(beyond[MANY], TELLING, MANY),
        "what the rates beyond change": beyond_edges(beyond[MANY]),
        "by teacher and verifier, rates beyond every edge": around(),
        "seconds of an update": seconds_table(),
        "groups, rates beyond every edge": groups({"third": beyond[MAIN]}),
        "dense records": by_records(stored(RECORDS)),
        "token credit": token_credit(credited),
    }
    return {title: [*rows] for title, rows in found.items()}


def main() -> None:
    """Print the tables, and how many arms of the second and the third ladder are best at an edge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", action="store_true", help="print every arm of the third ladder, and nothing else")
    if parser.parse_args().every:
        for place in (MAIN, MANY):
            print(f"### {place.task}", *at_rates(at(stored(THIRD), place), ARMS, place), "", sep="\n")
        return
    for title, rows in tables().items():
        print(f"### {title}", *rows, "", sep="\n")
    third, axes = stored(THIRD), stored(AXES)
    mains = {"one right answer": at(third, MAIN), "many right answers": at(third, MANY)}
    found = {
        "three rates, second ladder": {words: summed(at(axes, place), ARMS) for words, place in PLACES.items()},
        "three rates, third ladder": {words: summed(first_rates(lines), ARMS) for words, lines in mains.items()},
        "all its rates": {words: summed(lines, ARMS) for words, lines in mains.items()},
        "all its rates, other teachers and verifiers": {
            words: about(place, ARMS) for words, place in PLACES_AROUND.items() if place != MAIN
        },
    }
    for words, columns in found.items():
        print(f"Best at an edge of {words}: {edges(columns)}.")


if __name__ == "__main__":
    main()
