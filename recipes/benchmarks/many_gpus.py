# /// script
# dependencies = ["optimal-sampling-trl[vllm]"]
# ///
"""Measure the gain of further GPUs: rollouts by as many processes as there are GPUs.

    python recipes/benchmarks/many_gpus.py --shapes 3b 1.5b              # `TMPDIR` must hold the models (10 GB)
    export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
    python recipes/benchmarks/many_gpus.py --processes 2                  # on a CPU

Data parallel: each GPU has a process with an engine of its own, all started once; then 1, 2, 4, ... of them work
at the same time on a batch each, taking turns, and of each number the fastest round counts. Between the processes
nothing is sent while they sample, so that what is lacking to n times the tokens/s of one is what they share: the host.

| column | what it says |
|---|---|
| `tokens/s` | of all processes together |
| `of linear` | tokens/s ÷ (processes · tokens/s of one), in this run |

Random models of Qwen2's shape, built on the spot.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch

from engine import arguments
from optimal_sampling_trl.backends.vllm.backend import VLLMBackend
from random_pair import describe, make_random_pair, make_requests, on_gpu, parser

GPUS = torch.cuda.device_count()


def main() -> None:
    args = parse()
    if args.pair:
        work(args)
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-gpus-") as root:
        args.pair = make_random_pair(root, args)
        print(
            describe(args, f"{GPUS} GPUs; batch {args.batches[-1]} a process; best of {args.rounds} rounds"),
            flush=True,
        )
        best = rates(args)
        print("| processes | tokens/s | of linear |\n|--:|--:|--:|")
        for count, rate in best.items():
            print(f"| {count} | {rate:.0f} | {rate / (count * best[1]):.0%} |")


def parse() -> argparse.Namespace:
    flags = parser(__doc__)
    flags.add_argument("--processes", type=int, default=max(GPUS, 1), help="at most one for each GPU")
    flags.add_argument("--pair", nargs=2, help=argparse.SUPPRESS)
    flags.set_defaults(batches=(8,))
    if GPUS:
        flags.set_defaults(batches=(128,), prompt=128, tokens=192, rounds=2, dtype="bfloat16")
    args = flags.parse_args()
    if GPUS and args.processes > GPUS:
        raise SystemExit(f"`--processes` is {args.processes}, and here are {GPUS} GPUs. Lower it.")
    return args


def counts(processes: int) -> list[int]:
    """1, 2, 4, ... and all."""
    powers = [1 << power for power in range(processes.bit_length())]
    return sorted({*powers, processes})


def command(args: argparse.Namespace) -> list[str]:
    """Return the command of a worker: this script with the flags that it was given, on the pair that was made."""
    return [sys.executable, *sys.argv, "--pair", *args.pair]


def variables(index: int, args: argparse.Namespace) -> dict[str, str]:
    """Return the environment of a worker: one GPU, where there are any, and a folder of its own to compile into."""
    return on_gpu(index) | {"VLLM_CACHE_ROOT": f"{args.pair[0]}-cache-{index}"} if GPUS else dict(os.environ)


class Workers:
    """Processes with an engine each, which sample a batch whenever they are told to."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.processes = [
            subprocess.Popen(
                command(args),
                env=variables(index, args),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for index in range(args.processes)
        ]

    def wait(self, count: int) -> list[dict[str, float]]:
        """The next answer of each of the first `count`."""
        return [self._answer(process) for process in self.processes[:count]]

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, float]:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"A process ended with {process.wait()} before it answered; what it said is above.")

    def sample(self, count: int) -> float:
        """Tokens/s of the first `count` at the same time, by the clock of this process."""
        began = time.perf_counter()
        for process in self.processes[:count]:
            assert process.stdin is not None
            print("go", file=process.stdin, flush=True)
        answers = self.wait(count)
        return sum(answer["tokens"] for answer in answers) / (time.perf_counter() - began)

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def working(args: argparse.Namespace) -> Iterator[Workers]:
    workers = Workers(args)
    try:
        workers.wait(args.processes)
        yield workers
    finally:
        workers.close()


def rates(args: argparse.Namespace) -> dict[int, float]:
    """Tokens/s by the number of processes; the first round warms up."""
    best = dict.fromkeys(counts(args.processes), 0.0)
    with working(args) as workers:
        for turn in range(args.rounds + 1):
            for count in best:
                rate = workers.sample(count)
                if turn:
                    best[count] = max(best[count], rate)
    return best


def work(args: argparse.Namespace) -> None:
    """A process of `Workers`: says that it is ready, then samples for each line that comes."""
    backend = VLLMBackend(*args.pair, **arguments(args, "teacher", "theta"))
    asked = make_requests(args.batches[-1], args)
    print(json.dumps({"ready": 1}), flush=True)
    for _ in sys.stdin:
        rollouts = backend.generate(asked)
        print(json.dumps({"tokens": sum(len(rollout.completion_ids) for rollout in rollouts)}), flush=True)
    backend.close()


if __name__ == "__main__":
    main()
