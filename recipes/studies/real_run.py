"""Shared by the studies on real text: models that are taught first, a run, the jobs of a machine, the flags."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from math import nan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from exam import ExamWatch
from real_arms import Arm, build
from real_exam import TRIES, EngineExam
from real_models import teach
from real_tasks import TASKS, Task
from runs import Line, read_runs, run_all, take_card


class Job(NamedTuple):
    """The work of one process on one engine: runs (arm, learning rate, seed), one after the other."""

    task: str
    student: str
    runs: list[tuple[str, float, int]]
    teacher: str = "separate"


class Lesson(NamedTuple):
    """A teaching before a study: a base's folder, the new model's, right answers that are enough, most updates."""

    task: Task
    base: str
    folder: Path
    goal: float
    steps: int


def teach_all(lessons: Iterable[Lesson], options: argparse.Namespace) -> None:
    """Teach the models that are not there, side by side; a line of taught.jsonl for each."""
    missing = [(lesson, options.cpu) for lesson in lessons if not (lesson.folder / "teaching.json").is_file()]
    if missing:
        run_all(_teach, missing, len(missing), options.output / "taught.jsonl", lambda lines: str(lines[0]))


def _teach(lesson: Lesson, cpu: bool) -> list[Line]:
    torch.set_num_threads(1)
    found = teach(*lesson, "cpu" if cpu else "cuda")
    return [{"task": lesson.task.key, "folder": lesson.folder.name} | found]


def train(
    key: Line, arm: Arm, exam: EngineExam, models: tuple[str, str], options: argparse.Namespace, deadline: float,
    watch_kind: type[ExamWatch] = ExamWatch,
) -> Line:  # fmt: skip
    """One run from its start to its end, or to the deadline; no weights are kept.

    A line of points.jsonl is written at each measurement, so that a run that is broken off has told its curve.

    Args:
        key: what names the run, with its "learning_rate" and "seed".
        models: the teacher and the student, as `real_arms.build` takes them.
    """
    batch, steps = arm.budget(options.batch, options.steps)

    def note(points: list[tuple[float, ...]]) -> None:
        append(options.output / "points.jsonl", key | {"steps": steps, "point": points[-1]})

    watch = watch_kind(exam, batch, max(steps // 6, 1), deadline, note)
    if not options.cpu:
        torch.cuda.reset_peak_memory_stats()
    with TemporaryDirectory() as home:
        settings = {
            "output_dir": home, "max_steps": steps, "seed": key["seed"], "learning_rate": key["learning_rate"],
            "per_device_train_batch_size": batch,
        }  # fmt: skip
        trainer = build(arm, exam.task, models, settings, options.cpu, watch)
        watch.trainer = exam.trainer = trainer
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        return key | {
            "steps": steps, "done": trainer.state.global_step, "points": watch.points, **exam.take_all(),
            **watch.ends(), "of_teacher": exam.of_teacher(),
            "gb": nan if options.cpu else torch.cuda.max_memory_allocated() / 1e9,
            "log": [logged[0], logged[-1]] if logged else [],
        }  # fmt: skip


def append(path: Path, line: Line) -> None:
    """Add a line to a file, which other processes add to as well."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


Run = Callable[[Job, str, float, int, argparse.Namespace, float], Line]
"""A study's run: its job, arm, learning rate and seed, the options, and the time at which it has to end."""


def run_jobs(
    run: Run, jobs: Callable[[argparse.Namespace, list[Line]], Iterable[Job]], options: argparse.Namespace,
    deadline: float,
) -> None:  # fmt: skip
    """Do the jobs that `jobs` lists beside the runs that are there; each run is written as it ends."""
    path = options.output / "runs.jsonl"
    todo = list(jobs(options, read_runs(path)))
    tasks = [(run, job, options, deadline, number % options.gpus) for number, job in enumerate(todo)]
    run_all(work, tasks, options.jobs * options.gpus, path, str)


def work(run: Run, job: Job, options: argparse.Namespace, deadline: float, device: int) -> list[Line]:
    """All runs of a job, each written as it ends; returns no line. Raises RuntimeError at last where one failed."""
    if not options.cpu:
        take_card(device)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    failed = []
    for name, rate, seed in job.runs:
        if time.time() > deadline:
            break
        try:
            line = run(job, name, rate, seed, options, deadline)
        except Exception:  # the next arm may do
            traceback.print_exc()
            failed.append((name, rate, seed))
            continue
        append(options.output / "runs.jsonl", line)
        first, last = line["points"][0], line["points"][-1]
        print(f"{job.task}, {job.student}, {name}, {rate:g}, seed {seed}: {line['done']} steps, {last[2]:.0f} s, "
              f"right {first[3]:.3f} → {last[3]:.3f}, pass@8 {line['any_right']:.3f}", flush=True)  # fmt: skip
    if failed:
        raise RuntimeError(f"{job.task}, {job.student}: {failed} failed")
    return []


def flags(description: str | None, students: Sequence[str], arms: Sequence[str]) -> argparse.ArgumentParser:
    """The flags that the studies share; each sets its own defaults of those without one here."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the model's file; by default the installed package's")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="(%(default)s)")
    parser.add_argument("--students", nargs="+", choices=students, help="(%(default)s)")
    parser.add_argument("--arms", nargs="+", choices=arms, metavar="ARM", help="by name")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0], help="times each arm's rate (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(%(default)s)")
    parser.add_argument("--steps", type=int, help="updates (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="completions of an update (%(default)s)")
    parser.add_argument("--held_out", type=int, default=512, help=f"questions; a quarter {TRIES} times (%(default)s)")
    parser.add_argument("--jobs", type=int, default=4, help="processes on each GPU, about 14 GB each (%(default)s)")
    parser.add_argument("--gpus", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after (%(default)s)")
    parser.add_argument("--output", type=Path, help="folder (%(default)s)")
    parser.add_argument("--models", type=Path, help="folder of the students and teachers (that of --output)")
    parser.add_argument("--cpu", action="store_true", help="a look at a step or two, on the transformers backend")
    parser.add_argument("--report", action="store_true", help="report what is there, run nothing")
    return parser
