# /// script
# dependencies = ["optimal-sampling-trl[plots]", "matplotlib"]
# ///
"""Compute how rollouts and training share GPUs: GB a card, seconds of a step, and how many cards each half wants.

    python recipes/benchmarks/scaling.py                                      # the tables of docs/scaling.md
    python recipes/benchmarks/scaling.py --picture docs/images/scaling.png

Nothing is run. A decoding step of an engine reads both models' weights and caches at the measured speed of memory,
multiplies (its share of the prompts, too), and adds a fixed time and one for each row: `decoding.fit` takes these
three from the measured steps in `results/rollouts.json`, all but those kept for a check. The update is 8 operations a
parameter of the student and token (6, and 2 more for gradient checkpointing), and a fixed time for each pass of
`MICRO_BATCH` completions: `updating.fit` takes both constants from the measured updates in `results/training.json`.
Cards are H100s with 80 GB.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import updating
from decoding import CARD, ShapePair, Speed, check_table, fit, measured, pair_of, step
from memory import ACTIVATIONS, ENGINE_GB, GB, stored
from updating import Rate, seconds, update_table

PAIRS = [("3b", "0.5b"), ("7b", "1.5b"), ("32b", "3b"), ("32b", "7b"), ("70b", "8b")]
COMPLETIONS, PROMPT, TOKENS, MICRO_BATCH = 512, 128, 2048, 4
"""A step's completions, their lengths, and the completions of a pass of the update, in the tables and the picture."""
CARDS_SHOWN = [1, 2, 4, 8, 16, 32, 64]


def rollout(pair: ShapePair, cards: int, speed: Speed) -> float:
    """Compute the seconds of a step's rollouts on engines over `cards` cards, the completions shared out evenly."""
    engines = cards // pair.split()
    if not engines:
        return math.inf
    rows = math.ceil(COMPLETIONS / engines)
    return TOKENS * step(pair, rows, PROMPT, TOKENS, speed, pair.split())


def update(pair: ShapePair, cards: int, rate: Rate) -> float:
    """Compute the seconds of a step's update on as many cards, the completions shared out evenly."""
    return seconds(pair, math.ceil(COMPLETIONS / cards), PROMPT + TOKENS, MICRO_BATCH, rate)


def least(pair: ShapePair) -> int:
    """Count the cards that engine and trainer of a pair fit on together, the trainer split over all."""
    sizes = (pair.split() << power for power in count())
    return next(cards for cards in sizes if colocated(pair, cards) <= CARD * (1 - ACTIVATIONS))


def colocated(pair: ShapePair, cards: int) -> float:
    """Compute GB a card of weights, work space and trainer, with room for 32 768 tokens of cache an engine."""
    cache = 2 * (pair.teacher.cached + pair.student.cached) * 32768 / GB
    return (pair.weights + cache) / pair.split() + ENGINE_GB + 16 * stored(pair.student) / GB / cards


def best_split(pair: ShapePair, cards: int, speed: Speed, rate: Rate) -> tuple[int, float]:
    """Find the cards of the engines for which a server and trainers on the rest take the least; and the seconds."""
    choices = range(pair.split(), cards, pair.split())
    times = {engines: rollout(pair, engines, speed) + update(pair, cards - engines, rate) for engines in choices}
    return min(times.items(), key=lambda item: item[1], default=(0, math.inf))


def pair_table(speed: Speed, rate: Rate, cards: int = 8) -> Iterator[str]:
    """Lines of the table of pairs: memory, and how `cards` are best divided."""
    yield (
        "| teacher, student | cards of an engine | its weights, GB a card | trainer, GB whole | over 8 "
        "| least cards, all colocated | rollouts : update, s on 8 | cards for a server, of 8 |"
    )
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for teacher, student in PAIRS:
        pair = pair_of(teacher, student)
        trainer = 16 * stored(pair.student) / GB
        times = f"{rollout(pair, cards, speed):.0f} : {update(pair, cards, rate):.0f}"
        engines, _ = best_split(pair, cards, speed, rate)
        yield (
            f"| {teacher.upper()}, {student.upper()} | {pair.split()} | {pair.weights / pair.split():.1f} "
            f"| {trainer:.0f} | {trainer / 8:.1f} | {least(pair)} | {times} | {engines} |"
        )


def draw(path: Path, speed: Speed, rate: Rate) -> None:
    """Draw tokens/s of whole steps over cards, colocated and with the best server."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for color, (teacher, student) in enumerate(PAIRS):
        pair = pair_of(teacher, student)
        both = [cards for cards in CARDS_SHOWN if cards >= least(pair)]
        here = [COMPLETIONS * TOKENS / (rollout(pair, cards, speed) + update(pair, cards, rate)) for cards in both]
        served = [cards for cards in CARDS_SHOWN if best_split(pair, cards, speed, rate)[0]]
        there = [COMPLETIONS * TOKENS / best_split(pair, cards, speed, rate)[1] for cards in served]
        axes.plot(both, here, "o-", color=f"C{color}", label=f"{teacher.upper()}, {student.upper()}")
        axes.plot(served, there, ":", color=f"C{color}")
    axes.set(xscale="log", yscale="log", xlabel="H100s", ylabel="tokens/s of whole steps")
    axes.set_xticks(CARDS_SHOWN, [str(cards) for cards in CARDS_SHOWN])
    axes.set_title(f"Computed: {COMPLETIONS} completions of {TOKENS} tokens; dotted: a server beside trainers")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the tables, and draw the picture where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, help="a PNG")
    options = parser.parse_args()
    rows, updates = measured(), updating.measured()
    speed, rate = fit(rows), updating.fit(updates)
    flops = f"{1e-12 / speed.operation:.0f} TFLOP/s"
    print(f"A decoding step: {speed.fixed * 1e3:.2f} ms, {speed.row * 1e6:.1f} µs a row, {flops}")
    print(f"An update: {rate.a_pass:.3f} s a pass, {1e-12 / rate.operation:.0f} TFLOP/s\n")
    tables = check_table(speed, rows), update_table(rate, updates), pair_table(speed, rate)
    print(*("\n".join(table) for table in tables), sep="\n\n")
    if options.picture:
        draw(options.picture, speed, rate)
        print(f"\nPicture: {options.picture}")


if __name__ == "__main__":
    main()
