"""The demo: three trainings of one student from the same start, side by side, and what they learned as a picture.

Two runs are TRL's GRPO on the student's own samples, at its best learning rate and at the mixture's. The third samples
half of each group from the mixture with the teacher. All take the same number of samples. The demo prints the exact
match on held-out prompts before and after. It writes learning.png (the curves, and α over training) and rollouts.html
(the completions of both halves side by side, with each token's records).
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
from ..mixture import Mixture
from ..page import write_page
from ..plots import plot_learning
from ..trainers import GRPOConfig, GRPOTrainer, OptimalSamplingGenerator
from .arm import Bar, Watch, train
from .pair import DEFAULT, Pair, make_pair, reward
from .workers import side_by_side

BATCH = 128
MIXTURE = "half from the mixture"
RATES = {MIXTURE: 1e-3, "GRPO, its best learning rate": 1e-4, "GRPO, the mixture's rate": 1e-3}
"""The runs, the longest first. The rates were chosen among 3e-5, 1e-4, 2e-4, 3e-4, 1e-3 and 2e-3 on this pair; three
seeds agreed."""
ENGINE = {"kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}
"""Arguments of vLLM: a small cache for a small model, and no compilation, which takes longer than the demo."""


class Result(NamedTuple):
    """A run: exact match over sampled completions, the trainer's log of α, and seconds of training."""

    curve: list[tuple[float, float]]
    log: list[dict[str, float]]
    seconds: float


def run_one(name: str, line: int, pair: Pair, steps: int, backend: str, output: Path) -> Result:
    """Train once; write the page of the mixture's run.

    Args:
        name: one of `RATES`.
        line: of the terminal, for the bar.
        pair: the teacher and the student.
        steps: optimizer steps.
        backend: the engine of the mixture's run.
        output: folder of what is written.
    """
    transformers.logging.disable_progress_bar()  # of loading weights
    settings = {"learning_rate": RATES[name], "output_dir": str(output / f"trainer-{line}")}
    bar = Bar(f"{name:28}", line)
    if name != MIXTURE:
        return _result(*train(trl.GRPOTrainer, trl.GRPOConfig, pair, steps, BATCH, settings, bar=bar))
    engine = ENGINE if backend == "vllm" else None
    generator = OptimalSamplingGenerator(pair.teacher, Mixture(), backend=backend, engine_arguments=engine)
    trainer, watch = train(GRPOTrainer, GRPOConfig, pair, steps, BATCH, settings, bar=bar, generator=generator)
    write_rollouts(watch, output / "rollouts.html")
    return _result(trainer, watch)


def _result(trainer: Any, watch: Watch) -> Result:
    return Result(watch.curve, [entry for entry in trainer.state.log_history if "alpha/mean" in entry], watch.seconds)


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


def draw(results: dict[str, Result], path: Path) -> Path:
    """Draw the curves, and α over the mixture's training."""
    log = results[MIXTURE].log
    at = [entry["step"] * BATCH for entry in log]
    ends = {name: result.curve[-1][1] for name, result in results.items()}
    without = max(end for name, end in ends.items() if name != MIXTURE)
    return plot_learning(
        path,
        {name: result.curve for name, result in reversed(results.items())},
        alpha=list(zip(at, (entry["alpha/mean"] for entry in log), strict=True)),
        alpha_band=[(x, entry["alpha/q10"], entry["alpha/q90"]) for x, entry in zip(at, log, strict=True)],
        x_label="sampled completions",
        y_label="exact match on held-out prompts",
        title=f"Sorting ten digits: {ends[MIXTURE]:.0%} {MIXTURE}, {without:.0%} with GRPO alone",
        percent=True,
    )


def report(results: dict[str, Result], samples: int) -> str:
    """Return the table of the runs."""
    lines = [f"Exact match on held-out prompts{'before':>9} {'after':>8} {'samples':>8} {'seconds':>8}"]
    for name, result in reversed(results.items()):
        first, last = result.curve[0][1], result.curve[-1][1]
        lines.append(f"{name:32} {first:7.1%} {last:8.1%} {samples:8,} {result.seconds:8.0f}")
    return "\n".join(lines)


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
    print(f"2 of 2: {len(RATES)} runs of {options.steps} steps, side by side. A few minutes on two cores.")
    print(f"Rollouts of the mixture come from {options.backend}.", flush=True)
    jobs = [(name, line, pair, options.steps, options.backend, options.output) for line, name in enumerate(RATES)]
    results = dict(zip(RATES, side_by_side(run_one, jobs), strict=True))
    picture = draw(results, options.output / "learning.png")
    print(f"\n{report(results, options.steps * BATCH)}")
    print("\nThe runs shared this machine: their seconds are no measure of speed.")
    print(f"Curves: {picture}\nRollouts of both halves: {options.output / 'rollouts.html'}")


if __name__ == "__main__":
    main()
