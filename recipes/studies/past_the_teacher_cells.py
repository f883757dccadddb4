"""Cells and grids of the tables of past_the_teacher.py's stored runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

from horizon_report import best, end, short, spread
from runs import Line, by_rate, read_runs

RESULTS = Path(__file__).parent / "results"


def stored(name: str) -> list[Line]:
    """The runs of a file that holds the success at each point of a curve, or at its end alone."""
    return [
        line | {"curve": [*enumerate(line.get("curve") or [line["end"]])]}
        for line in read_runs(RESULTS / f"{name}.jsonl")
    ]


def at_edge(lines: Sequence[Line], arm: str) -> bool:
    """Return whether the best rate of an arm is the smallest or the largest that was run."""
    rates = [runs[0]["learning_rate"] for runs in by_rate(lines, arm)]
    return best(lines, arm)[0]["learning_rate"] in (min(rates), max(rates))


def mean_end(lines: Sequence[Line], arm: str) -> float:
    """The mean end of an arm at its best rate; 0 where it was not run."""
    seeds = best(lines, arm)
    return mean(map(end, seeds)) if seeds else 0.0


def cell(lines: Sequence[Line], arm: str, highest: float) -> str:
    """The end of an arm at its best rate: bold where it is the highest, with a star where the rate is at an edge."""
    if not (seeds := best(lines, arm)):
        return "–"
    text = short(spread([*map(end, seeds)]))
    bold = "**" if mean_end(lines, arm) == highest else ""
    return f"{bold}{text}{bold}{' *' * at_edge(lines, arm)}"


def head(*titles: str) -> Iterator[str]:
    """The first two lines of a table."""
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"


def grid(arms: Sequence[str], columns: Mapping[str, list[Line]], above: Iterable[str] = ()) -> Iterator[str]:
    """A row for each arm, a column for each place.

    Args:
        above: rows that stand above the arms'.
    """
    tops = [max(mean_end(lines, arm) for arm in arms) for lines in columns.values()]
    yield from head("arm", *columns)
    yield from above
    for arm in arms:
        yield f"| {arm} | " + " | ".join(cell(lines, arm, top) for lines, top in zip(columns.values(), tops)) + " |"


def average(lines: Sequence[Line], arm: str, name: str) -> str:
    """The mean over seeds of another measurement at the end, at the rate that is best for the end."""
    seeds = best(lines, arm)
    return short(f"{mean(line[name] for line in seeds):.3f}") if seeds else "–"


def with_seeds(lines: Sequence[Line], arm: str) -> str:
    """The end of an arm with its best rate and its seeds in brackets; a star at a rate that is at an edge."""
    seeds = sorted(best(lines, arm), key=lambda line: line["seed"])
    ends = short(" ".join(f"{end(line):.3f}" for line in seeds))
    rate = f"{seeds[0]['learning_rate']:g}{'*' * at_edge(lines, arm)}"
    return f"{short(spread([*map(end, seeds)]))} ({rate}: {ends})"
