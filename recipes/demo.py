# /// script
# dependencies = ["optimal-sampling-trl[plots]"]
# ///
"""The main job on the embedded pair, on a CPU, in a few minutes: a student that sorts ten digits learns to.

    python recipes/demo.py                      # or: make demo

Trains the student three times from the same start with the same number of samples: with TRL's GRPO on its own samples,
at its best learning rate and at the mixture's, and with half of each group sampled from the mixture with its teacher.
Prints exact match on held-out prompts before and after, and writes to output/demo/: learning.png (the curves, and α
over training) and rollouts.html (the completions of both halves side by side, with each token's records).
"""

import argparse
import time
from pathlib import Path

import trl

from arm import Watch, train
from optimal_sampling_trl import GRPOConfig, GRPOTrainer, Mixture, OptimalSamplingGenerator, OptimalSamplingV1
from optimal_sampling_trl.backends import why_not_vllm
from optimal_sampling_trl.page import write_page
from optimal_sampling_trl.plots import plot_learning
from pair import COMPLETION_LENGTH, Pair, dataset, make_pair, reward

BATCH = 128
MIXTURE = "half from the mixture"
RATES = {"GRPO, its best learning rate": 1e-4, "GRPO, the mixture's rate": 1e-3, MIXTURE: 1e-3}
"""The rates were chosen among 3e-5, 1e-4, 2e-4, 3e-4, 1e-3 and 2e-3 on this pair; three seeds agreed."""
ENGINE = {"kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}
"""Of vLLM: a small cache for a small model, and no compilation, which takes longer than the demo."""


def speed(pair: Pair, backend: str) -> float:
    """Tokens a second of the mixture, second of two runs, all completions at once."""
    engine = ENGINE | {"dtype": "float32"} if backend == "vllm" else {}
    prompts = dataset("test", BATCH, seed=2)["prompt"]
    with OptimalSamplingV1(pair.teacher, pair.student, alpha_min=0.0, backend=backend, **engine) as sampler:
        for _ in range(2):
            start = time.perf_counter()
            output = sampler.generate(prompts, max_tokens=COMPLETION_LENGTH)
            seconds = time.perf_counter() - start
    return sum(output.num_tokens) / seconds


def train_all(pair: Pair, steps: int, backend: str, output: Path) -> tuple[dict[str, Watch], list[dict[str, float]]]:
    """Returns what was watched of each run, and the log of the mixture's."""
    watched: dict[str, Watch] = {}
    logs: list[dict[str, float]] = []
    for name, rate in RATES.items():
        print(f"Training: {name}, {rate:g}")
        settings = {"learning_rate": rate, "output_dir": str(output / "trainer")}
        if name == MIXTURE:
            engine = ENGINE if backend == "vllm" else None
            generator = OptimalSamplingGenerator(pair.teacher, Mixture(), backend=backend, engine_arguments=engine)
            trainer, watch = train(GRPOTrainer, GRPOConfig, pair, steps, BATCH, settings, generator=generator)
            logs = [entry for entry in trainer.state.log_history if "alpha/mean" in entry]
        else:
            _, watch = train(trl.GRPOTrainer, trl.GRPOConfig, pair, steps, BATCH, settings)
        watched[name] = watch
    return watched, logs


def draw(watched: dict[str, Watch], logs: list[dict[str, float]], output: Path) -> tuple[Path, Path]:
    """The picture of the curves and of α, and the page of the mixture run's rollouts."""
    at = [entry["step"] * BATCH for entry in logs]
    ends = {name: watch.curve[-1][1] for name, watch in watched.items()}
    without = max(end for name, end in ends.items() if name != MIXTURE)
    picture = plot_learning(
        output / "learning.png",
        {name: watch.curve for name, watch in watched.items()},
        alpha=list(zip(at, (entry["alpha/mean"] for entry in logs), strict=True)),
        alpha_band=[(x, entry["alpha/q10"], entry["alpha/q90"]) for x, entry in zip(at, logs, strict=True)],
        x_label="sampled completions",
        y_label="exact match on held-out prompts",
        title=f"Sorting ten digits: {ends[MIXTURE]:.0%} {MIXTURE}, {without:.0%} with GRPO alone",
        percent=True,
    )
    mixed = watched[MIXTURE]
    asked = mixed.tokenizer.batch_decode([rollout.prompt_ids for rollout in mixed.rollouts])
    page = write_page(
        output / "rollouts.html",
        mixed.rollouts,
        mixed.tokenizer,
        rewards=reward(asked, [rollout.text for rollout in mixed.rollouts]),
        steps=mixed.steps,
        advantages=mixed.advantages,
        title="Sorting ten digits: rollouts of a training run",
    )
    return picture, page


def main() -> None:
    """Train, draw and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run (%(default)s)")
    parser.add_argument("--backend", default="auto", help="'vllm', 'transformers' or 'auto' (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder (%(default)s)")
    options = parser.parse_args()

    pair = make_pair()
    reason = why_not_vllm(pair.teacher, pair.student)
    backend = options.backend if options.backend != "auto" else "transformers" if reason else "vllm"
    rates = {name: speed(pair, name) for name in dict.fromkeys(["transformers", backend])}
    print(
        f"Rollouts of the mixture come from {backend}{f' ({reason})' if reason else ''}. Tokens a second, {BATCH} ",
        end="",
    )
    print(f"completions at once: {', '.join(f'{name} {rate:,.0f}' for name, rate in rates.items())}.")
    watched, logs = train_all(pair, options.steps, backend, options.output)
    picture, page = draw(watched, logs, options.output)
    print(f"\nExact match on held-out prompts{'before':>9} {'after':>8} {'samples':>8} {'seconds':>8}")
    for name, watch in watched.items():
        first, last = watch.curve[0][1], watch.curve[-1][1]
        print(f"{name:32} {first:7.1%} {last:8.1%} {options.steps * BATCH:8,} {watch.seconds:8.0f}")
    print(f"\nCurves: {picture}\nRollouts of both halves: {page}")


if __name__ == "__main__":
    main()
