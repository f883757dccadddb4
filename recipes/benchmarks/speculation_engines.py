"""The engines that `speculation.py` compares, each in a process of its own, and the batches that they are given."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import log, nan
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from vllm import LLM, SamplingParams, TokensPrompt

from optimal_sampling_trl.backends.vllm.backend import VLLMBackend
from optimal_sampling_trl.backends.vllm.requests import to_sampling_params
from optimal_sampling_trl.backends.vllm.speculation import AUTO, AUTO_COUNTS
from optimal_sampling_trl.mixture import Mixture
from random_pair import fastest, make_requests, shapes

LONGEST = 4
"""The longest request of an uneven rollout, in mean lengths."""
COUNTERS = ("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")


class Work(NamedTuple):
    """Hold the tokens that each request of a batch asks for, and whether every other one is the student's alone."""

    lengths: list[int]
    half: bool = False

    def mixture(self, index: int, epsilon: float) -> Mixture:
        """Return the mixture of a request, by its number."""
        return Mixture.theta_only() if self.half and index % 2 else Mixture("trust_region", epsilon=epsilon)


def workloads(args: argparse.Namespace) -> dict[str, Work]:
    """The batches to measure, by their names."""
    found = {str(batch): Work([args.tokens] * batch) for batch in args.batches}
    if args.uneven:
        shares = [-log((index + 0.5) / args.uneven) for index in range(args.uneven)]
        lengths = [max(1, round(args.tokens * min(share, LONGEST))) for share in shares]
        found |= {f"{args.uneven} uneven": Work(lengths), f"{args.uneven} uneven, half own": Work(lengths, half=True)}
    return found


def arguments(args: argparse.Namespace, counts: Sequence[int], *roles: str) -> dict[str, Any]:
    """Return those of an engine that holds the models of these roles, with a graph for each batch."""
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


class Seen(NamedTuple):
    """Hold tokens a second, the share of drafts that were kept, and tokens of a sequence for each pass."""

    speed: float
    kept: float = 0.0
    passes: float = 1.0


class Engine:
    """A process with an engine: both models with `k` drafts, or the teacher alone where `k` is None.

    One that has `ended` stops no other: it measures nothing from then on.
    """

    def __init__(self, k: str | None, args: argparse.Namespace) -> None:
        self.k, self.ended = k, False
        spawn = get_context("spawn")
        self.pipe, end = spawn.Pipe()
        spawn.Process(target=work, args=(end, k, args)).start()
        end.close()

    def measure(self, name: str, epsilon: float) -> Seen:
        """Measure a batch, by its name: what the engine makes of it, NaN where it has ended."""
        self.tell((name, epsilon))
        return self.answer() or Seen(nan, nan, nan)

    def tell(self, words: object) -> None:
        """Send it the next thing to do."""
        with suppress(BrokenPipeError):  # the answer tells it
            self.pipe.send(words)

    def answer(self) -> Any:
        """Wait for what it says next; None from one that has ended."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.ended = True
            return None


def work(pipe: Any, k: str | None, args: argparse.Namespace) -> None:
    """The process of an engine: it waits for the pair, starts, says what that took, and measures what it is asked."""
    pipe.recv()
    os.environ["VLLM_CACHE_ROOT"] = str(args.folder / f"compiled-{k}")  # two that compile at once share no folder
    began = time.perf_counter()
    measure = start_teacher(args) if k is None else start_mixture(k, args)
    taken = torch.cuda.memory_reserved() / 2**30 if torch.cuda.is_available() else nan
    pipe.send({"k": k, "seconds": time.perf_counter() - began, "GiB": taken})
    while True:
        try:
            name, epsilon = pipe.recv()
        except EOFError:
            return
        pipe.send(measure(workloads(args)[name], epsilon))


def start_teacher(args: argparse.Namespace) -> Callable[[Work, float], Seen]:
    """Start the teacher alone; return what measures a batch."""
    teacher = str(args.folder / "teacher")
    llm = LLM(teacher, logprobs_mode="processed_logprobs", **arguments(args, (0,), "teacher"))
    settings = {"ignore_eos": True, "logprobs": 0, "flat_logprobs": True, "detokenize": False}

    def measure(work: Work, epsilon: float) -> Seen:
        prompts = [TokensPrompt(prompt_token_ids=one.prompt_ids) for one in make_requests(len(work.lengths), args)]
        params = [SamplingParams(max_tokens=length, **settings) for length in work.lengths]
        return Seen(rate(partial(llm.generate, prompts, params, use_tqdm=False), work.lengths, args))

    return measure


def start_mixture(k: str, args: argparse.Namespace) -> Callable[[Work, float], Seen]:
    """Start both models with so many drafts; return what measures a batch."""
    counts, value = (AUTO_COUNTS, k) if k == AUTO else ((int(k),), int(k))
    settings = arguments(args, counts, "teacher", "theta")
    pair = (str(args.folder / role) for role in ("teacher", "theta"))
    return partial(measure_mixture, VLLMBackend(*pair, num_speculative_tokens=value, **settings), args)


def measure_mixture(backend: VLLMBackend, args: argparse.Namespace, work: Work, epsilon: float) -> Seen:
    """Measure a batch."""
    requests = [
        replace(request, mixture=work.mixture(index, epsilon), sampling=replace(request.sampling, max_tokens=length))
        for index, (request, length) in enumerate(zip(make_requests(len(work.lengths), args), work.lengths))
    ]
    prompts = [TokensPrompt(prompt_token_ids=request.prompt_ids) for request in requests]
    params = [to_sampling_params(request, backend.pair.ending) for request in requests]
    before = counters(backend)
    speed = rate(partial(backend.llm.generate, prompts, params, use_tqdm=False), work.lengths, args)
    passes, drafted, kept = (now - then for now, then in zip(counters(backend), before, strict=True))
    return Seen(speed, kept / max(drafted, 1), 1 + kept / max(passes, 1))


def rate(work: Callable[[], object], lengths: list[int], args: argparse.Namespace) -> float:
    """Tokens a second of the work of a batch, its prompts included."""
    return sum(lengths) / fastest({"work": work}, args.rounds)["work"]


def counters(backend: VLLMBackend) -> list[int]:
    """vLLM's counts of passes with drafts, of drafts, and of those that were kept."""
    values = {metric.name: getattr(metric, "value", 0) for metric in backend.llm.get_metrics()}
    return [values.get(f"vllm:{name}", 0) for name in COUNTERS]
