# /// script
# dependencies = ["optimal-sampling-trl[plots]"]
# ///
"""Compare losses on a tiny pair: each arm from the same start with the same number of samples, on CPUs.

    OMP_NUM_THREADS=1 python recipes/studies/losses.py --jobs 2 --steps 300 --seeds 3 --learning_rates 3e-4 1e-3

The pair is the embedded one, or two models of ladder.py, whose answers are longer (`--ladder output/ladder`). Writes
output/losses/runs.jsonl, a line for each run as it ends (a run that stands there is not run again), and prints a
table: exact match of the student's own samples at the end, each seed, at the learning rate that was best for the arm.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import trl

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

from ladder import Task
from ladder import measure as measure_task
from optimal_sampling_trl import Mixture, OptimalSamplingGenerator, trainers
from optimal_sampling_trl.demo.arm import EMBEDDED, StudentTask, train
from optimal_sampling_trl.demo.pair import PairFolders, make_pair
from optimal_sampling_trl.plots import plot_learning
from runs import Line, by_rate, read_runs, run_all


class Arm(NamedTuple):
    """A way to train: the trainer, fields of its configuration, fields of the generator (None: TRL's own rollouts)."""

    trainer: Any
    config: Any
    settings: dict[str, Any] = {}  # noqa: RUF012
    generator: dict[str, Any] | None = {}  # noqa: RUF012


GRPO, RLOO, RAFT, DISTILLATION = (
    (trainers.GRPOTrainer, trainers.GRPOConfig),
    (trainers.RLOOTrainer, trainers.RLOOConfig),
    (trainers.RAFTTrainer, trainers.RAFTConfig),
    (trainers.DistillationTrainer, trainers.DistillationConfig),
)
RATIOS = ("token_truncate", "token_mask", "token_luffy", "prefix_truncate", "sequence_truncate", "sequence_mask")
PREFIX = {"correction": "prefix_truncate", "correction_window": 4}
VESPO = {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate"}
THERE, KEPT = {"positive_only": "mixture"}, {"positive_only": "none"}
SAMPLED, ALONE = {"loss": "sampled_token"}, {"theta_fraction": 1.0}
ANNEALED = {"mixture": Mixture("trust_region", epsilon=0.05), "schedule": 0.5}
MIXTURES = {
    "ess_balance": Mixture("ess_balance"),
    "entropy": Mixture("entropy"),
    "fixed, 0.5": Mixture("fixed", fixed_alpha=0.5),
    "trust_region, 0.05": Mixture("trust_region", epsilon=0.05),
    "trust_region, 0.5": Mixture("trust_region", epsilon=0.5),
    "α ≤ 0.5": Mixture(alpha_max=0.5),
    "α ≥ 0.5": Mixture(alpha_min=0.5),
    "teacher": Mixture.teacher_only(),
}
ARMS = {
    "GRPO": Arm(trl.GRPOTrainer, trl.GRPOConfig, generator=None),
    "GRPO, positive only": Arm(*GRPO, generator=ALONE),
    "GRPO, half mixture (default)": Arm(*GRPO),
    "GRPO, half mixture, positive only there": Arm(*GRPO, THERE),
    "  with negatives": Arm(*GRPO, KEPT),
    "  all mixture": Arm(*GRPO, THERE, {"theta_fraction": 0.0}),
    "  all mixture, token_truncate": Arm(*GRPO, THERE | {"correction": "token_truncate"}, {"theta_fraction": 0.0}),
    "  all mixture, token_truncate, with negatives": Arm(
        *GRPO, KEPT | {"correction": "token_truncate"}, {"theta_fraction": 0.0}
    ),
    "  annealed": Arm(*GRPO, THERE, {"schedule": 0.5}),
    **{f"  {name}, with negatives": Arm(*GRPO, KEPT | {"correction": name}) for name in RATIOS},
    **{f"  {name}": Arm(*GRPO, THERE | {"correction": name}) for name in RATIOS},
    "  VESPO": Arm(*GRPO, THERE | VESPO),
    "  + sampled tokens, 0.1": Arm(*GRPO, THERE | {"distillation_coefficient": 0.1}),
    **{f"GRPO, half {name}": Arm(*GRPO, generator={"mixture": mixture}) for name, mixture in MIXTURES.items()},
    **{f"GRPO, {share:.0%} own": Arm(*GRPO, generator={"theta_fraction": share}) for share in (0.0, 0.25, 0.75)},
    "RLOO": Arm(trl.RLOOTrainer, trl.RLOOConfig, generator=None),
    "RLOO, half mixture (default)": Arm(*RLOO),
    "RLOO, half mixture, positive only there": Arm(*RLOO, THERE),
    "RAFT, mixture (default)": Arm(*RAFT),
    "RAFT, half mixture": Arm(*RAFT, generator={"theta_fraction": 0.5}),
    "RAFT, teacher's rollouts": Arm(*RAFT, generator={"mixture": Mixture.teacher_only()}),
    "RAFT, student's rollouts": Arm(*RAFT, generator=ALONE),
    "SFT on the teacher's samples": Arm(*RAFT, {"accept": 0.0}, {"mixture": Mixture.teacher_only()}),  # takes any
    "MENTOR": Arm(*GRPO, {"preset": "mentor", "num_generations": 12}),
    "Logit Fusion": Arm(*GRPO, {"preset": "logit-fusion"}),
    **{name: Arm(*DISTILLATION, {"preset": name.lower()}) for name in ("TRB", "MiniLLM", "SKD")},
    "RAFT, mixture, groups of 8": Arm(*RAFT, {"num_generations": 8}),
    "Distillation, student's rollouts": Arm(*DISTILLATION, generator=ALONE),
    "Distillation, mixture": Arm(*DISTILLATION),
    "Distillation, mixture, prefix_truncate": Arm(*DISTILLATION, PREFIX),
    "Distillation, trust region, annealed": Arm(*DISTILLATION, generator=ANNEALED),
    **{
        f"Dense, {rollouts}, k = {k}": Arm(*DISTILLATION, {"loss": "dense", "dense_top_k": k}, share)
        for rollouts, share in (("mixture", {}), ("student's rollouts", ALONE))
        for k in (1, 4, 32)
    },
    "Sampled tokens, student's rollouts": Arm(*DISTILLATION, SAMPLED, ALONE),
    "Sampled tokens, mixture": Arm(*DISTILLATION, SAMPLED),
}
DRAWN = (
    "RAFT, mixture (default)",
    "Distillation, mixture",
    "Distillation, student's rollouts",
    "GRPO, half mixture (default)",
    "GRPO, positive only",
    "GRPO",
    "RAFT, student's rollouts",
)
"""The arms of the picture, the best first."""


def subject(ladder: Path | None, task: str) -> tuple[PairFolders, StudentTask]:
    """The pair and what it is to learn: the embedded one's without a ladder."""
    if ladder is None:
        return make_pair(), EMBEDDED
    long, folder = Task.of(task), ladder / task
    pair = PairFolders(str(folder / "teacher"), str(folder / "student-2"))
    return pair, StudentTask(
        long.completion_length, long.dataset, long.reward, lambda model, _: measure_task(model, long)
    )


def run(name: str, rate: float, seed: int, steps: int, ladder: Path | None, task: str, batch: int = 64) -> list[Line]:
    """One run, in a process of its own: the points (samples, exact match) of its curve. No weights are kept."""
    torch.set_num_threads(1)
    arm, (pair, learned) = ARMS[name], subject(ladder, task)
    generator = {}
    if arm.generator is not None:
        generator["generator"] = OptimalSamplingGenerator(pair.teacher, backend="transformers", **arm.generator)
    schedule = {"learning_rate": rate, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10}
    with TemporaryDirectory() as output:  # a trainer holds its folder for itself
        settings = {"seed": seed, "output_dir": output, "disable_tqdm": True} | schedule | arm.settings
        trainer, watch = train(arm.trainer, arm.config, pair, steps, batch, settings, learned, **generator)
    alpha = [
        (entry["step"] * batch, entry["alpha/mean"]) for entry in trainer.state.log_history if "alpha/mean" in entry
    ]
    key = {"arm": name, "learning_rate": rate, "seed": seed, "steps": steps}
    return [key | {"curve": watch.curve, "alpha": alpha, "seconds": watch.seconds}]


def words(runs: list[Line]) -> str:
    return f"{runs[0]['arm'].strip()}, {runs[0]['learning_rate']:g}: {runs[0]['curve'][-1][1]:.3f}"


def best(runs: list[Line], name: str) -> list[Line]:
    """The seeds of an arm at the learning rate with the best mean at the end, of those with more than one seed."""
    rates = by_rate(runs, name)
    several = [seeds for seeds in rates if len(seeds) > 1] or rates
    return max(several, key=lambda seeds: sum(one["curve"][-1][1] for one in seeds) / len(seeds), default=[])


def report(runs: list[Line], output: Path) -> None:
    """Print the table and draw the curves, each arm's seeds as a mean in a band."""
    print("| arm | learning rate | half way | end | seeds |\n|---|---|---|---|---|")
    curves = {}
    for name in ARMS:
        seeds = best(runs, name)
        if not seeds:
            continue
        ends = [one["curve"][-1][1] for one in seeds]
        middle = [one["curve"][len(one["curve"]) // 2][1] for one in seeds]
        means = f"{sum(middle) / len(middle):.3f} | {sum(ends) / len(ends):.3f}"
        print(f"| {name} | {seeds[0]['learning_rate']:g} | {means} | {' '.join(f'{end:.3f}' for end in ends)} |")
        curves[name] = [one["curve"] for one in seeds]
    if drawn := {name: curves[name] for name in DRAWN if name in curves}:
        labels = {"x_label": "sampled completions", "y_label": "exact match", "percent": True}
        print(f"Curves: {plot_learning(output / 'losses.png', drawn, **labels)}")


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, each on one core (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each arm (%(default)s)")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="arms by name; all")
    parser.add_argument("--output", type=Path, default=Path("output/losses"), help="folder (%(default)s)")
    parser.add_argument("--ladder", type=Path, help="folder of ladder.py's folders, instead of the embedded pair")
    parser.add_argument("--task", default="sums-40", help="of the ladder (%(default)s)")
    options = parser.parse_args()
    subject(options.ladder, options.task)
    path = options.output / "runs.jsonl"
    done = {(one["arm"], one["learning_rate"], one["seed"], one["steps"]) for one in read_runs(path)}
    keys = [
        (name, rate, seed, options.steps)
        for seed in range(options.seeds)
        for rate in options.learning_rates
        for name in options.arms
    ]
    tasks = [(*key, options.ladder, options.task) for key in keys if key not in done]
    try:
        run_all(run, tasks, options.jobs, path, words)
    finally:
        report([one for one in read_runs(path) if one["steps"] == options.steps], options.output)


if __name__ == "__main__":
    main()
