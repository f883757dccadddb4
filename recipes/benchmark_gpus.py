# /// script
# dependencies = ["optimal-sampling-trl[vllm]", "psutil", "requests"]
# ///
"""What further GPUs bring: rollouts by as many processes as there are GPUs, and sending the student's weights.

    python recipes/benchmark_gpus.py --shapes 3b 1.5b              # `TMPDIR` must hold the models (10 GB)
    python recipes/benchmark_gpus.py --shapes 7b 1.5b --only sync
    export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
    python recipes/benchmark_gpus.py --processes 2                  # on a CPU

Data parallel: each GPU has a process with an engine of its own, all started once; then 1, 2, 4, ... of them work
at the same time on a batch each, taking turns, and of each number the fastest round counts. Between the processes
nothing is sent while they sample, so that what is lacking to n times the tokens/s of one is what they share: the host.

Weights: a server on GPU 0, and TRL's client in a process on GPU 1 sends the whole student over NCCL, as a trainer
does.

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")

import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM
from trl.generation.vllm_client import VLLMClient

from benchmark import arguments
from benchmark_server import OURS, serving
from optimal_sampling_trl.backends.vllm.engine import VLLMBackend
from optimal_sampling_trl.trainers.server import FusedServer
from random_pair import SHAPES, describe, make_random_pair, make_requests, parser, shapes

GPUS = torch.cuda.device_count()


def main() -> None:
    args = parse()
    if args.worker is not None:
        (work if args.worker == "sample" else send)(args)
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-gpus-") as root:
        args.pair = make_random_pair(root, args)
        print(
            describe(args, f"{GPUS} GPUs; batch {args.batches[-1]} a process; best of {args.rounds} rounds"),
            flush=True,
        )
        if "sample" in args.only:
            print_rates(rates(args), args)
        if "sync" in args.only:
            sync(args)


def parse() -> argparse.Namespace:
    flags = parser(__doc__)
    flags.add_argument("--shapes", nargs=2, choices=SHAPES, metavar=("TEACHER", "STUDENT"), help=", ".join(SHAPES))
    flags.add_argument("--processes", type=int, default=max(GPUS, 1), help="at most one for each GPU")
    flags.add_argument("--only", nargs="+", choices=("sample", "sync"), default=("sample", "sync"))
    flags.add_argument("--worker", choices=("sample", "send"), help=argparse.SUPPRESS)
    flags.add_argument("--pair", nargs=2, help=argparse.SUPPRESS)
    flags.add_argument("--url", help=argparse.SUPPRESS)
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


def command(args: argparse.Namespace, worker: str, *further: str) -> list[str]:
    """This script as one of its workers, on the pair that was made."""
    named = ["--shapes", *args.shapes] if args.shapes else []
    for role in ("teacher", "theta"):
        named += [f"--{role}", *map(str, getattr(args, role))]
    numbers = ("vocabulary", "prompt", "tokens", "rounds", "dtype", "method")
    flags = [text for name in numbers for text in (f"--{name}", str(getattr(args, name)))]
    batches = ["--batches", *map(str, args.batches)]
    return [sys.executable, __file__, "--worker", worker, "--pair", *args.pair, *named, *flags, *batches, *further]


def on_gpu(index: int, args: argparse.Namespace) -> dict[str, str]:
    """The variables of a process that sees one GPU, and compiles into a folder of its own."""
    own = {"VLLM_CACHE_ROOT": f"{args.pair[0]}-cache-{index}", "CUDA_VISIBLE_DEVICES": str(index)}
    return os.environ | (own if GPUS else {})


class Workers:
    """Processes with an engine each, which sample a batch whenever they are told to."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.processes = [
            subprocess.Popen(
                command(args, "sample"),
                env=on_gpu(index, args),
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


def print_rates(best: dict[int, float], args: argparse.Namespace) -> None:
    print("| processes | tokens/s | of linear |\n|--:|--:|--:|")
    for count, rate in best.items():
        print(f"| {count} | {rate:.0f} | {rate / (count * best[1]):.0%} |", flush=True)


def work(args: argparse.Namespace) -> None:
    """A process of `Workers`: says that it is ready, then samples for each line that comes."""
    backend = VLLMBackend(*args.pair, **arguments(args, "teacher", "theta"))
    asked = make_requests(args.batches[-1], args)
    print(json.dumps({"ready": 1}), flush=True)
    for _ in sys.stdin:
        rollouts = backend.generate(asked)
        print(json.dumps({"tokens": sum(len(rollout.completion_ids) for rollout in rollouts)}), flush=True)
    backend.close()


def sync(args: argparse.Namespace) -> None:
    """Start a server on one GPU and send from another."""
    if GPUS < 2:
        print("\nNo weights were sent: NCCL wants a GPU for the server and another for the trainer.")
        return
    teacher, theta = args.pair
    flags = ("--dtype", args.dtype, "--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager")
    flags += ("--kv-cache-memory-bytes", str(1 << 30), "--gpu-memory-utilization", "0.1")
    with serving(*OURS, teacher, "--theta", theta, *flags, environment=on_gpu(0, args)) as (url, _):
        subprocess.run(command(args, "send", "--url", url), env=on_gpu(1, args), check=True, timeout=120)


def send(args: argparse.Namespace) -> None:
    """The trainer's process: sends the whole student a few times, and says how long each took."""
    client = VLLMClient(base_url=args.url)
    model = Qwen2ForCausalLM.from_pretrained(args.pair[1], dtype=getattr(torch, args.dtype)).cuda()
    weights = [(name, weight.detach()) for name, weight in model.named_parameters()]
    metadata = [(name, args.dtype, list(weight.shape)) for name, weight in weights]
    served = FusedServer(client, args.pair[0], AutoTokenizer.from_pretrained(args.pair[1]))
    began = time.perf_counter()
    client.init_communicator(device="cuda:0")
    joined = time.perf_counter() - began
    size = sum(weight.numel() * weight.element_size() for _, weight in weights)
    seconds = [push(served, metadata, weights) for _ in range(max(args.rounds, 2) + 2)]
    best, parameters = min(seconds[1:]), shapes(args)["theta"].parameters
    print(
        f"\nsending the student ({size / 2**20:.0f} MiB, {parameters / 1e9:.2f} billion weights) over NCCL: "
        f"{best * 1e3:.0f} ms, the first {seconds[0] * 1e3:.0f} ms; {size / best / 1e9:.1f} GB/s; joining the group "
        f"{joined:.1f} s; all: {', '.join(f'{one * 1e3:.0f}' for one in seconds)}",
        flush=True,
    )


def push(served: FusedServer, metadata: Sequence[tuple[str, str, list[int]]], weights: list) -> float:
    """Seconds of one, with the checks that a trainer makes."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    with served.push():
        served.client.update_named_params(metadata, iter(weights))
    torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
