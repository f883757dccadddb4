# /// script
# dependencies = ["optimal-sampling-trl[vllm]"]
# ///
"""Measure what the teacher takes of an evaluation: the student's samples beside it and alone, in one fused engine.

    python recipes/benchmarks/evaluation.py --shapes 3b 0.5b  # on a GPU with 80 GB, sizes of Qwen2.5
    OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind python recipes/benchmarks/evaluation.py  # on a CPU

An evaluation of the trainers samples from the student alone, and the teacher rests unless the loss reads it. Both
kinds of requests take turns; of each the fastest of a few rounds counts.

| column | what it says |
|---|---|
| `beside` | s of a batch of the student's samples while the teacher runs, too |
| `alone` | s of the same with the student alone, the switch there and back included |
| `share` | of `beside` that the teacher takes |
| `equal` | completions that are the same, token by token, with one seed each |
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import vllm

from engine import arguments, used
from optimal_sampling_trl.backends.vllm.backend import VLLMBackend
from optimal_sampling_trl.mixture import Mixture
from random_pair import describe, fastest, make_random_pair, make_requests, parser, print_head, processor

HEAD = ("batch", "beside", "alone", "share", "equal")


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.folder) as home:
        fused = VLLMBackend(*make_random_pair(home, args), **arguments(args, "teacher", "theta"))
    print(describe(args, f"vLLM {vllm.__version__}"))
    before, began = used(), time.perf_counter()
    fused.prepare_alone()
    graphs = {"seconds": time.perf_counter() - began, "GiB": (used() - before) / 2**30}
    print(f"CUDA graphs of the student alone: {graphs['seconds']:.1f} s, {graphs['GiB']:.2f} GiB\n")
    print_head(*HEAD)
    rows: list[dict[str, Any]] = []
    for batch in args.batches:
        rows.append(measure(fused, batch, args))
        print(line(rows[-1]), flush=True)
        if args.json:
            args.json.write_text(json.dumps({"device": processor(), "graphs": graphs, "rows": rows}, indent=1))
    fused.close()


def parse() -> argparse.Namespace:
    flags = parser(__doc__)
    flags.add_argument("--folder", help="where the pair is written for a while, such as /dev/shm")
    flags.add_argument("--json", type=Path, help="file for the numbers")
    if torch.cuda.is_available():
        flags.set_defaults(batches=(64, 256), prompt=128, tokens=256, rounds=3, dtype="bfloat16")
    return flags.parse_args()


def measure(fused: VLLMBackend, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both kinds of requests, and how many of their completions are equal."""
    beside = [
        replace(one, mixture=Mixture.theta_only(), sampling=replace(one.sampling, seed=seed))
        for seed, one in enumerate(make_requests(batch, args))
    ]
    alone = [replace(one, needs_teacher=False) for one in beside]
    both = zip(fused.generate(beside), fused.generate(alone), strict=True)
    equal = sum(one.completion_ids == other.completion_ids for one, other in both)
    works = {"beside": lambda: fused.generate(beside), "alone": lambda: fused.generate(alone)}
    return {"batch": batch, "tokens": args.tokens, "equal": equal} | fastest(works, args.rounds)


def line(row: dict[str, Any]) -> str:
    """The table's line of a batch."""
    share = 1 - row["alone"] / row["beside"]
    return f"| {row['batch']} | {row['beside']:.2f} | {row['alone']:.2f} | {share:.0%} | {row['equal']} |"


if __name__ == "__main__":
    main()
