# /// script
# dependencies = ["optimal-sampling-trl[plots]"]
# ///
"""Does it teach over longer completions? Arms, rates and seeds side by side on one GPU, along the axes of `SETTINGS`.

    python recipes/studies/horizon.py --ladder output/ladder --output output/horizon --minutes 8
    python recipes/studies/horizon.py --output output/horizon --report

A line of runs.jsonl for each run as its stack ends; what stands there is not run again, and the most important come
first. `--report` prints the tables of recipes/studies/README.md from it and draws horizon.png; with `--alone` each arm
that is drawn there is run once more by itself, and horizon_time.png has the curves against its seconds.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

from digit_tasks import Task
from horizon_arms import ARMS, settings
from horizon_report import DRAWN, best, report
from horizon_train import train
from ladder import make_ladder
from runs import Line, read_runs, run_all
from stacks import Run, Setting, missing, one, place_of, words


def run_alone(options: argparse.Namespace, lines: list[Line], path: Path) -> None:
    """Each arm that is drawn by itself at its best rate: in a stack the arms share one clock."""
    setting = settings(options.task, options.others, options.seeds)[0]
    here = [line for line in lines if place_of(line) == place_of(setting)]
    found = {arm: seeds[0]["learning_rate"] for arm in DRAWN if (seeds := best(here, arm))}
    done = {line["arm"] for line in read_runs(path)}
    torch.set_num_threads(1)
    for arm, rate in found.items():
        if arm not in done:
            run = Run(arm, rate, 0)
            line, *_ = train(setting, [run], ARMS, options.steps, str(options.ladder), options.device, math.inf)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{arm}: {line['clock'][-1]:.1f} s", flush=True)


def run_missing(options: argparse.Namespace, path: Path) -> None:
    """Run what is missing until the deadline, `--jobs` stacks at a time."""
    arguments = (ARMS, options.steps, str(options.ladder), options.device, time.time() + 60 * options.minutes)
    wanted = [
        setting._replace(arms=tuple(arm for arm in setting.arms if arm in options.arms))
        for setting in settings(options.task, options.others, options.seeds)
    ]
    every = missing(wanted, rates, read_runs(path), options.steps, options.ladder, options.stack)
    todo = list(every)[: options.first]
    print(f"{sum(len(runs) for _, runs in todo)} runs in {len(todo)} stacks")
    run_all(one, [(*stack, *arguments) for stack in todo], options.jobs, path, words)


def rates(setting: Setting, arm: str) -> tuple[float, ...]:
    return ARMS[arm].rates


def main() -> None:
    """Make the ladders that are missing, run what is missing, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sums-40", help="the place from which the axes go (%(default)s)")
    parser.add_argument("--others", nargs="*", default=["sums-20", "sums-80", "sort-40"], help="other tasks")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help="these alone")
    parser.add_argument("--ladder", type=Path, default=Path("output/ladder"), help="folder of ladder.py's folders")
    parser.add_argument("--output", type=Path, default=Path("output/horizon"), help="folder (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="updates of a run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--stack", type=int, default=240, help="runs of 41 tokens side by side (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes that share the GPU (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s")
    parser.add_argument("--first", type=int, help="stacks to run; all that are missing")
    parser.add_argument("--alone", action="store_true", help="then time each arm that is drawn, by itself")
    parser.add_argument("--report", action="store_true", help="report what is there, run nothing")
    options = parser.parse_args()
    path, alone = options.output / "runs.jsonl", options.output / "alone.jsonl"
    if not options.report:
        for task in (options.task, *options.others):
            make_ladder(Task.of(task), options.ladder / task, options.device, 2000, 3000)
    try:
        if not options.report:
            run_missing(options, path)
        if options.alone:
            run_alone(options, read_runs(path), alone)
    finally:
        everything = settings(options.task, options.others, options.seeds)
        report(read_runs(path), read_runs(alone), options.output, ARMS, everything)


if __name__ == "__main__":
    main()
