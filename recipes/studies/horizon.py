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
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

from horizon_arms import ARMS, Setting, settings
from horizon_report import DRAWN, best, place_of, report
from horizon_train import Run, key_of, train
from ladder import Task, make_ladder
from runs import Line, read_runs, run_all


def stacks(options: argparse.Namespace, done: list[Line]) -> Iterator[tuple[Setting, list[Run]]]:
    """What is missing, in order, in stacks of about `--stack` runs."""
    finished = {json.dumps({name: line[name] for name in KEY}) for line in done if not line["stopped"]}
    for setting in settings(options.task, options.others, options.seeds):
        gone = [name for name in setting[1:3] if not (options.ladder / setting.task / name).is_dir()]
        if gone:
            print(f"{setting.task} has no {' and no '.join(gone)}: left out")
            continue
        runs = [
            Run(arm, rate, seed)
            for seed in range(setting.seeds)
            for arm in setting.arms
            if arm in options.arms
            for rate in ARMS[arm].rates
        ]
        runs = [run for run in runs if json.dumps(key_of(setting, options.steps, run)) not in finished]
        size = max(options.stack * 41 // Task.of(setting.task).completion_length, 1)  # by the memory that it takes
        for first in range(0, len(runs), size):
            yield setting, runs[first : first + size]


def run_alone(options: argparse.Namespace, lines: list[Line], path: Path) -> None:
    """Each arm that is drawn by itself at its best rate: in a stack the arms share one clock."""
    setting = settings(options.task, options.others, options.seeds)[0]
    here = [line for line in lines if place_of(line) == setting[:3]]
    found = {arm: seeds[0]["learning_rate"] for arm in DRAWN if (seeds := best(here, arm))}
    done = {line["arm"] for line in read_runs(path)}
    torch.set_num_threads(1)
    for arm, rate in found.items():
        if arm not in done:
            line, *_ = train(
                setting, [Run(arm, rate, 0)], options.steps, str(options.ladder), options.device, math.inf
            )
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{arm}: {line['clock'][-1]:.1f} s", flush=True)


def run_missing(options: argparse.Namespace, path: Path) -> None:
    """Run what is missing until the deadline, `--jobs` stacks at a time."""
    arguments = (options.steps, str(options.ladder), options.device, time.time() + 60 * options.minutes)
    todo = list(stacks(options, read_runs(path)))[: options.first]
    print(f"{sum(len(runs) for _, runs in todo)} runs in {len(todo)} stacks")
    run_all(one, [(*stack, *arguments) for stack in todo], options.jobs, path, words)


KEY = ("task", "teacher", "student", "steps", "arm", "learning_rate", "seed")


def one(setting: Setting, runs: list[Run], steps: int, ladder: str, device: str, deadline: float) -> list[Line]:
    """A stack in a process of its own; nothing where the time is over."""
    torch.set_num_threads(1)
    return train(setting, runs, steps, ladder, device, deadline) if time.time() < deadline else []


def words(lines: list[Line]) -> str:
    stopped = ", stopped" if lines[0]["stopped"] else ""
    return f"{'/'.join(place_of(lines[0]))}: {len(lines)} runs, {lines[0]['seconds']:.0f} s{stopped}"


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
