# /// script
# dependencies = ["optimal-sampling-trl[vllm]"]
# ///
"""Measure what dense records cost the fused engine: time of a step and memory, beside the same requests without them.

    python recipes/benchmarks/dense_engine.py --shapes 3b 0.5b  # on a GPU with 80 GB, sizes of Qwen2.5
    OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind python recipes/benchmarks/dense_engine.py  # on a CPU, small ones

One engine takes all requests, the kinds in turns; of each kind the fastest of a few rounds counts.

| column | what it says |
|---|---|
| `step` | ms without dense records for one token of each sequence, prefill and reading of the records included |
| `scalars` | what all scalars add to that time |
| `k = ...` | what the scalars and the k most likely tokens of each model add |
| `GiB` | the most memory that the largest k takes beyond that of requests without dense records |
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch
import vllm

from engine import arguments
from optimal_sampling_trl.backends.vllm.backend import VLLMBackend
from optimal_sampling_trl.rollouts.dense import SCALARS, Dense
from random_pair import describe, fastest, make_random_pair, make_requests, parser


def main() -> None:
    args = parse()
    kinds = {"step": None, "scalars": Dense(SCALARS)} | {f"k = {k}": Dense(SCALARS, k) for k in args.top_k}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as home:
        fused = VLLMBackend(*make_random_pair(home, args), **arguments(args, "teacher", "theta"))
    print(describe(args, f"vLLM {vllm.__version__}"))
    head = ("batch", *kinds, "GiB")
    print("| " + " | ".join(head) + " |\n|" + "---:|" * len(head))
    for batch in args.batches:
        took, memory = measure(fused, batch, kinds, args)
        ratios = [f"{seconds / took['step'] - 1:+.1%}" for seconds in list(took.values())[1:]]
        step = f"{took['step'] / args.tokens * 1e3:.2f} ms"
        print("| " + " | ".join([str(batch), step, *ratios, f"{memory:.2f}"]) + " |", flush=True)
    fused.close()


def parse() -> argparse.Namespace:
    flags = parser(__doc__)
    flags.add_argument("--top-k", type=int, nargs="+", default=(8, 32, 128), metavar="K")
    if torch.cuda.is_available():
        flags.set_defaults(batches=(32, 128, 256), prompt=128, tokens=128, rounds=2, dtype="bfloat16")
    return flags.parse_args()


def measure(
    fused: VLLMBackend, batch: int, kinds: dict[str, Dense | None], args: argparse.Namespace
) -> tuple[dict[str, float], float]:
    """Seconds of each kind of requests, and the GiB that the last takes beyond the first."""
    plain = make_requests(batch, args)
    works: dict[str, Callable[[], int]] = {}
    for kind, dense in kinds.items():
        requests = [replace(request, dense=dense) for request in plain]
        works[kind] = lambda requests=requests: peak(lambda: fused.generate(requests))
    first, *_, last = works.values()
    return fastest(works, args.rounds), (last() - first()) / 2**30


def peak(work: Callable[[], object]) -> int:
    """The most bytes of the GPU that torch held while it worked; 0 on a CPU."""
    if not torch.cuda.is_available():
        work()
        return 0
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    main()
