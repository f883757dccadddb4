# /// script
# dependencies = ["optimal-sampling-trl[vllm]"]
# ///
"""Measure the cost of the mixture: the fused engine against teacher and student alone, each in plain vLLM.

    python recipes/benchmarks/engine.py --shapes 7b 1.5b  # on a GPU with 80 GB, sizes of Qwen2.5
    OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind python recipes/benchmarks/engine.py  # on a CPU, small ones

Random models of Qwen2's shape, built on the spot: no download; the folder `TMPDIR` must hold them (20 GB for 7b). On a
CPU the vocabulary is as small against the models as that of Qwen2.5 is against its 1.5B and 0.5B (13 000 parameters
of the pair for each token). All engines live in one process and take turns, so that whatever else runs on the machine
slows them alike; of each, the fastest of a few rounds counts. Every engine generates the same number of tokens from
the same prompts, with the log-probability of each sampled token, which is what TRL asks for; the mixture adds α, log θ
and log t.

| column | what it says |
|---|---|
| `speed/teacher` | tokens/s of the mixture ÷ those of the teacher alone |
| `reads` | weights and caches that the teacher alone reads ÷ those of both: `speed/teacher` where reading is all |
| `time/sum` | time of the mixture ÷ (the teacher's + the student's) |
| `step` | ms of the mixture for one token of each sequence, prefill included |
| `bound` | share of that which reading both models' weights and caches once would take at the speed of a large copy |
| `records` | what α, log θ and log t add to the time of the mixture |
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
if torch.cuda.is_available():
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")

import vllm
from transformers import Qwen2ForCausalLM
from vllm import LLM, SamplingParams, TokensPrompt

from optimal_sampling_trl.backends.vllm.backend import VLLMBackend
from optimal_sampling_trl.backends.vllm.requests import to_sampling_params
from optimal_sampling_trl.backends.vllm.wire import RECORD
from random_pair import describe, fastest, make_random_pair, make_requests, parser, print_head, shapes, synchronize

HEAD = (
    "batch", "mixture tok/s", "teacher tok/s", "student tok/s", "speed/teacher", "reads", "time/sum", "step", "bound",
    "records"
)  # fmt: skip


def main() -> None:
    args = parse()
    home = tempfile.TemporaryDirectory(prefix="benchmark-")
    teacher, theta = make_random_pair(home.name, args)
    before = used()
    fused = VLLMBackend(teacher, theta, **arguments(args, "teacher", "theta"))
    alone = {
        name: LLM(path, logprobs_mode="processed_logprobs", **arguments(args, name))
        for name, path in (("teacher", teacher), ("theta", theta))
    }
    print(describe(args, f"vLLM {vllm.__version__}"))
    bandwidth = measure_bandwidth()
    held = (used() - before) / 2**30
    print(f"a large copy moves {bandwidth / 1e9:.0f} GB/s; the engines hold {held:.1f} GiB\n")
    print_head(*HEAD)
    for batch in args.batches:
        print(row(batch, measure(fused, alone, batch, args), bandwidth, args), flush=True)
    print("\n" + reload(fused, theta, args))
    if args.profile:
        print("\n" + profile(fused, args))
    fused.close()


def parse() -> argparse.Namespace:
    flags = parser(__doc__)
    flags.add_argument(
        "--profile", type=int, metavar="BATCH", help="also what a step of this batch spends its time on"
    )
    if torch.cuda.is_available():
        flags.set_defaults(batches=(8, 32, 128, 256), prompt=128, tokens=192, rounds=2, dtype="bfloat16")
    return flags.parse_args()


def arguments(args: argparse.Namespace, *roles: str) -> dict[str, Any]:
    """Return those of an engine that holds the models of these roles, with a cache for the largest batch."""
    size = getattr(torch, args.dtype).itemsize
    tokens = max(args.batches) * (args.prompt + args.tokens + 32)
    given: dict[str, Any] = {
        "dtype": args.dtype,
        "enable_prefix_caching": False,
        "max_model_len": max(512, args.prompt + args.tokens + 1),
        "max_num_seqs": max(args.batches),
        "seed": 0,
        "kv_cache_memory_bytes": 1 << 29,
        "enforce_eager": True,
    }
    if torch.cuda.is_available():
        given["kv_cache_memory_bytes"] = sum(shapes(args)[role].cached for role in roles) * size * tokens
        given |= {"gpu_memory_utilization": 0.1, "enforce_eager": False}
        given["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]}
    return given


def used() -> int:
    """Bytes of the GPU in use."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def measure_bandwidth() -> float:
    """Bytes that a large copy reads and writes in a second."""
    source = torch.empty(1 << 30 if torch.cuda.is_available() else 1 << 26, dtype=torch.uint8)
    source = source.cuda() if torch.cuda.is_available() else source
    target = torch.empty_like(source)
    took = fastest({"copy": lambda: target.copy_(source)}, 5)
    return 2 * source.numel() / took["copy"]


