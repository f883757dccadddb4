# /// script
# dependencies = ["optimal-sampling-trl[vllm]"]
# ///
"""Measure what dense records cost the fused engine: time of a step and memory, beside the same requests without them.

    python recipes/benchmarks/dense_engine.py --shapes 3b 0.5b  # on a GPU with 80 GB, sizes of Qwen2.5
    OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind python recipes/benchmarks/dense_engine.py  # on a CPU

One engine takes all requests, the kinds in turns; of each kind the fastest of a few rounds counts.

| column | what it says |
|---|---|
| `step` | ms without dense records for one token of each sequence, prefill and reading of the records included |
| `scalars` | what all scalars add to that time |
| `k = ...` | what the scalars and the k most likely tokens of each model add |
| `GiB` | the most memory that the largest k takes beyond that of requests without dense records |

With `--divide 32` a second table says what the scalars and the 32 most likely tokens are paid for. Each column adds a
part of their way: the kernels that measure, the packing of rows behind vLLM's, their copy to the host, what the host
keeps of each token while the engine runs, and what it reads when all have ended.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import vllm
from vllm import TokensPrompt

from engine import arguments
from optimal_sampling_trl.backends.vllm.backend import VLLMBackend
from optimal_sampling_trl.backends.vllm.requests import to_rollouts, to_sampling_params
from optimal_sampling_trl.backends.vllm.rows import RecordRows
from optimal_sampling_trl.backends.vllm.worker import row_sampler, slot_sampler
from optimal_sampling_trl.backends.vllm.worker.dense import with_dense
from optimal_sampling_trl.rollouts.dense import SCALARS, Dense
from optimal_sampling_trl.rollouts.request import Request
from random_pair import describe, fastest, make_random_pair, make_requests, parser, print_head

PARTS = ("kernels", "packing", "copy", "host", "reading")


def main() -> None:
    args = parse()
    kinds = {"step": None, "scalars": Dense(SCALARS)} | {f"k = {k}": Dense(SCALARS, k) for k in args.top_k}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as home:
        fused = VLLMBackend(*make_random_pair(home, args), **arguments(args, "teacher", "theta"))
    print(describe(args, f"vLLM {vllm.__version__}"))
    print_head("batch", *kinds, "GiB")
    for batch in args.batches:
        took, memory = measure(fused, batch, kinds, args)
        print_line(batch, took, args, f"{memory:.2f}")
    if args.divide:
        print()
        print_head("batch", "step", *PARTS)
        for batch in args.batches:
            print_line(
                batch, divide(fused, make_requests(batch, args), Dense(SCALARS, args.divide), args.rounds), args
            )
    fused.close()


def print_line(batch: int, took: Mapping[str, float], args: argparse.Namespace, *more: str) -> None:
    """Print the time of a step, and what each kind of requests adds to it."""
    step, *others = took.values()
    added = [f"{seconds / step - 1:+.1%}" for seconds in others]
    print("| " + " | ".join([str(batch), f"{step / args.tokens * 1e3:.2f} ms", *added, *more]) + " |", flush=True)


def parse() -> argparse.Namespace:
    flags = parser(__doc__)
    flags.add_argument("--top-k", type=int, nargs="+", default=(8, 32, 128), metavar="K")
    flags.add_argument("--divide", type=int, default=0, metavar="K", help="also what k = K is paid for; 0 is not")
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


def divide(fused: VLLMBackend, plain: Sequence[Request], dense: Dense, rounds: int) -> dict[str, float]:
    """Seconds of requests without dense records, then with them up to the end of each part of their way."""
    asked = [replace(request, dense=dense) for request in plain]

    def run(requests: Sequence[Request], part: str) -> None:
        prompts = [TokensPrompt(prompt_token_ids=request.prompt_ids) for request in requests]
        parameters = [to_sampling_params(request, fused.pair.ending) for request in requests]
        with cut_behind(part):
            outputs = fused.llm.generate(prompts, parameters, use_tqdm=False)
        if part == "reading":
            to_rollouts(outputs, requests, fused.pair)

    works: dict[str, Callable[[], None]] = {"step": lambda: run(plain, "reading")}
    works |= {part: lambda part=part: run(asked, part) for part in PARTS}
    return fastest(works, rounds)


@contextmanager
def cut_behind(part: str) -> Iterator[None]:
    """Let dense records go no further than a part of their way."""

    def nothing(*_: Any) -> None:
        pass

    ends: dict[str, Callable[..., Any]] = {
        "kernels": lambda columns, measured: columns,
        "packing": lambda columns, measured: (with_dense(columns, measured), columns)[1],
    }
    with ExitStack() as stack:
        if part in ends:
            for sampler in (row_sampler, slot_sampler):
                stack.enter_context(patch.object(sampler, "with_dense", ends[part]))
        if part in (*ends, "copy"):
            stack.enter_context(patch.object(RecordRows, "add", nothing))
        yield


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
