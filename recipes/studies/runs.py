"""Runs of a study, a line of JSON each: those that a file holds, and more of them, side by side in processes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def read_runs(path: Path) -> list[Line]:
    """The lines of a file; none where it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def whole_runs(done: Iterable[Line], steps: Callable[[Line], int]) -> set[tuple]:
    """The runs on real text that took all their updates, by task, student, arm, learning rate and seed.

    Args:
        done: the lines of a file.
        steps: how many updates the run of a line is to take.
    """
    key = itemgetter("task", "student", "arm", "learning_rate", "seed")
    return {key(line) for line in done if line["done"] == line["steps"] == steps(line)}


def one_each(lines: Iterable[Line]) -> list[Line]:
    """Keep one run on real text of each key and number of updates: the one that made most; of equals the last."""
    key = itemgetter("task", "student", "arm", "learning_rate", "seed", "steps")
    found: dict[tuple, Line] = {}
    for line in lines:
        if line["done"] >= found.setdefault(key(line), line)["done"]:
            found[key(line)] = line
    return list(found.values())


def by_rate(lines: Iterable[Line], arm: str) -> list[list[Line]]:
    """The seeds of an arm at each learning rate that it was run at."""
    rates: dict[float, list[Line]] = {}
    for line in lines:
        if line["arm"] == arm:
            rates.setdefault(line["learning_rate"], []).append(line)
    return list(rates.values())


def take_card(number: int) -> None:
    """Let this process see one of the GPUs that it was given, by its number among them. Call it before CUDA starts.

    And name a free port for it: one that the environment names is the same for all processes of a study, and so is
    TRL's first choice.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = given.split(",")[number] if given else str(number)
    from optimal_sampling_trl.trainers.engines.colocated import take_port  # with TRL, which reports do without

    take_port()


def run_all(
    work: Callable[..., list[Line]], tasks: Sequence[tuple], jobs: int, path: Path, words: Callable[[list[Line]], str]
) -> None:
    """Append what `work(*task)` returns for each task to a file, as it ends. One that fails stops no other.

    Each task has a process of its own.

    Args:
        work: a function of a module, which a new process can import; it may return no line.
        tasks: the arguments of each call.
        jobs: processes at the same time.
        path: the file; its folder is made.
        words: what to print of the lines of a task.

    Raises:
        SystemExit: after all have ended, where some failed; each is named when it does.
    """
    failed = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool, path.open("a") as file:
        futures = {pool.submit(work, *task): task for task in tasks}
        for number, future in enumerate(as_completed(futures), 1):
            if (error := future.exception()) is not None:
                failed += 1
                print(f"{number}/{len(tasks)} failed: {error!r}, of {futures[future]}", file=sys.stderr, flush=True)
                continue
            lines = future.result()
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            if lines:
                print(f"{number}/{len(tasks)} {words(lines)}", flush=True)
    if failed:
        raise SystemExit(f"{failed} of {len(tasks)} runs failed.")
