# /// script
# dependencies = ["optimal-sampling-trl[plots]", "matplotlib"]
# ///
"""Compare recipes that may carry a student past a teacher that is often wrong, over tasks, teachers and starts.

    python recipes/studies/past_the_teacher.py --ladder output/ladder --output output/past --minutes 8
    python recipes/studies/past_the_teacher.py --output output/past --report

Tiny models, many at a time on one GPU (`stack.py`). A line of runs.jsonl for each run as its stack ends; what stands
there is not run again, the most informative come first (`past_the_teacher_arms.py` says why these), and an arm whose
best rate is the largest or smallest is run at the next one, too. Models that `--ladder` misses are made first.
STACK_GRAPHS=0 in the environment launches a rollout's steps one by one, without CUDA graphs.
`--report` prints the tables and draws past_the_teacher.png; `--alone` times each core arm of
the two main places by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

from digit_tasks import Task
from horizon_train import train
from ladder import make_ladder
from past_the_teacher_arms import ARMS, AROUND, MAIN, MANY, rates_with_edges, settings
from past_the_teacher_report import report
from runs import read_runs, run_all
from stacks import Run, Setting, missing, one, place_of, words
from stage import Arm

ALONE_STEPS = 10
PARTS = {"main": (MAIN, MANY), "around": AROUND}
"""Places that can be run by themselves: the two where every arm is run, and those about the first of them."""


def make_ladders(options: argparse.Namespace) -> None:
    """The models of each task that are missing, side by side."""
    gone = [task for task in options.tasks if not (options.ladder / task / "ladder.json").is_file()]
    if not gone:
        return
    with ProcessPoolExecutor(len(gone), mp_context=get_context("spawn")) as pool:
        jobs = {
            task: pool.submit(climb, task, options.ladder / task, options.device, *options.ladder_steps)
            for task in gone
        }
        for task, job in jobs.items():
            print(f"{task}: " + ", ".join(f"{name} {share:.4f}" for name, share in job.result().items()), flush=True)


def climb(task: str, folder: Path, device: str, teacher_steps: int, student_steps: int) -> dict[str, float]:
    """One task's models, in a process of its own."""
    torch.set_num_threads(1)
    return make_ladder(Task.of(task), folder, device, teacher_steps, student_steps)


def run_missing(places: Sequence[Setting], arms: Mapping[str, Arm], options: argparse.Namespace, path: Path) -> None:
    """Run what is missing until the deadline, `--jobs` stacks at a time, then what lies beyond an edge."""
    deadline = time.time() + 60 * options.minutes
    arguments = (arms, options.steps, str(options.ladder), options.device, deadline, options.ending)
    before = -1
    while time.time() < deadline and len(lines := read_runs(path)) > before:
        before = len(lines)
        rates = rates_with_edges(lines, arms)
        todo = list(missing(places, rates, lines, options.steps, options.ladder, options.stack))[: options.first]
        print(f"{sum(len(runs) for _, runs in todo)} runs in {len(todo)} stacks", flush=True)
        if not todo:
            return
        run_all(one, [(*stack, *arguments) for stack in todo], options.jobs, path, words)
        if options.first:
            return


def time_alone(places: Sequence[Setting], arms: Mapping[str, Arm], options: argparse.Namespace, path: Path) -> None:
    """Seconds of an update of each arm of some places by itself: in a stack the arms share one clock."""
    for place in places:
        for arm in place.arms:
            seconds = round(seconds_alone(place, arm, arms, options), 5)
            line = {"task": place.task, "arm": arm, "seconds": seconds, "device": options.device}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{place.task}, {arm}: {1e3 * seconds:.0f} ms an update", flush=True)


def seconds_alone(setting: Setting, arm: str, arms: Mapping[str, Arm], options: argparse.Namespace) -> float:
    """Seconds of an update of one run, without the measurements."""
    torch.set_num_threads(1)
    run = Run(arm, arms[arm].rates[0], 0)
    line, *_ = train(setting, [run], arms, ALONE_STEPS, str(options.ladder), options.device, math.inf)
    clock: list[float] = line["clock"]  # a point after each update; the first one sets up
    return (clock[-1] - clock[2]) / (len(clock) - 3)


def main() -> None:
    """Make the ladders that are missing, run what is missing, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = list(dict.fromkeys(setting.task for setting in settings()))
    parser.add_argument("--tasks", nargs="+", choices=every, default=every, metavar="TASK", help="%(default)s")
    parser.add_argument("--main", action="store_true", help="the two places alone where every arm is run")
    parser.add_argument("--around", action="store_true", help="the first of them with other teachers and verifiers")
    parser.add_argument("--ladder", type=Path, default=Path("output/ladder"), help="folder of ladder.py's folders")
    parser.add_argument("--ladder_steps", type=int, nargs=2, default=(2000, 3000), help="at most (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/past"), help="folder (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="updates of a run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--stack", type=int, default=240, help="runs of 41 tokens side by side (%(default)s)")
    parser.add_argument("--jobs", type=int, default=3, help="processes that share the GPU (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s")
    parser.add_argument("--ending", type=int, default=256, help="held-out prompts of pass@8 and entropy (%(default)s)")
    parser.add_argument("--first", type=int, help="stacks to run; all that are missing")
    parser.add_argument(
        "--alone", action="store_true", help="then time each core arm of the two main places by itself"
    )
    parser.add_argument("--report", action="store_true", help="report what is there, run nothing")
    options = parser.parse_args()
    chosen = [place_of(place) for part, places in PARTS.items() if getattr(options, part) for place in places]
    wanted = (lambda place: place_of(place) in chosen) if chosen else (lambda place: place.task in options.tasks)
    places = [place for place in settings(options.seeds) if wanted(place)]
    options.tasks = list(dict.fromkeys(place.task for place in places))
    path, alone = options.output / "runs.jsonl", options.output / "alone.jsonl"
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        if not options.report:
            make_ladders(options)
            run_missing(places, ARMS, options, path)
        if options.alone:
            time_alone([place for place in (MAIN, MANY) if place.task in options.tasks], ARMS, options, alone)
    finally:
        report(read_runs(path), read_runs(alone), options.output, settings(options.seeds))


if __name__ == "__main__":
    main()
