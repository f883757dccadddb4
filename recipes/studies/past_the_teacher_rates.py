"""Tables of the ladder whose arms were run at rates beyond every edge, and at equal seconds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from math import inf
from statistics import mean, median

from horizon_report import best, end, short, spread
from past_the_teacher_arms import ALONE, ARMS, MAIN, MANY, TEACHER
from past_the_teacher_cells import RESULTS, average, cell, head, mean_end
from past_the_teacher_report import at_share
from runs import Line, by_rate, read_runs
from stacks import Setting

THIRD = "past_the_teacher_main"
"""The file of its runs."""


def drawn_from(arm: str) -> str:
    """The models whose rollouts an arm learns from, which take most of its update's time."""
    mixture = ARMS[arm].mixture
    return "own" if mixture == ALONE else "teacher" if mixture == TEACHER else "mixture"


def seconds_by_rollouts(place: Setting) -> dict[str, list[float]]:
    """The seconds of an update of every timed arm of a place, by whose rollouts it learns from."""
    found: dict[str, list[float]] = {}
    for line in read_runs(RESULTS / "past_the_teacher_seconds.jsonl"):
        if line["task"] == place.task:
            found.setdefault(drawn_from(line["arm"]), []).append(line["seconds"])
    return found


def seconds_table() -> Iterator[str]:
    """A row for each place, a column for whose rollouts: the median of the arms that learn from them, the range."""
    found = {place.task: seconds_by_rollouts(place) for place in (MAIN, MANY)}
    yield from head("task", *found[MAIN.task])
    for task, kinds in found.items():
        cells = (f"{median(x):.2f} ({min(x):.2f} to {max(x):.2f}, of {len(x)})" for x in kinds.values())
        yield f"| {task} | " + " | ".join(cells) + " |"


def at_rates(lines: list[Line], arms: Iterable[str], place: Setting) -> Iterator[str]:
    """A row for each arm at a place of the third ladder; the best end first, the teacher above.

    Each is at the rate that ends best, and at equal seconds at the rate that is best then.
    """
    teacher = json.loads((RESULTS / f"{THIRD}_teachers.json").read_text())[place.task]
    seconds = {kind: median(every) for kind, every in seconds_by_rollouts(place).items()}
    measures = ("greedy", "any_right", "entropy")
    yield from head("arm", "rate", "end", "half-way", "at equal seconds", "greedy", "pass@8", "entropy", "KL(θ‖t)")
    cells = " | ".join(short(f"{teacher[name]:.3f}") for name in measures)
    yield f"| its teacher | | {short(format(teacher['right'], '.3f'))} | | | {cells} | |"
    found = {arm: seeds for arm in arms if (seeds := best(lines, arm))}
    for arm, seeds in sorted(found.items(), key=lambda item: -mean_end(lines, item[0])):
        share = min(seconds.values()) / seconds[drawn_from(arm)]
        equal = max((at_share(runs, share) for runs in by_rate(lines, arm)), key=mean)
        shares = " | ".join(short(spread(values)) for values in (at_share(seeds, 0.5), equal))
        ends = " | ".join(average(lines, arm, name) for name in (*measures, "divergence"))
        rate = f"{seeds[0]['learning_rate']:g}"
        yield f"| {arm} | {rate} | {cell(lines, arm, inf)} | {shares} | {ends} |"


def first_rates(lines: Iterable[Line]) -> list[Line]:
    """The runs at the three rates that an arm is tried at first."""
    return [line for line in lines if line["learning_rate"] in ARMS[line["arm"]].rates]


def beyond_edges(lines: list[Line]) -> Iterator[str]:
    """A row for each arm that ends higher at a rate beyond the three that it was tried at first."""
    yield from head("arm", "first three rates: best", "end", "all rates: best", "end")
    first = first_rates(lines)
    higher = {arm: mean_end(lines, arm) - mean_end(first, arm) for arm in ARMS}
    for arm in sorted((arm for arm in ARMS if higher[arm] > 0), key=lambda arm: -higher[arm]):
        cells = (
            f"{best(runs, arm)[0]['learning_rate']:g} | {short(spread([*map(end, best(runs, arm))]))}"
            for runs in (first, lines)
        )
        yield f"| {arm} | " + " | ".join(cells) + " |"
