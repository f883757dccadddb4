# /// script
# dependencies = ["optimal-sampling-trl[plots]"]
# ///
"""The main job on the embedded pair, on a CPU, in a few minutes: a student that sorts ten digits learns to.

    python recipes/demo.py                      # or: make demo

Trains the student twice from the same start with the same number of samples: with TRL's GRPO on its own samples, and
with half of each group sampled from the mixture with its teacher. Prints exact match on held-out prompts before and
after, and writes to output/demo/: learning.png (both curves, and α over training) and rollouts.html (the tokens that
the mixture sampled, coloured by α).
"""

import argparse
import time
from pathlib import Path

import trl

from optimal_sampling_trl import GRPOConfig, GRPOTrainer, Mixture, OptimalSamplingGenerator, OptimalSamplingV1
from optimal_sampling_trl.backends import why_not_vllm
from optimal_sampling_trl.page import write_page
from optimal_sampling_trl.plots import plot_learning
from pair import COMPLETION_LENGTH, dataset, make_pair, reward

LEARNING_RATE = 1e-3
ENGINE = {"kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}
"""Of vLLM: a small cache for a small model, and no compilation, which takes longer than the demo."""


def speed(pair: Pair, backend: str) -> float:
    """Tokens a second of the mixture, second of two runs, 64 completions at once."""
    engine = ENGINE | {"dtype": "float32"} if backend == "vllm" else {}
    prompts = dataset("test", BATCH, seed=2)["prompt"]
    with OptimalSamplingV1(pair.teacher, pair.student, alpha_min=0.0, backend=backend, **engine) as sampler:
        for _ in range(2):
            start = time.perf_counter()
            output = sampler.generate(prompts, max_tokens=COMPLETION_LENGTH)
            seconds = time.perf_counter() - start
    return sum(output.num_tokens) / seconds


def main() -> None:
    """Train both arms, then print and draw what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each arm (%(default)s)")
    parser.add_argument("--backend", default="auto", help="'vllm', 'transformers' or 'auto' (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder (%(default)s)")
    options = parser.parse_args()

    pair = make_pair()
    reason = why_not_vllm(pair.teacher, pair.student)
    backend = options.backend if options.backend != "auto" else "transformers" if reason else "vllm"
    print(f"Rollouts of the mixture come from {backend}{f' ({reason})' if reason else ''}.")
    rates = {name: speed(pair, name) for name in dict.fromkeys(["transformers", backend])}

    settings = {"learning_rate": LEARNING_RATE, "output_dir": str(options.output / "trainer")}
    _, plain = train(trl.GRPOTrainer, trl.GRPOConfig, pair, options.steps, settings)
    generator = OptimalSamplingGenerator(
        pair.teacher, Mixture(), backend=backend, engine_arguments=ENGINE if backend == "vllm" else None
    )
    trainer, mixed = train(GRPOTrainer, GRPOConfig, pair, options.steps, settings, generator=generator)

    logs = [entry for entry in trainer.state.log_history if "alpha/mean" in entry]
    at = [entry["step"] * BATCH for entry in logs]
    picture = plot_learning(
        options.output / "learning.png",
        {"GRPO on the student's samples": plain.curve, "half of each group from the mixture": mixed.curve},
        alpha=list(zip(at, (entry["alpha/mean"] for entry in logs), strict=True)),
        alpha_band=[(x, entry["alpha/q10"], entry["alpha/q90"]) for x, entry in zip(at, logs, strict=True)],
        x_label="sampled completions",
        y_label="exact match on held-out prompts",
        title="Sorting ten digits",
    )
    texts = [watched.text for watched in mixed.rollouts]
    asked = mixed.tokenizer.batch_decode([rollout.prompt_ids for rollout in mixed.rollouts])
    page = write_page(
        options.output / "rollouts.html",
        mixed.rollouts,
        mixed.tokenizer,
        rewards=reward(asked, texts),
        steps=mixed.steps,
        title="Sorting ten digits: rollouts of the mixture and of the student",
    )
    print(f"\n{'':36} {'before':>8} {'after':>8} {'samples':>8} {'seconds':>8}")
    for name, watch in (("GRPO on the student's own samples", plain), ("half of each group from the mixture", mixed)):
        first, last = watch.curve[0][1], watch.curve[-1][1]
        print(f"{name:36} {first:8.1%} {last:8.1%} {options.steps * BATCH:8,} {watch.seconds:8.0f}")
    print("\nTokens a second of the mixture, 64 completions at once: ", end="")
    print(", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))
    print(f"Curves: {picture}\nRollouts, tokens coloured by α: {page}")


if __name__ == "__main__":
    main()
