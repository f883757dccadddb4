# /// script
# dependencies = ["optimal-sampling-trl[vllm]"]
# ///
"""Measure speculative sampling: the fused engine whose student drafts k tokens, against none and the teacher alone.

    python recipes/benchmarks/speculation.py --shapes 3b 0.5b --k 0 3 auto  # on a GPU with 80 GB, sizes of Qwen2.5

Random models of Qwen2's shape, built on the spot. Random weights say nothing of how well a student drafts, so that
the mixture sets it: a trust region keeps q within ε nats of θ, and then at least 1 - sqrt(ε/2) of the drafts are kept,
whatever the two models are. Each ε is a row, and stands for a pair whose drafts are kept as often. Each engine has a
process of its own. All start at once, and then take turns on each batch; of each, the fastest of a few rounds counts,
over the decoding of the same number of tokens, records included. `--uneven` adds a rollout whose requests end one
after the other, as those of training do: their lengths are exponential, `--tokens` in the mean and four times as many
at most; and the same with every other request from the student alone, as in GRPO with `theta_fraction=0.5`.

| column | what it says |
|---|---|
| `k` | tokens that the student drafts before a pass of both models verifies them; 0: none, `auto`: as pay |
| `kept` | share of the drafts that were kept |
| `tokens a pass` | tokens of a sequence for each pass of both models |
| `speed/teacher` | tokens/s ÷ those of the teacher alone in plain vLLM |
| `speed/k=0` | tokens/s ÷ those of the engine without speculation, beside it |

A second table counts the fastest measurement of the engine without speculation, which does the same at each ε, and
has the ratio to the slowest beside it: how much the machine scatters.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from math import nan
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
if torch.cuda.is_available():
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")

import vllm

from random_pair import describe, make_random_pair, parser, print_head, processor
from speculation_engines import Engine, workloads
from tables import speculation

HEAD = ("batch", "ε", "k", "kept", "tokens a pass", "tok/s", "speed/teacher", "speed/k=0")


def main() -> None:
    args = parse()
    home = tempfile.TemporaryDirectory(prefix="benchmark-")
    args.folder = args.folder or Path(home.name)
    teacher, *engines = every = [Engine(k, args) for k in (None, *args.k)]
    if not (args.folder / "theta" / "tokenizer.json").exists():  # written last
        make_random_pair(str(args.folder), args)
    for engine in every:  # all begin before the first is waited for
        engine.tell("the pair is there")
    starts = [engine.answer() for engine in every]
    print(describe(args, f"vLLM {vllm.__version__}"))
    print("starts, side by side:", json.dumps(starts), "\n")
    print_head(*HEAD)
    rows: list[dict[str, Any]] = []
    for name in workloads(args):
        alone = teacher.measure(name, 0.0).speed
        for epsilon in args.epsilon:
            without = nan
            for engine in engines:
                seen = engine.measure(name, epsilon)
                without = seen.speed if engine.k == "0" else without
                ratios = {"of_teacher": seen.speed / alone, "of_none": seen.speed / without}
                rows.append({"batch": name, "epsilon": epsilon, "k": engine.k} | seen._asdict() | ratios)
                print(line(rows[-1]), flush=True)
                if args.json:
                    found = {"command": sys.argv, "device": processor(), "starts": starts, "rows": rows}
                    args.json.write_text(json.dumps(found))
    print("", *speculation(rows), sep="\n", flush=True)
    if ended := [f"k = {engine.k}" for engine in every if engine.ended]:
        raise SystemExit(f"These engines have ended before: {', '.join(ended)}. What they said is above.")


def line(row: dict[str, Any]) -> str:
    """The table's line of a measurement."""
    return (
        f"| {row['batch']} | {row['epsilon']} | {row['k']} | {row['kept']:.3f} | {row['passes']:.2f} | "
        f"{row['speed']:.0f} | {row['of_teacher']:.2f} | {row['of_none']:.2f} |"
    )


def parse() -> argparse.Namespace:
    flags = parser(__doc__)
    kinds = "the engine without them first, `auto` the one that chooses"
    flags.add_argument("--k", nargs="+", default=["0", "1", "3"], help=f"drafts; {kinds}")
    flags.add_argument("--epsilon", type=float, nargs="+", default=[0.05, 0.2])
    flags.add_argument(
        "--uneven", type=int, metavar="BATCH", help="also a rollout of so many requests of many lengths"
    )
    flags.add_argument("--folder", type=Path, help="where the pair is kept, and its code compiled once for all runs")
    flags.add_argument("--json", type=Path, help="file for the numbers, written after each line")
    flags.set_defaults(batches=(1, 8, 32, 64, 128, 256), prompt=128, tokens=128, rounds=1, dtype="bfloat16")
    return flags.parse_args()


if __name__ == "__main__":
    main()
