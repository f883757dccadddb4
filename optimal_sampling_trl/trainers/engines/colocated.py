"""The fused engine in a trainer's process: TRL's own colocated engine with the fused model inside.

Everything in TRL's `VLLMGeneration` that this relies on is named here and checked by tests/whole/test_upstream_trl.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from trl.generation import vllm_generation

from ...pairing import Pair, Source
from ...rollouts.request import Request
from ...rollouts.rollout import Rollout
from .base import MixturePlan, as_trl_returns, on_all_ranks, refuse_images
from .push import PushedGeneration
from .student_checks import check_overrides, check_student

if TYPE_CHECKING:
    from ...backends.vllm.backend import VLLMBackend

CPU_CACHE = 1 << 30
"""Bytes of the engine's KV cache on a CPU, unless the user says otherwise."""


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
        super().__init__(plan, **trl_arguments)

    def left_out(self) -> Container[str]:
        """Return the names that the student's folder ties to another one."""
        names = self.folder.weight_names
        return () if names is None else names.ties

    def _init_vllm(self) -> None:
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
        return FusedLLM(backend, self._make_requests_of_group, self.accelerator)

    def _make_requests_of_group(self, prompts: Sequence[list[int]]) -> list[Request]:
        """The requests of the ranks that share one engine by tensor parallelism: `prompts` are theirs together."""
        ranks = self.tensor_parallel_size
        first = self.accelerator.process_index // ranks * len(prompts)
        teacher_prompts = self.teacher_prompts
        if teacher_prompts is not None and ranks > 1:  # TRL gathers the student's alone
            gathered: list[Any] = [None] * ranks
            torch.distributed.all_gather_object(gathered, list(teacher_prompts), group=self.tp_group)
            teacher_prompts = [prompt for of_rank in gathered for prompt in of_rank]
        return self.make_requests(prompts, first, teacher_prompts, ranks)

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
    ) -> tuple:
        """TRL's own, through `FusedLLM.generate`; see `as_trl_returns` for what comes back."""
        refuse_images(images)
        vllm_generation.VLLMGeneration.generate(self, prompts, images, num_generations, profiler)
        # With tensor parallelism each rank samples its group's prompts and keeps its own.
        start = self.accelerator.process_index % self.tensor_parallel_size * len(prompts)
        self.rollouts = self.llm.rollouts[start : start + len(prompts)]
        self.seconds = self.llm.seconds
        return as_trl_returns(prompts, self.rollouts)

    def types(self) -> set[torch.dtype]:
        """Return the one type of both models in the engine."""
        return {self.llm.backend.llm.llm_engine.model_config.dtype}

    def close(self) -> None:
        """Free the engine. Doing so twice is fine."""
        self.llm.backend.close()


class FusedLLM:
    """The fused engine as TRL uses a `vllm.LLM`: takes its prompts, hands back completions.

    `rollouts` holds those of the last call, and `seconds` how long it took.

    Args:
        backend: the engine.
        make_requests: from the token ids of prompts to what is sampled for them.
        accelerator: the trainer's.
    """

    def __init__(
        self, backend: VLLMBackend, make_requests: Callable[[Sequence[list[int]]], list[Request]], accelerator: Any
    ) -> None:
        self.backend, self.make_requests, self.accelerator = backend, make_requests, accelerator
        self.rollouts: list[Rollout] = []
        self.seconds = 0.0

    def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool = False) -> list[Any]:
        """vLLM's outputs without log-probabilities, of which TRL would sort one dictionary a token: they stand in
        `rollouts`. `sampling_params` stand in the requests already."""
        requests = self.make_requests([prompt["prompt_token_ids"] for prompt in prompts])
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