def measure(fused: VLLMBackend, alone: dict[str, LLM], batch: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the mixture with and without records, of the teacher and of the student."""
    requests = make_requests(batch, args)
    prompts = [TokensPrompt(prompt_token_ids=request.prompt_ids) for request in requests]
    plain = SamplingParams(max_tokens=args.tokens, ignore_eos=True, logprobs=0, flat_logprobs=True, detokenize=False)
    recorded = [to_sampling_params(request, fused.pair.ending) for request in requests]
    bare = [params.clone() for params in recorded]
    for params in bare:
        params.logprobs, params.extra_args = 0, {k: v for k, v in params.extra_args.items() if k != RECORD}
    works: dict[str, Callable[[], object]] = {
        name: lambda llm=llm: llm.generate(prompts, plain, use_tqdm=False) for name, llm in alone.items()
    }
    works["mixture"] = lambda: fused.llm.generate(prompts, recorded, use_tqdm=False)
    works["without records"] = lambda: fused.llm.generate(prompts, bare, use_tqdm=False)
    return fastest(works, args.rounds)


def row(batch: int, took: dict[str, float], bandwidth: float, args: argparse.Namespace) -> str:
    """The table's line of a batch."""
    speed = {name: batch * args.tokens / took[name] for name in took}
    size, context = getattr(torch, args.dtype).itemsize, args.prompt + args.tokens / 2
    read = {role: size * (model.parameters + batch * context * model.cached) for role, model in shapes(args).items()}
    both, step = sum(read.values()), took["mixture"] / args.tokens
    alone = took["teacher"] + took["theta"]
    return (
        f"| {batch} | {speed['mixture']:.1f} | {speed['teacher']:.1f} | {speed['theta']:.1f} | "
        f"{speed['mixture'] / speed['teacher']:.2f} | {read['teacher'] / both:.2f} | {took['mixture'] / alone:.2f} | "
        f"{step * 1e3:.2f} ms | {both / bandwidth / step:.0%} | {took['mixture'] / took['without records'] - 1:+.1%} |"
    )


def reload(fused: VLLMBackend, theta: str, args: argparse.Namespace) -> str:
    """Measure replacing the student's weights, against a copy of their bytes on the same device."""
    model = Qwen2ForCausalLM.from_pretrained(theta, dtype=getattr(torch, args.dtype))
    model = model.cuda() if torch.cuda.is_available() else model
    weights = [(name, weight.detach()) for name, weight in model.named_parameters()]
    targets = [torch.empty_like(weight) for _, weight in weights]

    def copy() -> None:
        for target, (_, weight) in zip(targets, weights):
            target.copy_(weight)

    took = fastest({"reload": lambda: fused.load_theta(weights), "copy": copy}, args.rounds)
    size = sum(weight.numel() * weight.element_size() for _, weight in weights) / 2**20
    return (
        f"reload of the student ({size:.0f} MiB): {took['reload'] * 1e3:.1f} ms; a copy of the same bytes "
        f"{took['copy'] * 1e3:.1f} ms; ratio {took['reload'] / took['copy']:.1f}"
    )


def profile(fused: VLLMBackend, args: argparse.Namespace) -> str:
    """The kernels of a GPU, or the operations of a CPU, by their share of a step of the mixture."""
    requests = make_requests(args.profile, args)
    kind = torch.profiler.ProfilerActivity.CUDA if torch.cuda.is_available() else torch.profiler.ProfilerActivity.CPU
    fused.generate(requests)
    with torch.profiler.profile(activities=[kind]) as trace:
        took = fastest({"mixture": lambda: fused.generate(requests)}, 1)["mixture"]
        synchronize()
    runs = 2 * args.tokens  # one to warm up
    averages = trace.key_averages()
    gpu = torch.cuda.is_available()
    times = {event.key: event.self_device_time_total if gpu else event.self_cpu_time_total for event in averages}
    counts = {event.key: event.count for event in averages}
    lines = [f"batch {args.profile}: {took / args.tokens * 1e3:.2f} ms a step under the profiler, of which"]
    lines += [
        f"{sum(times.values()) / runs / 1e3:9.3f} ms all {'kernels, on one stream or two' if gpu else 'operations'}"
    ]
    for key in sorted(times, key=lambda key: -times[key])[:25]:
        lines.append(f"{times[key] / runs / 1e3:9.3f} ms {counts[key] / runs:7.1f} times  {key[:110]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
