"""Is the server right on this machine's GPU? One H100 is enough, and two minutes: a table says what was seen.

    python tests/checks/check_server.py                       # tiny models in bfloat16
    python tests/checks/check_server.py --dtype float32
    python tests/checks/check_server.py --shape qwen          # wide as Qwen2.5: 7B's and 0.5B's layers, four of each

Starts `optimal-sampling-serve`, sends 200 requests of mixed settings at once and holds the records of a sample of them
against transformers in float32, then sends other weights over NCCL from a process of its own, and at last, to a second
server, in a file, which is the same way into the student without NCCL. Every step is tried, whatever became of those
before. NCCL wants a GPU for each process: on one it usually answers "Duplicate GPU detected".
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the helpers are

import torch
from transformers import AutoModelForCausalLM
from trl.generation.vllm_client import VLLMClient

from helpers.engines import TEXTS, TOLERANCE, Oracle, request
from helpers.models import make_model, make_tokenizer
from helpers.oracle import expected_records, on_the_edge
from helpers.servers import MIXED, Server
from optimal_sampling_trl.backends.vllm.server.client import FusedServer
from optimal_sampling_trl.rollouts.request import Request
from optimal_sampling_trl.rollouts.rollout import RECORDS, Rollout
from processes.serve_from_files import FileClient

SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": ({"hidden": 128, "vocab_size": 288}, {"hidden": 128, "vocab_size": 272, "tied": True}),
    "qwen": (
        {"hidden": 3584, "heads": 28, "kv_heads": 4, "layers": 4, "vocab_size": 152064, "initializer_range": 0.02},
        {"hidden": 896, "heads": 14, "kv_heads": 2, "layers": 4, "vocab_size": 151936, "tied": True,
         "initializer_range": 0.02},
    ),
}  # fmt: skip
BOUNDS = {"float32": TOLERANCE, "bfloat16": 0.1}
"""The largest error of a record, in nats and in α. bfloat16 has 8 bits of mantissa: logits near 5 are 0.03 apart."""
BUDGET = 480.0
"""Seconds after which no step is begun."""
NCCL = 90.0
"""Seconds that a trainer may take to send its weights three times."""
SCALE = 0.8
"""Factor of the student's weights before they are sent, so that old ones would be seen."""


class Report:
    """The results of the steps, and the seconds that remain of `budget`."""

    def __init__(self, budget: float = BUDGET) -> None:
        self.start, self.budget = time.perf_counter(), budget
        self.rows: list[tuple[str, str, float]] = []

    def step(self, name: str, work: Callable[[], str | None]) -> None:
        """Do something and note what it says, whatever happens in it."""
        began = time.perf_counter()
        print(f"-- {name}", flush=True)
        try:
            if began - self.start > self.budget:
                raise TimeoutError(f"not tried: {self.budget:.0f} s are over")
            result = f"ok {work() or ''}"
        except Exception as error:
            traceback.print_exc()
            result = f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.rows.append((name, result, time.perf_counter() - began))
        print(f"-- {name}: {self.rows[-1][2]:.1f} s, {result}", flush=True)

    def table(self) -> str:
        lines = [f"| {name} | {result} | {seconds:.1f} |" for name, result, seconds in self.rows]
        return "\n".join(["| step | result | s |", "|---|---|--:|", *lines])


def make_pair(root: Path, shape: str) -> tuple[str, str]:
    """Both models with weights that bfloat16 holds exactly, so that only the arithmetic differs."""
    paths = []
    for seed, (name, sizes) in enumerate(zip(("teacher", "theta"), SHAPES[shape], strict=True), start=1):
        path = make_model(root / name, "qwen2", seed, **sizes)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        model.save_pretrained(path)
        paths.append(path)
    return paths[0], paths[1]


