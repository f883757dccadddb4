"""The stopwatch of `training.py`: seconds of the parts of a trainer's steps, and their memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from transformers import TrainerCallback

from random_pair import synchronize
from training_arms import ON_GPU


class TimeWatch(TrainerCallback):
    """Times the parts of a trainer's steps.

    Args:
        trainer: TRL's, or this package's.
        first: tokens of a completion of the first step, None for as many as of the others.
    """

    def __init__(self, trainer: Any, first: int | None = None) -> None:
        self.seconds: list[dict[str, float]] = []
        self.began = 0.0
        self.generation, self.first = trainer.vllm_generation, first
        self.tokens: int = self.generation.max_completion_length
        self._time(trainer.vllm_generation, "generate", "rollout")
        self._time(trainer.vllm_generation, "sync_weights", "sync")
        self._time(trainer, "_prepare_inputs", "before")

    def _time(self, owner: Any, method: str, part: str) -> None:
        time_calls(owner, method, part, self.seconds)

    def on_step_begin(self, *given: Any, **named: Any) -> None:
        """Begin a step; the first forgets what the start of the engine took."""
        synchronize()
        if not self.seconds and ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        if self.first:
            set_length(self.generation, self.tokens if self.seconds else self.first)
        self.seconds.append(dict.fromkeys(("rollout", "sync", "before"), 0.0))
        self.began = time.perf_counter()

    def on_step_end(self, *given: Any, **named: Any) -> None:
        """End a step."""
        synchronize()
        self.seconds[-1]["step"] = time.perf_counter() - self.began

    def found(self) -> dict[str, Any]:
        """The mean seconds of each part, without the first step, and the seconds of each step."""
        return self.means(self.seconds) | {"steps": [step["step"] for step in self.seconds]}

    def means(self, seconds: list[dict[str, float]]) -> dict[str, float]:
        """The mean seconds of each part of some steps, without the first."""
        steps = seconds[1:] or seconds
        mean = {part: sum(step[part] for step in steps) / len(steps) for part in steps[0]}
        before = mean.pop("before")
        return mean | {"update": mean["step"] - before, "other": before - mean["rollout"] - mean["sync"]}


def time_calls(
    owner: Any,
    method: str,
    part: str,
    steps: Sequence[dict[str, float]],
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Add the seconds of each call to a part of the last step; a call ends when the GPU has done its work.

    Args:
        owner: whose method is replaced.
        method: its name.
        part: what the seconds are of.
        steps: seconds of the parts of each step; the one that goes on is the last.
        around: opens what each call runs in.
    """
    work: Callable[..., Any] = getattr(owner, method)

    def timed(*given: Any, **named: Any) -> Any:
        synchronize()
        began = time.perf_counter()
        with around():
            result = work(*given, **named)
            synchronize()
        steps[-1][part] += time.perf_counter() - began
        return result

    setattr(owner, method, timed)


def set_length(generation: Any, tokens: int) -> None:
    """Let a completion have so many tokens: TRL reads one attribute for it, this package's engines another."""
    if hasattr(generation, "sampling"):
        generation.sampling = replace(generation.sampling, max_tokens=tokens)
    generation.max_completion_length = tokens


def memory(trainer: Any) -> float:
    """GiB at the most; on a GPU without the engine's cache, whose size is a setting."""
    if not ON_GPU:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    llm = trainer.vllm_generation.llm
    engine = llm.backend.llm if hasattr(llm, "backend") else llm  # the fused engine's, or TRL's
    cached = sum(engine.collective_rpc(cache_bytes))
    return (torch.cuda.max_memory_allocated() - cached) / 2**30


def cache_bytes(worker: Any) -> int:
    """Bytes of an engine's KV cache."""
    caches = {cache.untyped_storage().data_ptr(): cache.untyped_storage().nbytes() for cache in tensors(worker)}
    return sum(caches.values())


def tensors(worker: Any) -> list[torch.Tensor]:
    """The tensors of an engine's KV cache."""
    return [cache for cache in worker.model_runner.kv_caches if isinstance(cache, torch.Tensor)]
