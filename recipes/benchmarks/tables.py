# /// script
# dependencies = ["optimal-sampling-trl"]
# ///
"""Draw the tables of measurements on GPUs from the numbers that are stored beside this script.

    python recipes/benchmarks/tables.py

`results/` holds those of rollouts, several cards, dense records, drafts, evaluations and training steps; each file
names the card, the versions and the commands. `printed.json` holds the tables of further commands as they were
printed, with the page that shows each, and two measurements that stand in a page's text. The tables of studies are
drawn by the studies.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from math import nan
from typing import Any

from decoding import MEASURED
from training_tables import profiled, steps

RESULTS = MEASURED.parent
BATCHES = (32, 128, 256)
"""Batches that both pairs were measured at."""


def stored(name: str) -> dict[str, Any]:
    """Read a file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def stored_rows() -> list[dict[str, Any]]:
    """The measured batches of `engine.py`, a dictionary each."""
    return [row for row in stored("rollouts")["rows"] if row["fitted"]]


def pair_name(row: dict[str, Any]) -> str:
    """The sizes of a pair, as the tables name it."""
    return f"{row['teacher']}, {row['student']}".upper()


def speeds() -> Iterator[str]:
    """Lines of the table of docs/gpus.md: tokens/s of the mixture by pair and batch."""
    yield "| teacher, student | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |"
    yield "|---" + "|--:" * len(BATCHES) + "|"
    rows = stored_rows()
    for pair in dict.fromkeys(map(pair_name, rows)):
        rates = {row["batch"]: f"{row['mixture']:,}".replace(",", " ") for row in rows if pair_name(row) == pair}
        yield f"| {pair} | " + " | ".join(rates[batch] for batch in BATCHES) + " |"


def rollouts() -> Iterator[str]:
    """The first columns of README.md's table: tokens/s of the mixture and of both models alone, and their ratio."""
    for row in stored_rows():
        rates = " | ".join(str(row[name]) for name in ("mixture", "teacher_alone", "student_alone"))
        yield f"| {pair_name(row)} | {row['batch']} | {rates} | {row['mixture'] / row['teacher_alone']:.2f} |"


def cards() -> Iterator[str]:
    """Lines of the table of README.md: tokens/s by the number of processes, each with a card of its own."""
    yield "| card | processes | tokens/s | of linear |\n|---|--:|--:|--:|"
    alone = 0.0
    for row in stored("many_gpus")["rows"]:
        alone = row["rate"] if row["processes"] == 1 else alone
        share = row["rate"] / (row["processes"] * alone)
        yield f"| {row['device']} | {row['processes']} | {row['rate']:,} | {share:.0%} |".replace(",", " ").replace(
            "%", " %"
        )


def dense() -> Iterator[str]:
    """Lines of a table of docs/dense.md: what dense records add to a decoding step."""
    yield from additions("rows", "scalars", "k_8", "k_32", "k_128")


def dense_parts() -> Iterator[str]:
    """Lines of another: the same of 32 likeliest tokens, up to the end of each part of their way."""
    yield from additions("parts", "kernels", "packing", "copy", "host", "reading")


def additions(part: str, *names: str) -> Iterator[str]:
    """A line for each batch of `dense_engine.py`: a step without dense records, and what each column adds to it."""
    for row in stored("dense_engine")[part]:
        added = " | ".join(f"{row[name]:+z.0%}".replace("%", " %") for name in names)
        yield f"| {row['batch']} | {row['step_ms']:.2f} ms | {added} |"


def dense_kernels() -> Iterator[str]:
    """Lines of a third: ms of the kernels alone, and of torch in their place."""
    for row in stored("dense_kernels")["rows"]:
        took = " | ".join(f"{row[name]:.2f}" for name in ("copy", "scalars", "k_8", "k_32", "k_128"))
        yield f"| {row['rows']} | {row['program']} | {took} |"


def evaluation() -> Iterator[str]:
    """Lines of a table of docs/performance.md: seconds of an evaluation beside the teacher and alone."""
    for row in stored("evaluation")["rows"]:
        share = f"{1 - row['alone'] / row['beside']:.0%}".replace("%", " %")
        yield f"| {row['batch']} | {row['beside']:.2f} | {row['alone']:.2f} | {share} | {row['equal']} |"


def speculation(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of a table of docs/speculative.md: tokens/s of each engine, and what they are of two others.

    The engine without drafts does the same at each ε. The fastest of its measurements counts, and the ratio to the
    slowest stands beside it.

    Args:
        rows: what `speculation.py` measured, in its order.
    """
    counts = list(dict.fromkeys(row["k"] for row in rows))
    names = {k: f"k = {k}" if k.isdigit() else f"`{k}`" for k in counts}
    drafts = [name for k, name in names.items() if k != "0"]
    ratios = [f"{name} ÷ teacher" for name in drafts] + [f"{name} ÷ k = 0" for name in drafts]
    head = ("batch", "ε", "kept", "teacher alone", *names.values(), "k = 0 ÷ teacher", *ratios)
    yield f"| {' | '.join(head)} |\n|---{'|--:' * (len(head) - 1)}|"
    for batch, epsilon in dict.fromkeys((row["batch"], row["epsilon"]) for row in rows):
        beside = [row for row in rows if row["batch"] == batch]
        alone = beside[0]["speed"] / beside[0]["of_teacher"]
        without = [row["speed"] for row in beside if row["k"] == "0"] or [nan]
        found = {row["k"]: row for row in beside if row["epsilon"] == epsilon}
        drawn = [row["speed"] for k, row in found.items() if k != "0"]
        kept = max((row["kept"] for k, row in found.items() if k.isdigit()), default=nan)
        cells = [batch, epsilon, f"{kept:.2f}", f"{alone:.0f}", *(f"{row['speed']:.0f}" for row in found.values())]
        cells += [f"{speed / alone:.2f}" for speed in (max(without), *drawn)]
        cells += [f"{speed / max(without):.2f} to {speed / min(without):.2f}" for speed in drawn]
        yield f"| {' | '.join(map(str, cells))} |"


def printed() -> Iterator[tuple[str, str]]:
    """Pages and their tables of which nothing but what was printed is stored."""
    for table in stored("printed")["tables"]:
        yield table["page"], "\n".join(table["lines"])


def main() -> None:
    """Print them all."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    trained = [partial(steps, table["arms"]) for table in stored("training")["tables"].values()]
    recorded = [partial(profiled, name, arm["profile"]) for name, arm in stored("training_profile")["arms"].items()]
    drafted = [partial(speculation, table["rows"]) for table in stored("speculation")["tables"].values()]
    plain = speeds, rollouts, cards, dense, dense_parts, dense_kernels, evaluation
    for table in (*plain, *drafted, *trained, *recorded):
        print("\n".join(table()), end="\n\n")
    for _, table in printed():
        print(table, end="\n\n")


if __name__ == "__main__":
    main()
