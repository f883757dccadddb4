# /// script
# dependencies = ["optimal-sampling-trl[vllm]"]
# ///
"""Measure speculative sampling: the fused engine whose student drafts k tokens, against none and the teacher alone.

    python recipes/benchmarks/speculation.py --shapes 7b 1.5b  # on a GPU with 80 GB, sizes of Qwen2.5; some minutes

Random models of Qwen2's shape, built on the spot. Random weights say nothing of how well a student drafts, so that
the mixture sets it: a trust region keeps q within ε nats of θ, and then at least 1 - sqrt(ε/2) of the drafts are kept,
whatever the two models are. Each ε is a row, and stands for a pair whose drafts are kept as often. The engines run one
after the other; of each, the fastest of a few rounds counts, over the decoding of the same number of tokens, records
included. `--uneven` adds a rollout whose requests end one after the other, as those of training do: their lengths are
exponential, `--tokens` in the mean and four times as many at most; and the same with every other request from the
student alone, as in GRPO with `theta_fraction=0.5`.

| column | what it says |
|---|---|
| `k` | tokens that the student drafts before a pass of both models verifies them; 0: none, `auto`: as pay |
| `kept` | share of the drafts that were kept |
| `tokens a pass` | tokens of a sequence for each pass of both models |
| `speed/teacher` | tokens/s ÷ those of the teacher alone in plain vLLM |
| `speed/k=0` | tokens/s ÷ those of the engine without speculation |
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
if torch.cuda.is_available():
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")

import vllm
from vllm import LLM, SamplingParams, TokensPrompt

from optimal_sampling_trl.backends.vllm.backend import VLLMBackend
from optimal_sampling_trl.backends.vllm.requests import to_sampling_params
from optimal_sampling_trl.backends.vllm.speculation import AUTO, AUTO_COUNTS
from optimal_sampling_trl.mixture import Mixture
from random_pair import describe, fastest, make_random_pair, make_requests, parser, print_head, shapes

HEAD = ("batch", "ε", "k", "kept", "tokens a pass", "tok/s", "speed/teacher", "speed/k=0")
LONGEST = 4
"""The longest request of an uneven rollout, in mean lengths."""
COUNTERS = ("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")


def main() -> None:
    args = parse()
    home = tempfile.TemporaryDirectory(prefix="benchmark-")
    root = args.folder or Path(home.name)
    if not (root / "theta" / "tokenizer.json").exists():  # written last
        make_random_pair(str(root), args)
    teacher, theta = str(root / "teacher"), str(root / "theta")
    print(describe(args, f"vLLM {vllm.__version__}"))
    alone = measure_teacher(teacher, args)
    print_head(*HEAD)
    without: dict[str, float] = {}
    for k in args.k:
        counts, value = (AUTO_COUNTS, k) if k == AUTO else ((int(k),), int(k))
        settings = arguments(args, counts, "teacher", "theta")
        backend = VLLMBackend(teacher, theta, num_speculative_tokens=value, **settings)
        for name, work in workloads(args).items():
            for epsilon in args.epsilon if value else args.epsilon[:1]:  # without drafts it is of no consequence
                speed, kept, passes = measure(backend, work, epsilon, args)
                without.setdefault(name, speed)
                ratios = f"{speed / alone[name]:.2f} | {speed / without[name]:.2f}"
                print(f"| {name} | {epsilon} | {k} | {kept:.3f} | {passes:.2f} | {speed:.0f} | {ratios} |", flush=True)
        backend.close()


def parse() -> argparse.Namespace:
    flags = parser(__doc__)
    kinds = "the engine without them first, `auto` the one that chooses"
    flags.add_argument("--k", nargs="+", default=["0", "1", "3"], help=f"drafts; {kinds}")
    flags.add_argument("--epsilon", type=float, nargs="+", default=[0.05, 0.2])
    flags.add_argument(
        "--uneven", type=int, metavar="BATCH", help="also a rollout of so many requests of many lengths"
    )
    flags.add_argument("--folder", type=Path, help="where the pair is kept, and its code compiled once for all runs")
    flags.set_defaults(batches=(1, 8, 32, 64, 128, 256), prompt=128, tokens=128, rounds=1, dtype="bfloat16")
    return flags.parse_args()


class Work(NamedTuple):
    """Hold the tokens that each request of a batch asks for, and whether every other one is the student's alone."""

    lengths: list[int]
    half: bool = False

    def mixture(self, index: int, epsilon: float) -> Mixture:
        """That of a request, by its number."""
        return Mixture.theta_only() if self.half and index % 2 else Mixture("trust_region", epsilon=epsilon)