def worst_errors(
    rollouts: Sequence[Rollout], asked: Sequence[Request], oracle: Oracle, bound: float
) -> tuple[str, float]:
    """The largest error of each record in words, and of all.

    log q of a truncated distribution is left out: rounding moves a token over the edge of it.
    """
    worst = dict.fromkeys(RECORDS, 0.0)
    for rollout, one in zip(rollouts, asked, strict=True):
        cut = not one.sampling.keeps_all and one.sampling.repetition_penalty == 1.0
        sampling = None if cut else one.sampling
        expected, _ = expected_records(
            rollout, oracle.models["teacher"], oracle.models["theta"], oracle.ending, sampling
        )
        edge = on_the_edge(rollout, oracle.models["teacher"], oracle.models["theta"], oracle.ending, bound)
        for name in RECORDS:
            if not (cut and name == "log_q"):
                error = (getattr(rollout, name).double() - expected[name].cpu()).abs().nan_to_num(nan=torch.inf)
                error = error.masked_fill(edge, 0.0) if name in ("alpha", "log_q") else error
                worst[name] = max(worst[name], float(error.max()))
    largest = max(worst.values())
    words = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
    return f"(worst errors: {words}; bound {bound:g})", largest


def check(served: FusedServer, oracle: Oracle, bound: float, count: int, every: int) -> str:
    """Sample `count` requests at once; the records of each `every`th must be right."""
    asked = [request(TEXTS[i % len(TEXTS)] + str(i), **MIXED[i % len(MIXED)]) for i in range(count)]
    start = time.perf_counter()
    rollouts = served.sample(asked)
    seconds = time.perf_counter() - start
    words, largest = worst_errors(rollouts[::every], asked[::every], oracle, bound)
    if not largest <= bound:
        raise AssertionError(f"the records are off {words}")
    tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    return f"{count} requests, {tokens / seconds:.0f} tokens/s {words}"


def scaled(oracle: Oracle) -> Oracle:
    """The oracle with the student whose weights are sent."""
    for parameter in oracle.models["theta"].parameters():
        parameter.data = (parameter.data * SCALE).bfloat16().float()
    return oracle


def push(served: FusedServer, oracle: Oracle, device: str, dtype: torch.dtype) -> None:
    """Send the oracle's student, as a trainer does."""
    weights = [(name, weight.detach().to(device, dtype)) for name, weight in oracle.models["theta"].named_parameters()]
    metadata = [(name, str(weight.dtype).removeprefix("torch."), list(weight.shape)) for name, weight in weights]
    served.check_shapes([(name, shape) for name, _, shape in metadata])
    with served.push():
        served.client.update_named_params(metadata, iter(weights))


def send_over_nccl(url: str, teacher: str, theta: str, dtype: str) -> None:
    """The trainer's process: other weights three times, each time held against the oracle."""
    client = VLLMClient(base_url=url)
    served = FusedServer(client, teacher, make_tokenizer(), timeout=30.0)
    faulthandler.dump_traceback_later(NCCL, exit=True)
    print("NCCL: joining the server's group", flush=True)
    client.init_communicator(device="cuda:0")
    print("NCCL: joined, sending", flush=True)
    oracle, seconds = Oracle(teacher, theta), []
    for _ in range(3):
        scaled(oracle)
        began = time.perf_counter()
        push(served, oracle, "cuda:0", getattr(torch, dtype))
        seconds.append(f"{time.perf_counter() - began:.2f}")
        print("NCCL: sent", flush=True)
        seen = check(served, oracle, BOUNDS[dtype], 28, 1)
    print(f"NCCL: sent in {', '.join(seconds)} s;", seen, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=BOUNDS, default="bfloat16")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--nccl", nargs=3, metavar=("URL", "TEACHER", "THETA"), help="send weights, nothing else")
    args = parser.parse_args()
    if args.nccl:
        send_over_nccl(*args.nccl, args.dtype)
        return
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    report = Report()
    with tempfile.TemporaryDirectory(prefix="check-server-") as home:
        steps = Steps(Path(home), args.dtype, args.shape)
        try:
            report.step(f"models, {args.shape}", steps.models)
            report.step(f"server starts, {args.dtype}", steps.start)
            report.step("records of requests at once", steps.records)
            report.step("weights over NCCL, both processes on this GPU", steps.nccl)
            report.step("that server afterwards", steps.afterwards)
            report.step("a second server, weights from a file", steps.start_another)
            report.step("weights in a file, and records of them", steps.file)
        finally:
            steps.stop()
            print(report.table())


