"""The demo: three trainings of one student from the same start, side by side, and what they learned as a picture.

RAFT imitates the completions of the mixture that the reward accepts. GRPO samples half of each group from the mixture
with the teacher, and TRL's GRPO all of it from the student. All take the same number of samples. The demo prints the
exact match on held-out prompts before and after. It writes learning.png (the curves, and α over RAFT's training) and
rollouts.html (the completions of GRPO's two halves side by side, with each token's records).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers
import trl

from ..backends import BACKENDS
from ..page import write_page
from ..plots import plot_learning
from ..trainers import GRPOConfig, GRPOTrainer, OptimalSamplingGenerator, RAFTConfig, RAFTTrainer
from .arm import Bar, Watch, train
from .pair import DEFAULT, PairFolders, make_pair, read_stamp, reward
from .workers import side_by_side

BATCH = 128


class Arm(NamedTuple):
    """A way to train: the trainer, its configuration, the learning rate, and whether the teacher takes part."""

    trainer: Any
    config: Any
    rate: float
    taught: bool = True


RAFT, HALF, ALONE = "RAFT on the mixture", "GRPO, half mixture", "TRL's GRPO, no teacher"
ARMS = {
    RAFT: Arm(RAFTTrainer, RAFTConfig, 3e-3),
    HALF: Arm(GRPOTrainer, GRPOConfig, 2e-3),
    ALONE: Arm(trl.GRPOTrainer, trl.GRPOConfig, 1e-4, taught=False),
}
"""The runs, the best first. Each rate was chosen on this pair: RAFT's among five from 5e-4 to 4e-3 (3e-3 and 4e-3 end
alike), that of half a mixture among 1e-3, 2e-3 and 3e-3, and TRL's among six from 3e-5 to 2e-3."""
ENGINE = {"kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}
"""Arguments of vLLM: a small cache for a small model, and no compilation, which takes longer than the demo."""


class Result(NamedTuple):
    """A run: exact match over sampled completions, the trainer's log of α, and seconds of training."""

    curve: list[tuple[float, float]]
    log: list[dict[str, float]]
    seconds: float


def run_one(name: str, line: int, pair: PairFolders, steps: int, backend: str, output: Path) -> Result:
    """Train once; write the page of the run that has both halves.

    Args:
        name: one of `ARMS`.
        line: of the terminal, for the bar.
        pair: the teacher and the student.
        steps: optimizer steps.
        backend: the engine of the mixture.
        output: folder of what is written.
    """
    transformers.logging.disable_progress_bar()  # of loading weights
    arm, more = ARMS[name], dict[str, Any]()
    if arm.taught:
        engine = ENGINE if backend == "vllm" else None
        more["generator"] = OptimalSamplingGenerator(pair.teacher, backend=backend, engine_arguments=engine)
    settings = {"learning_rate": arm.rate, "output_dir": str(output / f"trainer-{line}")}
    bar = Bar(f"{name:24}", line)
    trainer, watch = train(arm.trainer, arm.config, pair, steps, BATCH, settings, bar=bar, **more)
    if name == HALF:
        write_rollouts(watch, output / "rollouts.html")
    log = [entry for entry in trainer.state.log_history if "alpha/mean" in entry]
    return Result(watch.curve, log, watch.seconds)


def write_rollouts(watch: Watch, path: Path) -> Path:
    """Write the page of a run's rollouts, of both halves."""
    prompts = watch.tokenizer.batch_decode([rollout.prompt_ids for rollout in watch.rollouts])
    return write_page(
        path,
        watch.rollouts,
        watch.tokenizer,
        rewards=reward(prompts, [rollout.text for rollout in watch.rollouts]),
        steps=watch.steps,
        advantages=watch.advantages,
        title="Sorting ten digits: rollouts of a training run",
    )


def draw(results: dict[str, Result], teacher: float, samples: int, path: Path) -> Path:
    """Draw the curves below the teacher's exact match, and α over RAFT's training."""
    log = results[RAFT].log
    at = [entry["step"] * BATCH for entry in log]
    raft, half, alone = (results[name].curve[-1][1] for name in ARMS)
    ends = f"RAFT on the mixture {raft:.0%}, GRPO on half of it {half:.0%}, TRL's GRPO {alone:.0%}"
    return plot_learning(
        path,
        {name: result.curve for name, result in results.items()} | {"the teacher": [(0, teacher), (samples, teacher)]},
        alpha=list(zip(at, (entry["alpha/mean"] for entry in log), strict=True)),
        alpha_band=[(x, entry["alpha/q10"], entry["alpha/q90"]) for x, entry in zip(at, log, strict=True)],
        x_label="sampled completions",
        y_label="exact match on held-out prompts",
        title=f"Sorting ten digits, after {samples:,} samples:\n{ends}",
        percent=True,
    )


def report(results: dict[str, Result], teacher: float, samples: int) -> str:
    """Return the table of the runs, and the teacher below them."""
    lines = [f"Exact match on held-out prompts{'before':>9} {'after':>8} {'samples':>8} {'seconds':>8}"]
    for name, result in results.items():
        first, last = result.curve[0][1], result.curve[-1][1]
        lines.append(f"{name:32} {first:7.1%} {last:8.1%} {samples:8,} {result.seconds:8.0f}")
    return "\n".join([*lines, f"{'the teacher':32} {teacher:16.1%}"])


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Make the pair, train, draw and report."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run (%(default)s)")
    parser.add_argument("--backend", choices=BACKENDS, default="transformers", help="engine (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder (%(default)s)")
    options = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    print(f"1 of 2: a teacher and a student, made once and kept in {DEFAULT}. A minute or two.", flush=True)
    pair = make_pair()
    print(f"2 of 2: {len(ARMS)} runs of {options.steps} steps, side by side. A few minutes on two cores.")
    print(f"Rollouts of the mixture come from {options.backend}.", flush=True)
    jobs = [(name, line, pair, options.steps, options.backend, options.output) for line, name in enumerate(ARMS)]
    results = dict(zip(ARMS, side_by_side(run_one, jobs), strict=True))
    teacher, samples = read_stamp(DEFAULT)["models"]["teacher"]["exact match"], options.steps * BATCH
    picture = draw(results, teacher, samples, options.output / "learning.png")
    print(f"\n{report(results, teacher, samples)}")
    print("\nThe runs shared this machine: their seconds are no measure of speed.")
    print(f"Curves, and α of RAFT: {picture}")
    print(f"Rollouts of GRPO, the student's own beside the mixture's: {options.output / 'rollouts.html'}")
    print("\nWhere one answer is right, begin with RAFT on the mixture: RAFTTrainer, or optimal-sampling raft.")
    print('The README\'s table "When to use it" says what to run elsewhere.')


if __name__ == "__main__":
    main()
