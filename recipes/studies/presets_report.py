"""The tables and the picture of presets.py's runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from matplotlib.figure import Figure

from horizon_report import error, short, spread
from optimal_sampling_trl.panels import draw_curves, finish, show_percent
from past_the_teacher_cells import at
from past_the_teacher_report import at_seconds, of_teacher
from presets_arms import BATCH, PAIR, REST, TASKS, settings_of
from runs import Line, by_rate, read_runs

PAIR_RUNS, SUMS_RUNS, SECONDS = "presets_pair", "presets_sums", "presets_seconds"
"""Names of the files of runs, and of the seconds of an update."""


class Place(NamedTuple):
    """Runs that are compared: their title, and seconds of training by arm, in any unit."""

    title: str
    lines: list[Line]
    seconds: dict[str, float]


class Cell(NamedTuple):
    """The success of the seeds of an arm at its best rate; `edge`: whether that is the largest or smallest one."""

    values: list[float]
    rate: float
    edge: bool
    seeds: list[Line]


def places_of(folder: Path) -> list[Place]:
    """Return the places that were run, the pair first."""
    pair = read_runs(folder / f"{PAIR_RUNS}.jsonl")
    sums = [line for line in read_runs(folder / f"{SUMS_RUNS}.jsonl") if not line["stopped"]]
    times = read_runs(folder / f"{SECONDS}.jsonl")
    of_runs = {arm: mean(spent) for arm in PAIR if (spent := [x["seconds"] for x in pair if x["arm"] == arm])}
    found = [Place("pair", pair, seconds_of(times, "pair") or of_runs)] if pair else []
    for task in TASKS:
        alone = seconds_of(times, task)
        *four, _ = settings_of(task)  # the last one is the first with other arms
        for i, place in enumerate(four):
            if here := at(sums, place):
                if i >= 2:  # an arm without a teacher is the same at each, and was run at one
                    here = here + [line for line in at(sums, four[i - 2]) if line["arm"] == "GRPO"]
                start, right = here[0]["curve"][0][1], of_teacher(here).get("right", 0)
                title = f"{task}, start {start:.2g}, teacher {right:.2f}".replace(" 0.", " .")
                found.append(Place(title, here, alone))
    return found


def seconds_of(times: Sequence[Line], task: str) -> dict[str, float]:
    """Seconds of an update of each arm: the least of several, which is that of a quiet machine."""
    here = [line for line in times if line["task"] == task]
    return {arm: min(x["seconds"] for x in here if x["arm"] == arm) for arm in PAIR if arm in {x["arm"] for x in here}}


def best(lines: Sequence[Line], arm: str, share: float = 1.0) -> Cell | None:
    """The seeds at the rate with the best mean after a share of the updates, of the rates that most seeds ran at."""
    rates = sorted(by_rate(lines, arm), key=lambda seeds: seeds[0]["learning_rate"])
    most = max(map(len, rates), default=0)
    full = [seeds for seeds in rates if len(seeds) == most]
    if not full:
        return None
    values = [[at_seconds([line], share) for line in seeds] for seeds in full]
    place = max(range(len(full)), key=lambda i: mean(values[i]))
    return Cell(values[place], full[place][0]["learning_rate"], place in (0, len(full) - 1), full[place])


def shares_of(place: Place) -> dict[str, float]:
    """The share of its updates that each arm makes in the seconds of the quickest one."""
    least = min(place.seconds.values(), default=0.0)
    return {arm: least / seconds for arm, seconds in place.seconds.items()}


def separates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two means differ by more than two standard errors of their difference."""
    return abs(mean(one) - mean(other)) > 2 * (error(one) ** 2 + error(other) ** 2) ** 0.5