def workloads(args: argparse.Namespace) -> dict[str, Work]:
    """The batches to measure, by their names."""
    found = {str(batch): Work([args.tokens] * batch) for batch in args.batches}
    if args.uneven:
        shares = [-math.log((index + 0.5) / args.uneven) for index in range(args.uneven)]
        lengths = [max(1, round(args.tokens * min(share, LONGEST))) for share in shares]
        found |= {f"{args.uneven} uneven": Work(lengths), f"{args.uneven} uneven, half own": Work(lengths, half=True)}
    return found


def arguments(args: argparse.Namespace, counts: Sequence[int], *roles: str) -> dict[str, Any]:
    """Those of an engine that holds the models of these roles, with a graph for each batch."""
    size = getattr(torch, args.dtype).itemsize
    asked = [work.lengths for work in workloads(args).values()]
    most, longest = max(map(len, asked)), max(map(max, asked))
    context = max(512, args.prompt + longest + 1)
    tokens = max(context + 256, *(sum(lengths) + len(lengths) * (args.prompt + 32) for lengths in asked))
    sizes = {*args.batches, *(range(16, most + 1, 16) if args.uneven else ())}
    graphs = sorted({*sizes, *(size * (count + 1) for size in sizes for count in counts)})
    return {
        "dtype": args.dtype,
        "enable_prefix_caching": False,
        "max_model_len": context,
        "max_num_seqs": most,
        "max_num_batched_tokens": 8192,
        "seed": 0,
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": sum(shapes(args)[role].cached for role in roles) * size * tokens,
        "disable_log_stats": False,
        "compilation_config": {"cudagraph_capture_sizes": graphs, "max_cudagraph_capture_size": graphs[-1]},
    }


def measure_teacher(teacher: str, args: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of the teacher alone, by the batch's name."""
    llm = LLM(teacher, logprobs_mode="processed_logprobs", **arguments(args, (0,), "teacher"))
    settings = {"ignore_eos": True, "logprobs": 0, "flat_logprobs": True, "detokenize": False}
    found = {}
    for name, (lengths, _) in workloads(args).items():
        prompts = [TokensPrompt(prompt_token_ids=one.prompt_ids) for one in make_requests(len(lengths), args)]
        params = [SamplingParams(max_tokens=length, **settings) for length in lengths]
        found[name] = rate(partial(llm.generate, prompts, params, use_tqdm=False), lengths, args)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    return found


def measure(backend: VLLMBackend, work: Work, epsilon: float, args: argparse.Namespace) -> tuple[float, float, float]:
    """Tokens a second, the share of drafts that are kept, and tokens of a sequence for each pass."""
    requests = [
        replace(request, mixture=work.mixture(index, epsilon), sampling=replace(request.sampling, max_tokens=length))
        for index, (request, length) in enumerate(zip(make_requests(len(work.lengths), args), work.lengths))
    ]
    prompts = [TokensPrompt(prompt_token_ids=request.prompt_ids) for request in requests]
    params = [to_sampling_params(request, backend.pair.ending) for request in requests]
    before = counters(backend)
    speed = rate(partial(backend.llm.generate, prompts, params, use_tqdm=False), work.lengths, args)
    passes, drafted, kept = (now - then for now, then in zip(counters(backend), before, strict=True))
    return speed, kept / max(drafted, 1), 1 + kept / max(passes, 1)


def rate(work: Callable[[], object], lengths: list[int], args: argparse.Namespace) -> float:
    """Tokens a second of the work of a batch, its prompts included."""
    return sum(lengths) / fastest({"work": work}, args.rounds)["work"]


def counters(backend: VLLMBackend) -> list[int]:
    """vLLM's counts of passes with drafts, of drafts, and of those that were kept."""
    values = {metric.name: getattr(metric, "value", 0) for metric in backend.llm.get_metrics()}
    return [values.get(f"vllm:{name}", 0) for name in COUNTERS]


if __name__ == "__main__":
    main()
