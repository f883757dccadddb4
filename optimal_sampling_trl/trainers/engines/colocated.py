"""The fused engine in a trainer's process: TRL's own colocated engine with the fused model inside.

Everything in TRL's `VLLMGeneration` that this relies on is named here and checked by tests/whole/test_upstream_trl.py.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Container
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from trl.generation import vllm_generation

from ...pairing import Pair, Source
from ...rollouts.request import Request
from ...rollouts.rollout import Rollout
from .base import MixturePlan, TrlReturns, on_all_ranks, refuse_images
from .push import PushedGeneration
from .student_checks import check_overrides, check_student
from .turns import Context

if TYPE_CHECKING:
    from ...backends.vllm.backend import VLLMBackend

CPU_CACHE = 1 << 30
"""Bytes of the engine's KV cache on a CPU, unless the user says otherwise."""


def take_port() -> None:
    """Name a free port for the group of one process: TRL's first choice is the same in runs that start at once."""
    with socket.create_server(("", 0)) as free:
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])


def pair_arguments(plan: MixturePlan, trl_arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the engine's arguments by which a pair is read and judged: TRL's, and over them the user's."""
    arguments = {
        "max_model_len": trl_arguments["max_model_length"],
        "tensor_parallel_size": trl_arguments["tensor_parallel_size"],
        "trust_remote_code": trl_arguments["trust_remote_code"],
        "distributed_executor_backend": "external_launcher",  # of every engine that TRL starts in process
    }
    given = {name: value for name, value in arguments.items() if value is not None}
    return given | (plan.generator.engine_arguments or {})


class EngineGeneration(PushedGeneration):
    """TRL's own colocated engine with the fused model inside: process groups, gathering and sleep stay TRL's.

    Args:
        plan: which mixture each completion is sampled from.
        pair: what the engine is built on, read with `pair_arguments`.
        folder: the student's, from which the engine is built.
        **trl_arguments: what TRL passes to its `VLLMGeneration`.
    """

    engine = "vLLM in this process"

    llm: Any  # a `FusedLLM`, where TRL holds a `vllm.LLM`
    pair: Pair

    def __init__(self, plan: MixturePlan, pair: Pair, folder: Source, **trl_arguments: Any) -> None:
        self.pair, self.folder = pair, folder
        self._requests: list[Request] = []  # of this rank's call
        self._first = 0  # position of its rollouts among those of the ranks that share the engine
        super().__init__(plan, **trl_arguments)

    def left_out(self) -> Container[str]:
        """Return the names that the student's folder ties to another one."""
        names = self.folder.weight_names
        return () if names is None else names.ties

    def _init_vllm(self) -> None:
        if self.accelerator.num_processes == 1 and not os.environ.get("MASTER_PORT"):
            take_port()
        with patch.object(vllm_generation, "LLM", self._build_llm):
            super()._init_vllm()

    def _build_llm(self, model: str, **engine_arguments: Any) -> FusedLLM:
        """Build what TRL calls `vllm.LLM`: `model`, the student's folder, goes beside the teacher."""
        from ...backends.vllm.backend import VLLMBackend

        check_student(self.model, self.folder, self.weights)
        check_overrides(self.model.config, self.folder.overrides)
        if self.accelerator.device.type == "cpu":  # vLLM would turn a float32 student into bfloat16
            engine_arguments["dtype"] = "float32"
            # Here vLLM reads TRL's share of a GPU's memory as one of the machine's, which the trainer works in, too.
            engine_arguments["kv_cache_memory_bytes"] = CPU_CACHE
        arguments = {name: value for name, value in engine_arguments.items() if value is not None}
        arguments.update(self.plan.generator.engine_arguments or {})
        backend = VLLMBackend(self.pair.teacher, model, pair=self.pair, **arguments)
        if self.plan.will_evaluate_alone:
            backend.prepare_alone()
        return FusedLLM(backend, self._requests_of_group, self.most_read, self.accelerator)

    def _requests_of_group(self) -> list[Request]:
        """The requests of the ranks that share one engine by tensor parallelism; TRL gathers the student's prompts."""
        if self.tensor_parallel_size == 1:
            return self._requests
        gathered: list[Any] = [None] * self.tensor_parallel_size
        torch.distributed.all_gather_object(gathered, self._requests, group=self.tp_group)
        self._first = sum(map(len, gathered[: self.accelerator.process_index % self.tensor_parallel_size]))
        return [request for of_rank in gathered for request in of_rank]

    def unread_settings(self) -> dict[str, str]:
        """Return TRL's share of a GPU's memory where there is no GPU."""
        if self.accelerator.device.type != "cpu":
            return {}
        reader = "on a GPU; on a CPU `kv_cache_memory_bytes` among the generator's `engine_arguments` is the cache's"
        return {"vllm_gpu_memory_utilization": reader}

    def _push(self) -> None:
        """Load the trainer's weights into the engine's student, all of them, in place."""
        if self.enable_sleep_mode:
            vllm_generation.empty_cache()
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        self.llm.backend.load_theta(self._iter_named_params())

    def generate(
        self, prompts: list[list[int]], images: list[Any] | None, num_generations: int, profiler: Any = None
    ) -> TrlReturns:
        """TRL's own, through `FusedLLM.generate`; see `as_trl_returns` for what comes back."""
        refuse_images(images)
        self._requests = self.make_requests(prompts)
        vllm_generation.VLLMGeneration.generate(self, prompts, images, num_generations, profiler)
        rollouts = self.llm.rollouts[self._first : self._first + len(prompts)]
        return self.take(prompts, rollouts, self.llm.seconds)

    def types(self) -> set[torch.dtype]:
        """Return the one type of both models in the engine."""
        return {self.llm.backend.llm.llm_engine.model_config.dtype}

    def close(self) -> None:
        """Free the engine. Doing so twice is fine."""
        self.llm.backend.close()


class FusedLLM(Context):
    """The fused engine as TRL uses a `vllm.LLM`: is asked for completions, and hands them back.

    `rollouts` holds those of the last call, and `seconds` how long it took.

    Args:
        backend: the engine.
        requests: tells what is sampled in this call.
        limit: see `Context`.
        accelerator: the trainer's.
    """

    def __init__(
        self, backend: VLLMBackend, requests: Callable[[], list[Request]], limit: Callable[[], int], accelerator: Any
    ) -> None:
        super().__init__(limit)
        self.backend, self.requests, self.accelerator = backend, requests, accelerator
        self.rollouts: list[Rollout] = []
        self.seconds = 0.0

    def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool = False) -> list[Any]:
        """vLLM's outputs without log-probabilities, of which TRL would sort one dictionary a token: they stand in
        `rollouts`. The prompts and `sampling_params` stand in the requests already."""
        requests = self.requests()
        start = time.perf_counter()
        outputs, self.rollouts = on_all_ranks(partial(self.backend.sample, requests), self.accelerator)
        self.seconds = time.perf_counter() - start
        for output in outputs:
            output.outputs[0].logprobs = None
        return outputs

    def sleep(self, level: int = 1) -> None:
        """Free the engine's memory and keep both models, whatever level TRL asks for: see `VLLMBackend.sleep`."""
        self.backend.sleep()

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Undo `sleep`, of the weights or of the cache where `tags` says so."""
        self.backend.wake_up(tags)
