# /// script
# dependencies = ["optimal-sampling-trl"]
# ///
"""Draw the tables of rollouts on one H100 from the numbers that are stored beside this script.

    python recipes/benchmarks/tables.py

`results/rollouts.json` names the card, the versions and the commands. The tables of studies are drawn by the studies,
with `--report`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from decoding import MEASURED

BATCHES = (32, 128, 256)
"""Batches that both pairs were measured at."""


def stored_rows() -> list[dict[str, Any]]:
    """The measured batches of `engine.py`, a dictionary each."""
    return [row for row in json.loads(MEASURED.read_text())["rows"] if row["fitted"]]


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


def main() -> None:
    """Print both."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("\n".join(speeds()), "\n".join(rollouts()), sep="\n\n")


if __name__ == "__main__":
    main()
