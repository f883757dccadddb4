"""Short runs on the embedded pair, and the bands in which they end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer

import pair as embedded
from horizon_train import train as train_stack
from optimal_sampling_trl import OptimalSamplingGenerator
from optimal_sampling_trl.demo.arm import EMBEDDED, train
from optimal_sampling_trl.demo.run import ARMS as DEMO_ARMS
from optimal_sampling_trl.demo.run import BATCH, HALF, RAFT
from past_the_teacher_arms import ARMS
from stacks import Run, Setting

DEMO, DEMO_STEPS = (RAFT, HALF), 60
"""The arms of the demo that are run, and their updates."""
STACK = {"Distillation, mixture": (3e-3, 50), "RAFT, mixture": (3e-3, 70)}
"""The learning rate and the updates of each arm of past_the_teacher.py that is run."""


class Band(NamedTuple):
    """The range of the mean end of some runs, five of its deviations about the mean of all seeds.

    Args:
        mean: of the ends of at least eight seeds.
        deviation: of the same.
        runs: how many runs the mean is of that lies in the band.
    """

    mean: float
    deviation: float
    runs: int = 1

    @property
    def low(self) -> float:
        """Smallest mean."""
        return self.mean - 5 * self.deviation / math.sqrt(self.runs)

    @property
    def high(self) -> float:
        """Largest mean."""
        return self.mean + 5 * self.deviation / math.sqrt(self.runs)


BANDS = {
    RAFT: Band(0.4268, 0.0561),
    HALF: Band(0.1287, 0.0158),
    "Distillation, mixture": Band(0.3012, 0.0744, runs=4),
    "RAFT, mixture": Band(0.4349, 0.0808, runs=4),
}
"""Shares of right samples on held-out prompts, of eight seeds (tests/checks/learning_bands.py). The student starts at
0.019. CPU, one thread, torch 2.13.0, TRL 1.16.0."""


def end_of_demo(made: embedded.PairFolders, folder: Path, name: str, seed: int) -> float:
    """Run an arm of the demo for `DEMO_STEPS`, and return how often the student is right."""
    arm = DEMO_ARMS[name]
    tokenizer = AutoTokenizer.from_pretrained(made.student)
    settings = {"learning_rate": arm.rate, "output_dir": str(folder), "seed": seed, "disable_tqdm": True}
    trainer, _ = train(
        arm.trainer,
        arm.config,
        made,
        DEMO_STEPS,
        BATCH,
        settings,
        EMBEDDED._replace(measure=lambda model, tokenizer: math.nan),  # the end alone is looked at
        generator=OptimalSamplingGenerator(made.teacher, backend="transformers"),
    )
    trainer.close()
    return embedded.measure(trainer.model.eval(), tokenizer)


def end_of_stack(made: embedded.PairFolders, folder: Path, arm: str, runs: int) -> list[float]:
    """Run an arm of past_the_teacher.py with some seeds side by side, and return how often each student is right."""
    (folder / "sort-10").symlink_to(Path(made.teacher).parent)
    rate, steps = STACK[arm]
    setting = Setting("sort-10", Path(made.teacher).name, Path(made.student).name, (arm,), runs)
    seeds = [Run(arm, rate, seed) for seed in range(runs)]
    lines = train_stack(setting, seeds, ARMS, steps, str(folder), "cpu", math.inf)
    return [line["curve"][-1][1] for line in lines]