class Steps:
    """The steps, in the order of the methods; each says what it saw.

    Args:
        root: a folder for models and logs.
        dtype: of both models in the server.
        shape: one of `SHAPES`.
        flags: further ones of the server.
        server: variables of the server's processes, such as `CUDA_VISIBLE_DEVICES`.
        trainer: variables of the trainer's.
    """

    def __init__(
        self,
        root: Path,
        dtype: str,
        shape: str,
        *flags: str,
        server: Mapping[str, str] | None = None,
        trainer: Mapping[str, str] | None = None,
    ) -> None:
        self.root, self.dtype, self.shape = root, dtype, shape
        cache = str((64 << 20) if shape == "tiny" else (4 << 30))
        self.flags = ("--dtype", dtype, "--max-model-len", "256", "--kv-cache-memory-bytes", cache, *flags)
        if torch.cuda.is_available():  # what must be free; others may be at work here
            self.flags += ("--gpu-memory-utilization", "0.1")
        self.server, self.trainer = dict(server or {}), dict(trainer or {})
        self.servers: list[Server] = []

    def stop(self) -> None:
        """End the servers, and show what they said last."""
        for server in self.servers:
            server.stop()
        for log in sorted(self.root.glob("log*")):
            print(f"-- the end of {log.name}\n{log.read_text()[-1500:]}")

    def models(self) -> None:
        self.pair = make_pair(self.root, self.shape)
        self.oracle = Oracle(*self.pair)

    def start(self) -> None:
        program = ("-m", "optimal_sampling_trl.backends.vllm.server.serve")
        log = self.root / "log"
        self.servers.append(Server(*self.pair, log, *self.flags, program=program, environment=self.server))

    def records(self) -> str:
        client = VLLMClient(base_url=self.servers[0].url)
        served = FusedServer(client, self.pair[0], make_tokenizer(), timeout=60.0)
        served.pushed = served._call_workers("theta_state")  # as if the weights on disk had been sent
        return check(served, self.oracle, BOUNDS[self.dtype], 200, 10)

    def nccl(self) -> str:
        command = [sys.executable, __file__, "--nccl", self.servers[0].url, *self.pair, "--dtype", self.dtype]
        ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | self.trainer)
        seen = [line for line in (ran.stderr + ran.stdout).splitlines() if line.strip()]
        print("\n".join(seen[-40:]))
        if ran.returncode:
            raise RuntimeError(" / ".join(line for line in seen if "NCCL" in line or "rror" in line)[-280:])
        return seen[-1]

    def afterwards(self) -> str:
        server = self.servers[0]
        lines = server.log.read_text().splitlines()
        warned = [line.strip() for line in lines if "NCCL WARN" in line or line.startswith(("RuntimeError", "torch."))]
        state = f"{'up' if server.is_up() else 'GONE'}; its log: {' / '.join(warned[-2:])[:200] or 'quiet'}"
        server.stop()
        return state

    def start_another(self) -> None:
        self.servers.append(Server(*self.pair, self.root / "log2", *self.flags, environment=self.server))

    def file(self) -> str:
        client = FileClient(base_url=self.servers[-1].url)
        client.folder = self.root
        served = FusedServer(client, self.pair[0], make_tokenizer(), timeout=60.0)
        oracle = scaled(self.oracle)
        push(served, oracle, "cpu", getattr(torch, self.dtype))
        return check(served, oracle, BOUNDS[self.dtype], 28, 1)


if __name__ == "__main__":
    main()
