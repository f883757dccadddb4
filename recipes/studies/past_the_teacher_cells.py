"""Cells and grids of the tables of past_the_teacher.py's stored runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from horizon_report import MEASURES, best, end, error, short, spread
from runs import Line, by_rate, read_runs
from stacks import Setting, place_of

RESULTS = Path(__file__).parent / "results"


class Summary(NamedTuple):
    """The end of an arm at its best rate, as a table shows it.

    Args:
        end: the mean over seeds.
        error: its standard error; None of one seed.
        edge: whether the rate is the smallest or the largest that was run.
    """

    end: float
    error: float | None
    edge: bool

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.3f}"
        return short(f"{self.end:.3f}{error}")


@cache
def stored(name: str) -> list[Line]:
    """The runs of a file that holds the success at each point of a curve, or at its end alone; read once."""
    return [
        line | {"curve": [*enumerate(line.get("curve") or [line["end"]])]}
        for line in read_runs(RESULTS / f"{name}.jsonl")
    ]


def at(lines: Iterable[Line], place: Setting) -> list[Line]:
    """The runs of one place."""
    return [line for line in lines if place_of(line) == place_of(place)]


def at_edge(lines: Sequence[Line], arm: str) -> bool:
    """Return whether the best rate of an arm is the smallest or the largest that was run."""
    rates = [runs[0]["learning_rate"] for runs in by_rate(lines, arm)]
    return best(lines, arm)[0]["learning_rate"] in (min(rates), max(rates))


def mean_end(lines: Sequence[Line], arm: str) -> float:
    """The mean end of an arm at its best rate; 0 where it was not run."""
    seeds = best(lines, arm)
    return mean(map(end, seeds)) if seeds else 0.0


def summary(lines: Sequence[Line], arm: str) -> Summary | None:
    """The summary of the runs of an arm; None where it was not run."""
    if not (seeds := best(lines, arm)):
        return None
    ends = [*map(end, seeds)]
    return Summary(mean(ends), error(ends) if len(ends) > 1 else None, at_edge(lines, arm))


def summaries(lines: Iterable[Line]) -> dict[str, Summary]:
    """The summary of each arm at a place of which the lines hold means alone."""
    found = {}
    for line in lines:
        rates = [*map(float, line["rates"])]
        edge = line["learning_rate"] in (min(rates), max(rates))
        found[line["arm"]] = Summary(line["end"], line["error"], edge)
    return found


def cell(lines: Sequence[Line], arm: str, highest: float) -> str:
    """The end of an arm at its best rate: bold where it is the highest, with a star where the rate is at an edge."""
    return show(summary(lines, arm), highest)


def show(found: Summary | None, highest: float) -> str:
    """The text of a cell: a dash for an arm that was not run."""
    if found is None:
        return "–"
    bold = "**" if found.end == highest else ""
    return f"{bold}{found}{bold}{' *' * found.edge}"


def head(*titles: str) -> Iterator[str]:
    """The first two lines of a table."""
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"


def grid(arms: Sequence[str], columns: Mapping[str, list[Line]], above: Iterable[str] = ()) -> Iterator[str]:
    """A row for each arm, a column for each place.

    Args:
        above: rows that stand above the arms'.
    """
    return grid_of(arms, {words: summed(lines, arms) for words, lines in columns.items()}, above)


def summed(lines: Sequence[Line], arms: Iterable[str]) -> dict[str, Summary]:
    """The summary of each of some arms that was run."""
    return {arm: found for arm in arms if (found := summary(lines, arm)) is not None}


def grid_of(
    arms: Sequence[str], columns: Mapping[str, Mapping[str, Summary]], above: Iterable[str] = ()
) -> Iterator[str]:
    """Draw `grid` from the summary of each arm of each column."""
    yield from head("arm", *columns)
    yield from above
    tops = [max(column[arm].end for arm in arms if arm in column) for column in columns.values()]
    for arm in arms:
        cells = (show(column.get(arm), top) for column, top in zip(columns.values(), tops))
        yield f"| {arm} | " + " | ".join(cells) + " |"


def teacher_rows(teachers: list[dict[str, float]]) -> Iterator[str]:
    """The rows of what the teacher of each column is, as far as it is stored of all."""
    for name, words in MEASURES.items():
        if all(name in shares for shares in teachers):
            yield f"| teacher, {words} | " + " | ".join(short(f"{shares[name]:.3f}") for shares in teachers) + " |"


def edges(columns: Mapping[str, Mapping[str, Summary]]) -> str:
    """Say how many arms of each place were best at the smallest or the largest rate."""
    return "; ".join(
        f"{words}: {sum(one.edge for one in arms.values())} of {len(arms)}" for words, arms in columns.items()
    )


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
