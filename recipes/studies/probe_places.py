# /// script
# dependencies = ["optimal-sampling-trl", "pandas"]
# ///
"""Does a number of the probe say what training gains? At the places of past_the_teacher.py, whose ends are known.

    python recipes/studies/probe_places.py --ladder output/ladder --output output/probe_places.json

Probes each place that has runs in results/past_the_teacher.jsonl and models in the ladder, 64 prompts with 8
completions. Fixed before anything was looked at: the places in the order of the study, every second one from the first
to choose the number, the others to report it; the gain, `GAIN`, at each arm's best rate, a mean over its seeds; the
numbers, `NUMBERS`; the choice, that of the largest |ρ| (Spearman). Writes all numbers, and prints the correlations on
both halves.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

from digit_tasks import Task
from optimal_sampling_trl import OptimalSamplingV1
from optimal_sampling_trl.probe import Probe, probe
from past_the_teacher_arms import settings
from runs import Line, read_runs

RUNS = Path(__file__).parent / "results" / "past_the_teacher.jsonl"
GAIN = ("RAFT, mixture", "GRPO, own")
"""Arms whose ends are subtracted: what the mixture brings over the student's own samples."""
NUMBERS: dict[str, Callable[[Probe], float]] = {
    "success of the student": lambda found: found.row("student").success,
    "success of the teacher": lambda found: found.row("teacher").success,
    "success at the solved α": lambda found: found.row("α solved").success,
    "its gain over the student": lambda found: found.row("α solved").success - found.row("student").success,
    "pass@8 at the solved α": lambda found: found.row("α solved").any_success,
    "KL(θ‖t)": lambda found: found.row("student").kl_teacher,
    "mass in common": lambda found: found.overlap,
    "acceptance at the solved α": lambda found: found.row("α solved").acceptance,
}


def reward_of(task: Task) -> Callable[..., list[float]]:
    """Return the exact reward of texts; `many` accepts each step of the digit or the digit plus one."""

    def many(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        return [float(_is_climb(prompt.removesuffix("="), text)) for prompt, text in zip(prompts, completions)]

    return many if task.name == "many" else task.reward


def _is_climb(digits: str, text: str) -> bool:
    if len(text) != len(digits) or not text.isdigit():
        return False
    sums = [0, *map(int, text)]
    return all((after - before - int(digit)) % 10 <= 1 for before, after, digit in zip(sums, sums[1:], digits))


def end(lines: Sequence[Line], place: tuple[str, ...], arm: str) -> float:
    """Return how often an arm is right at its best rate, a mean over seeds; NaN where it has no runs."""
    rates: dict[float, list[float]] = {}
    for line in lines:
        if place_of(line) == place and line["arm"] == arm and line["verifier"] == "exact" and not line["prompts"]:
            rates.setdefault(line["learning_rate"], []).append(line["right"])
    return max(map(mean, rates.values()), default=float("nan"))


def place_of(line: Line) -> tuple[str, ...]:
    """Return task, teacher and student of a run."""
    return line["task"], line["teacher"], line["student"]


def places(lines: Sequence[Line], ladder: Path) -> list[tuple[str, ...]]:
    """Return the places that have runs and models, in the order of the study."""
    run = {place_of(line) for line in lines}
    known = dict.fromkeys((one.task, one.teacher, one.student) for one in settings())
    return [one for one in known if one in run and all((ladder / one[0] / name).is_dir() for name in one[1:])]


def look(place: tuple[str, ...], ladder: Path, prompts: int, n: int) -> dict[str, float]:
    """Probe one place, and return its numbers."""
    task = Task.of(place[0])
    teacher, student = (str(ladder / place[0] / name) for name in place[1:])
    with OptimalSamplingV1(teacher, student, backend="transformers") as sampler:
        found = probe(
            sampler, task.dataset("test", prompts, seed=0), reward_of(task), n=n, max_tokens=task.completion_length
        )
    return {name: number(found) for name, number in NUMBERS.items()}


def correlate(table: Sequence[dict[str, Any]], number: str) -> float:
    """Return Spearman's ρ of a number with the gain."""
    ranks = pd.DataFrame({name: [row[name] for row in table] for name in (number, "gain")}).rank()
    return float(ranks[number].corr(ranks["gain"]))


def main() -> None:
    """Probe, correlate, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladder", type=Path, default=Path("output/ladder"), help="folder of ladder.py (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/probe_places.json"), help="file (%(default)s)")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of each place (%(default)s)")
    parser.add_argument("--n", type=int, default=8, help="completions of each (%(default)s)")
    options = parser.parse_args()
    lines, table = read_runs(RUNS), []
    for place in places(lines, options.ladder):
        gain = end(lines, place, GAIN[0]) - end(lines, place, GAIN[1])
        table.append({"place": place, "gain": gain, **look(place, options.ladder, options.prompts, options.n)})
        print(json.dumps(table[-1], ensure_ascii=False), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(table, indent=1, ensure_ascii=False))
    chosen, reported = table[::2], table[1::2]
    print(f"\nSpearman's ρ with {GAIN[0]} - {GAIN[1]}: {len(chosen)} places to choose on, {len(reported)} to report")
    for name in NUMBERS:
        print(
            f"{name:28} {correlate(chosen, name):6.2f} {correlate(reported, name):6.2f} {correlate(table, name):6.2f}"
        )
    best = max(NUMBERS, key=lambda name: abs(correlate(chosen, name)))
    print(f"Chosen: {best}, ρ = {correlate(reported, best):.2f} on the others.")


if __name__ == "__main__":
    main()
