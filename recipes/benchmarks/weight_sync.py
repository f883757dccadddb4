# /// script
# dependencies = ["optimal-sampling-trl[vllm]", "psutil", "requests"]
# ///
"""Measure sending the student's weights to a server: over NCCL, from one GPU to another, as a trainer does it.

    python recipes/benchmarks/weight_sync.py --shapes 0.5b 1.5b  # two GPUs; `TMPDIR` must hold the models (5 GB)

A server of a random pair on GPU 0, and TRL's client in a process on GPU 1, which sends the whole student a few times,
each time with the checks that a trainer makes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")  # where TRL's client and the server meet

import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM
from trl.generation.vllm_client import VLLMClient

from http_server import OURS, serving
from optimal_sampling_trl.backends.vllm.server.client import FusedServer
from random_pair import describe, make_random_pair, on_gpu, parser


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--pair", nargs=2, help=argparse.SUPPRESS)
    flags.add_argument("--url", help=argparse.SUPPRESS)
    flags.set_defaults(dtype="bfloat16")
    args = flags.parse_args()
    if args.url:
        send(args)
        return
    if torch.cuda.device_count() < 2:
        raise SystemExit("NCCL wants a GPU for the server and another for the trainer; here are fewer than 2.")
    with tempfile.TemporaryDirectory(prefix="benchmark-sync-") as root:
        teacher, theta = make_random_pair(root, args)
        print(describe(args, "a server on one GPU, a trainer on another"), flush=True)
        serve = ("--dtype", args.dtype, "--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager")
        serve += ("--kv-cache-memory-bytes", str(1 << 30), "--gpu-memory-utilization", "0.1")
        with serving(*OURS, teacher, "--theta", theta, *serve, environment=on_gpu(0)) as (url, _):
            command = [sys.executable, *sys.argv, "--url", url, "--pair", teacher, theta]
            subprocess.run(command, env=on_gpu(1), check=True, timeout=120)


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
    best = min(seconds[1:])
    print(
        f"sending the student ({size / 2**20:.0f} MiB) over NCCL: "
        f"{best * 1e3:.0f} ms, the first {seconds[0] * 1e3:.0f} ms; {size / best / 1e9:.1f} GB/s; joining the group "
        f"{joined:.1f} s; all: {', '.join(f'{one * 1e3:.0f}' for one in seconds)}",
        flush=True,
    )


def push(
    served: FusedServer, metadata: list[tuple[str, str, list[int]]], weights: list[tuple[str, torch.Tensor]]
) -> float:
    """Seconds of one, with the checks that a trainer makes."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    with served.push():
        served.client.update_named_params(metadata, iter(weights))
    torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
