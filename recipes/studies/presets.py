# /// script
# dependencies = ["optimal-sampling-trl[plots]", "matplotlib"]
# ///
"""Compare published mixtures with our defaults and with what needs no mixture, at equal completions.

    python recipes/studies/presets.py --ladder output/ladder --minutes 8 --jobs 2 --pair_jobs 34
    python recipes/studies/presets.py --report recipes/studies/results

On the embedded pair the trainers run, each published mixture by its `preset`. On sums-40, from two starts and with
two teachers, many tiny students are trained as one batch (`stack.py`): the mixtures are the presets' own, the losses
are the package's functions; a setting that the stack does not know is refused. Every update has 72 completions, groups
of 8 or, with MENTOR, of 12. A line of presets_pair.jsonl or presets_sums.jsonl for each run as it ends; what stands
there is not run again, and an arm whose best rate is the largest or smallest is run at the next one, too. `--alone`
times the updates of each arm and adds its lines to presets_seconds.jsonl. Prints the tables and draws presets.png.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

import losses
from past_the_teacher import make_ladders, run_missing, time_alone
from past_the_teacher_arms import beyond
from presets_arms import BATCH, PAIR, TASKS, arms_of, settings_of
from presets_report import PAIR_RUNS, SECONDS, SUMS_RUNS, report
from runs import Line, by_rate, read_runs, run_all

SHORT, LONG = 10, 60
"""Updates of two runs on the pair, which are measured equally often: their difference is that of the updates alone."""


def run_pair(options: argparse.Namespace) -> None:
    """The runs on the pair that are missing, one seed of every arm after the other; then what lies beyond an edge."""
    path = options.output / f"{PAIR_RUNS}.jsonl"
    while True:
        lines = read_runs(path)
        done = {(line["arm"], line["learning_rate"], line["seed"], line["steps"]) for line in lines}
        keys = [
            (arm, rate, seed, options.pair_steps)
            for seed in range(options.seeds)
            for arm in PAIR
            for rate in rates_on_pair(lines, arm, options.seeds)
        ]
        tasks = [(*key, None, "", BATCH) for key in keys if key not in done]
        if tasks:
            run_all(losses.run, tasks[: options.first], options.pair_jobs, path, losses.words)
        if options.first or not tasks:
            return


def rates_on_pair(lines: Sequence[Line], arm: str, seeds: int) -> tuple[float, ...]:
    """The rates of an arm, and one beyond for as long as the best of those run is at an end."""
    tries = PAIR[arm]
    ends = {runs[0]["learning_rate"]: [run["curve"][-1][1] for run in runs] for runs in by_rate(lines, arm)}
    while (more := beyond(tries, ends, seeds)) is not None:
        tries = tuple(sorted((*tries, more)))
    return tries


def time_pair(options: argparse.Namespace) -> None:
    """Seconds of an update of each arm on the pair, one arm after the other."""
    run_all(seconds_on_pair, [(arm,) for arm in PAIR], 1, options.output / f"{SECONDS}.jsonl", str)


def seconds_on_pair(arm: str) -> list[Line]:
    """The processor's seconds of an update, in a process of its own: others use the machine, too."""
    clock = []
    for steps in (SHORT, SHORT, LONG):  # the first one sets up
        start = time.process_time()
        losses.run(arm, PAIR[arm][1], 0, steps, None, "", BATCH)
        clock.append(time.process_time() - start)
    return [{"task": "pair", "arm": arm, "seconds": round((clock[2] - clock[1]) / (LONG - SHORT), 5), "device": "cpu"}]


def time_sums(options: argparse.Namespace) -> None:
    """The same of the stacks, of one run each."""
    place = settings_of(options.task)[0]._replace(arms=tuple(PAIR))
    time_alone([place], arms_of(options.steps), options, options.output / f"{SECONDS}.jsonl")


def run_sums(options: argparse.Namespace) -> None:
    """The runs on sums-40 that are missing, until the deadline; then what lies beyond an edge."""
    make_ladders(options)
    places = [place._replace(seeds=options.seeds) for place in settings_of(options.task)]
    run_missing(places, arms_of(options.steps), options, options.output / f"{SUMS_RUNS}.jsonl")


def main() -> None:
    """Run what is missing on both tasks, side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("pair", "sums"), help="the pair alone, or the stacks")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help="of the stacks (%(default)s)")
    parser.add_argument("--ladder", type=Path, default=Path("output/ladder"), help="folder of ladder.py's folders")
    parser.add_argument("--ladder_steps", type=int, nargs=2, default=(2000, 3000), help="at most (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/presets"), help="folder (%(default)s)")
    parser.add_argument("--steps", type=int, default=133, help="updates of a run on sums-40 (%(default)s)")
    parser.add_argument("--pair_steps", type=int, default=250, help="updates of a run on the pair (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--stack", type=int, default=200, help="runs of 41 tokens side by side (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes of stacks (%(default)s)")
    parser.add_argument("--pair_jobs", type=int, default=2, help="runs of the pair at the same time (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop sums-40 after (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the stacks")
    parser.add_argument("--ending", type=int, default=256, help="held-out prompts of pass@8 and entropy (%(default)s)")
    parser.add_argument("--first", type=int, help="stacks and runs on the pair to run; all that are missing")
    parser.add_argument("--alone", action="store_true", help="time each arm by itself, run nothing else")
    parser.add_argument("--report", type=Path, help="report the runs of this folder, run nothing")
    options = parser.parse_args()
    options.tasks = [options.task]
    options.output.mkdir(parents=True, exist_ok=True)
    timed, works = {"pair": time_pair, "sums": time_sums}, {"pair": run_pair, "sums": run_sums}
    names = [options.only] if options.only else list(works)
    if options.alone:
        for name in names:
            timed[name](options)
        return
    try:
        for name in () if options.report else names:
            works[name](options)
    finally:
        report(options.report or options.output, options.output)


if __name__ == "__main__":
    main()