def table(places: Sequence[Place], arms: Sequence[str], equal: str) -> Iterator[str]:
    """A row for each arm, a column for each place; in bold the best and what does not separate from it.

    Args:
        equal: "completions" or "seconds", of which all arms have the same.
    """
    columns: list[dict[str, Cell]] = []
    for place in places:
        shares = shares_of(place) if equal == "seconds" else dict.fromkeys(arms, 1.0)
        found = {arm: best(place.lines, arm, shares[arm]) for arm in arms if arm in shares}
        columns.append({arm: cell for arm, cell in found.items() if cell})
    yield "| arm | " + " | ".join(place.title for place in places) + " |"
    yield "|---" * (1 + len(places)) + "|"
    for arm in arms:
        yield f"| {arm} | " + " | ".join(_words(column, arm) for column in columns) + " |"


def _words(column: Mapping[str, Cell], arm: str) -> str:
    if arm not in column:
        return "–"
    cell, top = column[arm], max((cell.values for cell in column.values()), key=mean)
    mark = "" if len(top) == 1 or separates(cell.values, top) else "**"  # one seed separates nothing
    return f"{mark}{short(spread(cell.values))}{mark} ({cell.rate:g}{'*' if cell.edge else ''})"


def draw(places: Sequence[Place], path: Path) -> None:
    """A panel for each place: the curve of each arm at its best rate, its seeds as a band."""
    rows = -(-len(places) // 3)
    figure = Figure(figsize=(15, 4.7 * rows + 1), dpi=110, layout="constrained")
    axes = figure.subplots(rows, 3).flatten()
    for axis, place in zip(axes, places):
        found = {arm: cell for arm in PAIR if (cell := best(place.lines, arm)) is not None}
        draw_curves(axis, {arm: curves_of(cell.seeds) for arm, cell in found.items()}, "right")
        axis.set_title(place.title + note_of(place, found))
        axis.set_xlabel("completions")
        show_percent(axis.yaxis)
    finish(figure, axes[: len(places)], "completions", None)
    handles, labels = max(
        (axis.get_legend_handles_labels() for axis in axes[: len(places)]), key=lambda pair: len(pair[1])
    )
    for axis in axes[: len(places)]:
        axis.get_legend().remove()
    for axis in axes[len(places) :]:
        axis.axis("off")
    names = [label.rpartition(" (")[0] if label.endswith(" seeds)") else label for label in labels]
    figure.legend(handles, names, loc="outside lower center", ncols=5)
    figure.savefig(path)


def curves_of(seeds: Sequence[Line]) -> list[list[tuple[float, float]]]:
    """The curve of each seed over completions, which are as many between any two of its points."""
    count, end = len(seeds[0]["curve"]) - 1, seeds[0]["steps"] * BATCH
    return [[(end * i / count, y) for i, (_, y) in enumerate(line["curve"])] for line in seeds]


def note_of(place: Place, found: Mapping[str, Cell]) -> str:
    """Say for a title how many seeds the curves are of, and whose runs stand under another teacher, too."""
    seeds = {arm: len(cell.seeds) for arm, cell in found.items()}
    most = max(seeds.values())
    fewer = [f"{count} of {arm}" for arm, count in seeds.items() if count < most]
    words = f"\n{most} seed{'s' * (most > 1)}" + "".join(f", {some}" for some in fewer)
    teachers = {line.get("teacher") for line in place.lines}
    return words + (", GRPO (no teacher) as under the other" if len(teachers) > 1 else "")


def report(folder: Path, output: Path) -> None:
    """Print the tables of the runs in `folder`, and draw the picture in `output`."""
    places = places_of(folder)
    if not places:
        print("Nothing has been run to its end.")
        return
    for equal in ("completions", "seconds"):
        print(f"### At equal {equal}", *table(places, tuple(PAIR), equal), "", sep="\n")
    print(
        "### The mixtures under one loss",
        *table(places[1:2], ("RAFT, mixture (default)", *REST), "completions"),
        sep="\n",
    )
    for place in places:
        shares = ", ".join(f"{arm} {share:.2f}" for arm, share in shares_of(place).items())
        print(f"{place.title}: {len(place.lines)} runs; share of updates at equal seconds: {shares}")
    draw(places, output / "presets.png")
