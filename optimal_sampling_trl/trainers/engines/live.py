"""The transformers backend in a trainer: the student is the module that is being trained."""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ...backends.transformers import TransformersBackend
from ...pairing import MODEL_OPTIONS, Source
from .base import MixtureGeneration, MixturePlan, TrlReturns, on_all_ranks, refuse_images, tokenizer_of
from .turns import Context


class LiveGeneration(MixtureGeneration):
    """Samples from the live module: no copy of it, and nothing to synchronise.

    Args:
        plan: which mixture each completion is sampled from.
        teacher: the teacher, the trainer's own, which is then shared, or the student as its own.
        **trl_arguments: what TRL passes to its `VLLMGeneration`.

    Raises:
        ValueError: on a model that is split over processes, and on what is the trainer's to set.
    """

    engine = "transformers"

    def __init__(self, plan: MixturePlan, teacher: PreTrainedModel | Source, **trl_arguments: Any) -> None:
        super().__init__(plan, **trl_arguments)
        self.sleeps = trl_arguments["enable_sleep_mode"]
        accelerator = self.accelerator
        if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"):
            raise ValueError(
                f"The transformers backend reads the live model, which {accelerator.distributed_type.value} "
                'splits. Use `backend="vllm"`, or train with one process or DDP.'
            )
        if trl_arguments["tensor_parallel_size"] != 1:
            raise ValueError(
                f"`vllm_tensor_parallel_size` is {trl_arguments['tensor_parallel_size']}; the transformers backend "
                'has no tensor parallelism. Set it to 1 or use `backend="vllm"`.'
            )
        given = plan.generator.engine_arguments or {}
        settled = {"device", "tokenizer"} | set(MODEL_OPTIONS if plan.generator.is_own_teacher else ())
        if found := sorted(given.keys() & settled):
            raise ValueError(f"`engine_arguments` has `{found[0]}`, which is the trainer's here. Drop it.")
        options = {name: trl_arguments[name] for name in ("max_num_seqs", "trust_remote_code")}
        if trl_arguments["max_model_length"] is not None:
            options["max_model_len"] = trl_arguments["max_model_length"]
        tokenizer = tokenizer_of(trl_arguments["processing_class"])
        self.backend = TransformersBackend(
            teacher,
            trl_arguments["model"],
            tokenizer=tokenizer,
            teacher_tokenizer=tokenizer if plan.generator.is_own_teacher else None,
            device=accelerator.device,
            **options | given,
        )
        self.pair = self.backend.pair
        self.llm = Context(self.most_read)

    def unread_settings(self) -> dict[str, str]:
        """Return the settings that only vLLM reads."""
        reader = "by vLLM, and rollouts are sampled with transformers"
        return dict.fromkeys(("vllm_gpu_memory_utilization", "vllm_model_impl"), reader)

    def generate(
        self, prompts: list[list[int]], images: list[Any] | None, num_generations: int, profiler: Any = None
    ) -> TrlReturns:
        """Sample a turn of each prompt; see `as_trl_returns` for what comes back."""
        refuse_images(images)
        requests = self.make_requests(prompts)
        if self.sleeps:
            self.backend.wake_up()
        start = time.perf_counter()
        with profiler or nullcontext():
            rollouts = on_all_ranks(partial(self.backend.generate, requests), self.accelerator)
        seconds = time.perf_counter() - start
        if self.sleeps:
            self.backend.sleep()
        return self.take(prompts, rollouts, seconds)

    def types(self) -> set[torch.dtype]:
        """Return the types of the trained module."""
        return {parameter.dtype for parameter in self.backend.theta.parameters()}

    def close(self) -> None:
        """Release the teacher. Doing so twice is fine."""
        self.backend.close()
