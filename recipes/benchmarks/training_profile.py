"""Record where the time of a training step goes after its rollout: its parts, the GPU's idle time, and its kernels."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from optimal_sampling_trl.trainers import dense_term, distillation
from random_pair import synchronize
from training_arms import ON_GPU
from training_watch import TimeWatch, time_calls

GROUPS: Mapping[str, str] = MappingProxyType(
    {
        "attention": r"flash|fmha|attention|sdpa",
        "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|splitk|gemv|::mm|addmm|bmm|matmul|linear",
        "optimizer": r"multi_tensor|adam|foreach",
        "copies": r"memcpy|memset|copy|CatArray|::cat|::to\b|fill",
        "reductions": r"reduce|softmax|norm|sum|max|mean|scan|topk|sort|gather|scatter|index",
    }
)
"""Kinds of kernels by their names; the first that fits counts, and what fits none is elementwise."""
ELEMENTWISE = "elementwise and other"
PREFIX = "part of a step: "
BACKWARD = "autograd::engine::evaluate_function: "
UPDATE = ("loss", "backward", "optimizer")
LISTED = 12


class Profile(TimeWatch):
    """Times the parts of a trainer's steps, and records the last one but for its rollout.

    A part ends when the GPU has done its work. The means are those of the steps before the last.

    Args:
        trainer: see `TimeWatch`.
        first: see `TimeWatch`.
        steps: of the training.
    """

    def __init__(self, trainer: Any, first: int | None, steps: int) -> None:
        self.trainer, self.steps = trainer, steps
        self.parts: list[dict[str, float]] = []  # of each step
        self.recorder: profile | None = None
        self.recorded: list[Any] = []  # events of the last step
        self._surround(trainer.vllm_generation, "sync_weights", "sync")
        self._surround(trainer, "compute_loss", "loss")
        self._surround(trainer.accelerator, "backward", "backward")
        for module in (dense_term, distillation):
            self._surround(module, "divergences_of", "divergences, within the loss")
        super().__init__(trainer, first)
        self._leave_out(trainer.vllm_generation, "generate")

    def _surround(self, owner: Any, method: str, part: str) -> None:
        time_calls(owner, method, part, self.parts, partial(record_function, PREFIX + part))

    def _leave_out(self, owner: Any, method: str) -> None:
        work: Callable[..., Any] = getattr(owner, method)

        def without(*given: Any, **named: Any) -> Any:
            self._stop()
            result = work(*given, **named)
            self._start()
            return result

        setattr(owner, method, without)

    def on_step_begin(self, *given: Any, **named: Any) -> None:
        """Begin a step, and a record of the last one."""
        if not self.parts:
            self._surround(self.trainer.optimizer, "step", "optimizer")
        self.parts.append(defaultdict(float))
        super().on_step_begin(*given, **named)
        self._start()

    def on_step_end(self, *given: Any, **named: Any) -> None:
        """End a step, and its record."""
        super().on_step_end(*given, **named)
        self._stop()

    def _start(self) -> None:
        if len(self.parts) == self.steps:
            gpu = [ProfilerActivity.CUDA] if ON_GPU else []
            self.recorder = profile(activities=[ProfilerActivity.CPU, *gpu])
            self.recorder.start()

    def _stop(self) -> None:
        if self.recorder:
            synchronize()
            self.recorder.stop()
            self.recorded.append(list(self.recorder.events() or ()))
            self.recorder = None

    def found(self) -> dict[str, Any]:
        """The mean seconds of the parts, each step's, and what was recorded of the last step."""
        before = self.parts[1:-1] or self.parts[:1]
        took = {part: sum(step[part] for step in before) / len(before) for part in self.parts[-1]}
        means = self.means(self.seconds[:-1])
        took["all else"] = means["other"] + means["update"] - sum(took[part] for part in UPDATE)
        recorded = took_apart(self.recorded, took)
        return means | {"steps": [step["step"] for step in self.seconds[:-1]], "profile": recorded}


def took_apart(recorded: list[list[Any]], took: Mapping[str, float]) -> dict[str, Any]:
    """Seconds of each part and of the GPU in it, of groups of kernels, of the largest kernels and backward passes.

    Args:
        recorded: the events of each record.
        took: seconds of each part without a record.
    """
    busy: Counter[str] = Counter()
    kernels, count, groups, backward = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for events in recorded:
        work = [event for event in events if is_work(event)]
        parts = [event for event in events if event.name.startswith(PREFIX) and event.device_type == DeviceType.CPU]
        for part in parts:
            busy[part.name.removeprefix(PREFIX)] += covered(work, part.time_range.start, part.time_range.end)
        busy["all"] += covered(work)
        for event in work:
            kernels[event.name] += seconds(event)
            count[event.name] += 1
            groups[group_of(event.name)] += seconds(event)
        for event in events:
            if event.name.startswith(BACKWARD):
                whole = event.device_time_total if ON_GPU else event.cpu_time_total
                backward[event.name.removeprefix(BACKWARD)] += whole / 1e6
    busy["all else"] = busy["all"] - busy["sync"] - sum(busy[part] for part in UPDATE)
    return {
        "parts": {part: {"seconds": took[part], "busy": busy[part]} for part in took},
        "kernels": dict(groups.most_common()),
        "largest": [[name[:90], spent, count[name]] for name, spent in kernels.most_common(LISTED)],
        "backward": dict(backward.most_common(LISTED)),
    }


def is_work(event: Any) -> bool:
    """Return True for a kernel or a copy of a GPU, and on a CPU for an operation of torch."""
    if event.name.startswith(PREFIX):
        return False
    if ON_GPU:
        return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    return event.name.startswith("aten::")


def seconds(event: Any) -> float:
    """The seconds between an event's start and its end, without those of what it calls."""
    return (event.time_range.elapsed_us() if ON_GPU else event.self_cpu_time_total) / 1e6


def covered(events: Iterable[Any], begin: float = -torch.inf, end: float = torch.inf) -> float:
    """The seconds between two times in which at least one of the events went on."""
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    total, reached = 0.0, begin
    for start, stop in spans:
        if begin <= start <= end:
            total += max(0.0, stop - max(start, reached))
            reached = max(reached, stop)
    return total / 1e6


def group_of(kernel: str) -> str:
    """The group of a kernel."""
    return next((group for group, names in GROUPS.items() if re.search(names, kernel, re.IGNORECASE)), ELEMENTWISE)
