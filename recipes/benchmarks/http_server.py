# /// script
# dependencies = ["optimal-sampling-trl[vllm]", "psutil", "requests"]
# ///
"""Measure the cost of records over HTTP: the pair's server against a plain vLLM server of the teacher, under one load.

    OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind python recipes/benchmarks/http_server.py

Both servers run on this machine and take turns under TRL's client, with 64 requests at a time, as a trainer sends
them. `plain` asks the teacher's server for the log-probability of each token, which TRL needs; `mixture` asks the
pair's for records; `mixture, no records` for what `plain` asks. The time of a processor is counted, too: it says what
a token costs whatever else the machine does. Random models of Qwen2's shape, built on the spot.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import psutil
import requests
from trl.generation.vllm_client import VLLMClient

from optimal_sampling_trl.backends.vllm.limits import check_pair
from optimal_sampling_trl.backends.vllm.server.client import complete
from optimal_sampling_trl.backends.vllm.server.messages import to_arguments, to_rollouts
from optimal_sampling_trl.pairing import Pair
from optimal_sampling_trl.rollouts.request import Request
from random_pair import describe, make_random_pair, make_requests, parser

PLAIN = ("-m", "vllm.entrypoints.openai.api_server", "--model")
OURS = ("-m", "optimal_sampling_trl.backends.vllm.server.serve", "--teacher")
AT_A_TIME = 64


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--requests", type=int, default=1000, help="requests of a round")
    flags.set_defaults(teacher=(128, 3), theta=(64, 2), tokens=32, rounds=2)
    args = flags.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-server-") as root:
        teacher, theta = make_random_pair(root, args)
        pair = check_pair(teacher, theta, {})
        shared = ("--dtype", args.dtype, "--enforce-eager", "--max-num-seqs", str(AT_A_TIME))
        shared += ("--kv-cache-memory-bytes", str(1 << 28), "--no-enable-prefix-caching")
        mode = ("--logprobs-mode", "processed_logprobs")
        with (
            serving(*PLAIN, teacher, *shared, *mode) as plain,
            serving(*OURS, teacher, "--theta", theta, *shared) as ours,
        ):
            print(describe(args, f"{args.requests} requests of a round, {AT_A_TIME} at a time; best of {args.rounds}"))
            print("| load | tok/s | ÷ plain | server, µs of a processor a token | client, µs |")
            print("|---|--:|--:|--:|--:|")
            works = {
                "plain": (plain, ask),
                "mixture, no records": (ours, ask),
                "mixture": (ours, partial(ask_for_records, pair=pair)),
            }
            report(works, args)


Work = Callable[[VLLMClient, Request], object]


def report(works: dict[str, tuple[tuple[str, psutil.Process], Work]], args: argparse.Namespace) -> None:
    """Each load in turns, then a line for each."""
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in works}
    for turn in range(args.rounds + 1):
        for name, (server, work) in works.items():
            measured = load(*server, work, args)
            if turn:
                seen[name].append(measured)
    tokens = args.requests * args.tokens
    best = {name: min(rounds) for name, rounds in seen.items()}
    for name, (seconds, server, client) in best.items():
        print(
            f"| {name} | {tokens / seconds:.0f} | {best['plain'][0] / seconds:.2f} | {server / tokens * 1e6:.0f} | "
            f"{client / tokens * 1e6:.0f} |"
        )


def load(url: str, process: psutil.Process, work: Work, args: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds of a round, and of the processor in the server's processes and in this one."""
    client = VLLMClient(base_url=url)
    asked = make_requests(args.requests, args)
    before, before_here, began = spent(process), time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        list(pool.map(lambda one: work(client, one), asked))
    return time.perf_counter() - began, spent(process) - before, time.process_time() - before_here


def spent(process: psutil.Process) -> float:
    """Seconds of the processor in a process and all below it."""
    return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True)))


def ask(client: VLLMClient, request: Request) -> object:
    """Ask a server for what TRL does: the tokens and their log-probabilities."""
    return client.generate(
        [request.prompt_ids],
        max_tokens=request.sampling.max_tokens,
        logprobs=0,
        generation_kwargs={"ignore_eos": True},
    )


def ask_for_records(client: VLLMClient, request: Request, pair: Pair) -> object:
    """Ask for what this package's trainers do, as rollouts."""
    return to_rollouts(complete(client, to_arguments(request, pair.ending, 1, seed=0)), request, pair)


@contextmanager
def serving(*command: str, environment: Mapping[str, str] | None = None) -> Iterator[tuple[str, psutil.Process]]:
    """A server's address and process, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (sys.executable, *command, "--port", str(port), "--host", "127.0.0.1")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        while not is_up(url):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with {process.returncode} before it answered.")
            time.sleep(0.5)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def is_up(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).ok
    except requests.RequestException:
        return False


if __name__ == "__main__":
    main()
