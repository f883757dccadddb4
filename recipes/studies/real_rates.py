"""Tables of real text that hold the learning rates of each arm beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf, isclose

from horizon_report import short
from real_arms import ARMS
from real_cells import highest, usual
from real_text_report import shown_right
from runs import Line

FACTORS = {1 / 27: "a 27th", 1 / 9: "a ninth", 1 / 3: "a third", 1.0: "usual", 3.0: "threefold", 9.0: "ninefold",
           27.0: "27-fold"}  # fmt: skip
ALWAYS = (1 / 3, 1.0, 3.0)
"""Times the usual rate, and the columns that stand there without a run."""


def rates(lines: Sequence[Line], seed: int = 0, corner: str = "arm") -> Iterator[str]:
    """One seed of each arm at each rate that it was run at; at the end with the highest on the way in brackets."""
    rows = {arm: _by_factor(lines, arm, seed) for arm in dict.fromkeys(line["arm"] for line in lines)}
    rows = {arm: found for arm, found in rows.items() if len(found) > 1}
    factors = [factor for factor in FACTORS if factor in ALWAYS or any(factor in found for found in rows.values())]
    yield f"| {corner} | " + " | ".join(FACTORS[factor] for factor in factors) + " |"
    yield "|---" * (1 + len(factors)) + "|"
    for arm, found in rows.items():
        cells = [_end_and_highest(found[factor]) if factor in found else "–" for factor in factors]
        yield f"| {arm} | " + " | ".join(cells) + " |"


def _by_factor(lines: Sequence[Line], arm: str, seed: int) -> dict[float, Line]:
    # however many seeds were run at another rate
    base = ARMS[arm].learning_rate if arm in ARMS else usual(lines, arm)[0]["learning_rate"]
    return {
        factor: line
        for line in lines
        for factor in FACTORS
        if line["arm"] == arm and line["seed"] == seed and isclose(line["learning_rate"], factor * base, rel_tol=0.01)
    }


def _end_and_highest(line: Line) -> str:
    return short(f"{shown_right(line, inf)} [{highest(line):.3f}]")
