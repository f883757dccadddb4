"""The missing runs of a study, in stacks side by side: shared by the studies of long tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from digit_tasks import Task
from runs import Line
from stage import BATCH, Arm


class Setting(NamedTuple):
    """One place on the axes of a study.

    Args:
        task, teacher, student: as `ladder.py` names them.
        arms: which are run there.
        seeds: how many.
        verifier: "exact"; "graded" is the share of leading tokens that are right; "noisy" is wrong in one of 20.
        prompts: how many different ones there are; 0 is a new one each time.
        batch: completions of an update.
    """

    task: str
    teacher: str
    student: str
    arms: tuple[str, ...]
    seeds: int
    verifier: str = "exact"
    prompts: int = 0
    batch: int = BATCH


class Run(NamedTuple):
    """One student of a stack."""

    arm: str
    learning_rate: float
    seed: int


PLACE = ("task", "teacher", "student", "verifier", "prompts")


def place_of(line: Line | Setting) -> tuple[Any, ...]:
    """Return where on the axes a run or a setting stands."""
    values = line._asdict() if isinstance(line, Setting) else line
    return tuple(values[name] for name in PLACE)


def key_of(setting: Setting, steps: int, run: Run) -> dict[str, Any]:
    """Return what tells a run from all others."""
    return dict(zip(PLACE, place_of(setting))) | {"steps": steps} | run._asdict()


Rates = Callable[[Setting, str], Sequence[float]]
"""The learning rates of an arm at a place."""


def missing(
    settings: Sequence[Setting], rates: Rates, done: Sequence[Line], steps: int, ladder: Path, size: int
) -> Iterator[tuple[Setting, list[Run]]]:
    """Yield what has not been run to its end, in order, in stacks.

    Args:
        size: runs of a stack where a completion has 41 tokens; by the memory that it takes, more where it has fewer.
    """
    finished = {tuple(line[name] for name in (*PLACE, "steps", *Run._fields)) for line in done if not line["stopped"]}
    for setting in settings:
        gone = [name for name in (setting.teacher, setting.student) if not (ladder / setting.task / name).is_dir()]
        if gone:
            print(f"{setting.task} has no {' and no '.join(gone)}: left out")
            continue
        every = [
            Run(arm, rate, seed)
            for seed in range(setting.seeds)
            for arm in setting.arms
            for rate in rates(setting, arm)
        ]
        runs = [run for run in every if (*place_of(setting), steps, *run) not in finished]
        most = max(size * 41 // Task.of(setting.task).completion_length, 1)
        count = -(-len(runs) // most)  # of stacks, about equally large
        for part in range(count):
            yield setting, runs[part * len(runs) // count : (part + 1) * len(runs) // count]


_last = 0.0


def one(
    setting: Setting,
    runs: list[Run],
    arms: Mapping[str, Arm],
    steps: int,
    ladder: str,
    device: str,
    deadline: float,
    ending: int = 0,
) -> list[Line]:
    """A stack in a process of its own; nothing where the time is over, or less than the last one took is there."""
    import torch

    from horizon_train import train

    global _last
    torch.set_num_threads(1)
    if time.time() + 0.8 * _last > deadline:
        return []
    start = time.time()
    lines = train(setting, runs, arms, steps, ladder, device, deadline, ending)
    _last = time.time() - start
    return lines


def words(lines: list[Line]) -> str:
    """Return what is printed of a stack that ended."""
    stopped = ", stopped" if lines[0]["stopped"] else ""
    return f"{'/'.join(map(str, place_of(lines[0])))}: {len(lines)} runs, {lines[0]['seconds']:.0f} s{stopped}"
