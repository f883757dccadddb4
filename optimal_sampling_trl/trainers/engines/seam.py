"""What stands in a trainer where TRL has its `VLLMGeneration`: the same methods, rollouts from the mixture.

TRL builds that object inside `__init__`, under a name of its module, and offers no other way in. `installed` puts ours
under that name while `__init__` runs. All that is relied on in TRL's generation is used in this file and in
`server.py`, which samples from a server.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar
from unittest.mock import patch

from accelerate.utils import gather_object
from transformers import PreTrainedModel
from trl.generation import vllm_generation

from ...backends import make_backend, why_not_vllm
from ...mixture import Mixture
from ...options import unknown_option
from ...rollouts.request import Request, Sampling
from ...rollouts.rollout import Rollout
from ..generator import OptimalSamplingGenerator

logger = logging.getLogger(__name__)
T = TypeVar("T")

TRAINER_PACKAGE = "trl.trainer"
CPU_CACHE = 1 << 30
"""Bytes of the engine's KV cache on a CPU, unless the user says otherwise."""
SEAM = "VLLMGeneration"
"""The name in the module of each of TRL's trainers that its `__init__` calls to build its engine."""


@dataclass(frozen=True)
class Plan:
    """Which mixture each completion of a batch is sampled from; asked anew for each batch.

    Args:
        generator: the user's settings.
        group: how many completions make a group.
        theta_count: how many of each group come from the student alone.
        training: whether the trainer trains; an evaluation samples from the student alone.
        progress: the share of training that is done, in [0, 1].
    """

    generator: OptimalSamplingGenerator
    group: Callable[[], int]
    theta_count: Callable[[], int]
    training: Callable[[], bool]
    progress: Callable[[], float]

    def mixtures(self, rows: int, first: int) -> list[Mixture]:
        """The mixture of each of `rows` completions, which start at row `first` of the batch of all processes."""
        if not self.training():
            return [Mixture.theta_only()] * rows
        mixture = self.generator.current_mixture(self.progress())
        group, alone = self.group(), self.theta_count()
        return [Mixture.theta_only() if (first + row) % group < alone else mixture for row in range(rows)]


class MixtureGeneration:
    """What both engines share: requests from TRL's prompts, and the rollouts of the last call until they are taken.

    Args:
        plan: which mixture each completion is sampled from.
        trl_arguments: what TRL passes to its `VLLMGeneration`.
    """

    def __init__(self, plan: Plan, **trl_arguments: Any) -> None:
        self.plan = plan
        self.sampling = _sampling(trl_arguments)
        self.teacher_prompts: Sequence[list[int]] | None = None
        self.rollouts: list[Rollout] = []
        self.seconds = 0.0

    def take(self) -> list[Rollout]:
        """The rollouts of the last call, once."""
        rollouts, self.rollouts = self.rollouts, []
        return rollouts

    def _requests(self, prompts: Sequence[list[int]], first: int) -> list[Request]:
        """A request for each prompt; `first` is the position of the first of them in the batch of all processes."""
        theirs = self.teacher_prompts if self.teacher_prompts is not None else prompts
        mixtures = self.plan.mixtures(len(prompts), first)
        return [
            Request(list(teacher), list(theta), mixture, self.sampling)
            for teacher, theta, mixture in zip(theirs, prompts, mixtures, strict=True)
        ]


def together(work: Callable[[], T], accelerator: Any) -> T:
    """What `work` returns in this process; where it raised in one it raises in all, or they would wait for that one.

    Raises:
        RuntimeError: where it raised in another process, saying which and what.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    message = None if error is None else f"{type(error).__name__}: {error}"
    messages = gather_object([message]) if accelerator.num_processes > 1 else [message]
    if error is not None:
        raise error
    for process, said in enumerate(messages):
        if said is not None:
            raise RuntimeError(f"Process {process} could not do its part, and all stop: {said}")
    return result  # type: ignore[return-value]


class LiveGeneration(MixtureGeneration):
    """The transformers backend: the student is the module being trained."""

    def __init__(self, plan: Plan, loaded_teacher: PreTrainedModel | None, **trl_arguments: Any) -> None:
        super().__init__(plan, **trl_arguments)
        self.sleeps = trl_arguments["enable_sleep_mode"]
        accelerator = self.accelerator = trl_arguments["accelerator"]
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
        own = plan.generator.engine_arguments or {}
        for name in own.keys() & {"device", "tokenizer"}:
            raise ValueError(f"`engine_arguments` has `{name}`, which is the trainer's here. Drop it.")
        options = {name: trl_arguments[name] for name in ("max_num_seqs", "trust_remote_code")} | own
        if trl_arguments["max_model_length"] is not None:
            options["max_model_len"] = trl_arguments["max_model_length"]
        self.backend = make_backend(
            "transformers",
            plan.generator.named_teacher if loaded_teacher is None else loaded_teacher,
            trl_arguments["model"],
            tokenizer=trl_arguments["processing_class"],
            device=accelerator.device,
            **options,
        )

    def sync_weights(self) -> None:
        """Nothing: the backend reads the live model."""

    def generate(
        self, prompts: list[list[int]], images: list[Any] | None, num_generations: int, profiler: Any = None
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], None]:
        """Sample a completion of each prompt.

        Returns what TRL's own returns, with log θ for the log-probabilities of each token: TRL corrects the difference
        between the engine and the trainer with them, and would take q, the mixture or a truncation, for a defect.
        """
        refuse_images(images)
        requests = self._requests(prompts, self.accelerator.process_index * len(prompts))
        if self.sleeps:
            self.backend.wake_up()
        start = time.perf_counter()
        with profiler or nullcontext():
            self.rollouts = together(partial(self.backend.generate, requests), self.accelerator)
        self.seconds = time.perf_counter() - start
        if self.sleeps:
            self.backend.sleep()
        completions = [rollout.completion_ids for rollout in self.rollouts]
        log_probabilities = [[[value] for value in rollout.log_theta.tolist()] for rollout in self.rollouts]
        return prompts, completions, log_probabilities, None

    def close(self) -> None:
        """Let go of the teacher."""
        self.backend.close()


class EngineGeneration(MixtureGeneration, vllm_generation.VLLMGeneration):
    """TRL's own colocated engine with the fused model inside: process groups, gathering and sleep stay TRL's."""

    llm: Any  # a `FusedLLM`, where TRL holds a `vllm.LLM`

    def __init__(self, plan: Plan, **trl_arguments: Any) -> None:
        MixtureGeneration.__init__(self, plan, **trl_arguments)
        vllm_generation.VLLMGeneration.__init__(self, **trl_arguments)

    def _init_vllm(self) -> None:
        with patch.object(vllm_generation, "LLM", self._build_llm):
            super()._init_vllm()

    def _build_llm(self, model: str, **engine_arguments: Any) -> FusedLLM:
        """What TRL calls for `vllm.LLM`: `model`, the student's folder, goes beside the teacher."""
        from ...backends.vllm.backend import build_llm

        if engine_arguments.get("quantization") is not None:
            raise ValueError(
                f"The student is loaded in {engine_arguments['quantization']} weights, which cannot be pushed into "
                "the engine beside a teacher. Load it unquantised, or use `backend='transformers'`."
            )
        if self.accelerator.device.type == "cpu":  # vLLM would turn a float32 student into bfloat16
            engine_arguments["dtype"] = "float32"
            # Here vLLM reads TRL's share of a GPU's memory as one of the machine's, which the trainer works in, too.
            engine_arguments["kv_cache_memory_bytes"] = CPU_CACHE
        arguments = {name: value for name, value in engine_arguments.items() if value is not None}
        arguments.update(self.plan.generator.engine_arguments or {})
        return FusedLLM(build_llm(str(self.plan.generator.named_teacher), model, **arguments), self)

    def sync_weights(self) -> None:
        """Load the trainer's weights into the engine's student, all of them, in place."""
        from ...backends.vllm.backend import pair_of, reload_theta

        if self.enable_sleep_mode:
            vllm_generation.empty_cache()
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        reload_theta(self.llm.engine, pair_of(self.llm.engine), self._iter_named_params())

    def generate(
        self, prompts: list[list[int]], images: list[Any] | None, num_generations: int, profiler: Any = None
    ) -> tuple:
        """TRL's own, through `FusedLLM.generate`."""
        refuse_images(images)
        result = vllm_generation.VLLMGeneration.generate(self, prompts, images, num_generations, profiler)
        # With tensor parallelism each rank samples its group's prompts and keeps its own.
        start = self.accelerator.process_index % self.tensor_parallel_size * len(prompts)
        self.rollouts = self.rollouts[start : start + len(prompts)]
        return result

    def close(self) -> None:
        """Free the engine. Doing so twice is fine."""
        from ...backends.vllm.backend import shut_down

        shut_down(self.llm.engine)


class FusedLLM:
    """A fused `vllm.LLM` as TRL uses one: takes its prompts, keeps the rollouts, hands back one log-probability.

    Args:
        engine: what `build_llm` returned.
        owner: whose plan says what is sampled and who gets the rollouts.
    """

    def __init__(self, engine: Any, owner: EngineGeneration) -> None:
        self.engine, self.owner = engine, owner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool = False) -> list[Any]:
        """vLLM's outputs with what TRL reads of each token; `sampling_params` stand in the requests already."""
        from ...backends.vllm.backend import generate
        from ...backends.vllm.requests import flat_logprobs

        owner, rows = self.owner, len(prompts)
        first = owner.accelerator.process_index // owner.tensor_parallel_size * rows
        requests = owner._requests([prompt["prompt_token_ids"] for prompt in prompts], first)
        start = time.perf_counter()
        outputs, owner.rollouts = together(partial(generate, self.engine, requests), owner.accelerator)
        owner.seconds = time.perf_counter() - start
        for output, rollout in zip(outputs, owner.rollouts, strict=True):
            output.outputs[0].logprobs = flat_logprobs(rollout.completion_ids, rollout.log_theta)
        return outputs

    def sleep(self, level: int = 1) -> None:
        """Level 1 whatever TRL asks for: its level 2 would throw the teacher away."""
        self.engine.sleep(level=1)


def build_generation(plan: Plan, loaded_teacher: PreTrainedModel | None, **trl_arguments: Any) -> MixtureGeneration:
    """What stands for TRL's `VLLMGeneration`, on the backend that the generator asks for.

    Args:
        loaded_teacher: the trainer's own, which the transformers backend shares instead of loading another.

    Raises:
        ValueError: where it asks for vLLM, which is not installed or cannot sample this pair.
    """
    generator, backend = plan.generator, plan.generator.backend
    if trl_arguments["mode"] == "server":
        from .server import ServerGeneration

        return ServerGeneration(plan, **trl_arguments)
    if backend != "transformers":
        model = trl_arguments["model"]
        reason = why_not_vllm(generator.named_teacher, model.name_or_path or model, two_prompts=generator.two_prompts)
        if backend == "vllm" and reason is not None:
            raise ValueError(f"`backend` is 'vllm', but {reason}. Use backend='transformers', or 'auto'.")
        backend = "vllm" if reason is None else "transformers"
        logger.info("Rollouts are sampled with %s%s", backend, "." if reason is None else f": {reason}")
    if backend == "vllm":
        return EngineGeneration(plan, **trl_arguments)
    return LiveGeneration(plan, loaded_teacher, **trl_arguments)


def refuse_images(images: list[Any] | None) -> None:
    if images is not None:
        raise ValueError("Rollouts from the mixture take text alone; the dataset has images. Drop them.")


def _sampling(trl_arguments: dict[str, Any]) -> Sampling:
    """TRL's settings of generation as ours; `generation_kwargs` may add or replace some."""
    if trl_arguments["structured_outputs_regex"] is not None:
        raise ValueError("`vllm_structured_outputs_regex` is not supported with rollouts from the mixture. Drop it.")
    sampling = Sampling(
        max_tokens=trl_arguments["max_completion_length"],
        temperature=trl_arguments["temperature"],
        top_p=trl_arguments["top_p"],
        top_k=trl_arguments["top_k"],
        min_p=trl_arguments["min_p"] or 0.0,
        repetition_penalty=trl_arguments["repetition_penalty"],
    )
    if sampling.temperature == 0:
        raise ValueError("`temperature` is 0; a token that was not drawn has no probability to train with. Raise it.")
    extra = trl_arguments["generation_kwargs"] or {}
    for name in extra:
        if name not in Sampling.__dataclass_fields__:
            raise ValueError(unknown_option("entry of `generation_kwargs`", name, Sampling.__dataclass_fields__))
        if name == "temperature":
            raise ValueError(
                "`generation_kwargs` has a `temperature`. Set the trainer's, which its loss uses as well."
            )
        if name == "seed":
            raise ValueError(
                "`generation_kwargs` has a `seed`, which would make the completions of a group equal. "
                "Set the trainer's `seed`."
            )
    return replace(sampling, **extra)


@contextmanager
def installed(trainer: type, build: Callable[..., Any]) -> Iterator[None]:
    """While this lasts, TRL's trainer above `trainer` builds its engine with `build`.

    Raises:
        RuntimeError: where TRL has no such name any more.
    """
    modules = [sys.modules[cls.__module__] for cls in trainer.__mro__ if cls.__module__.startswith(TRAINER_PACKAGE)]
    seams = [module for module in modules if hasattr(module, SEAM)]
    if not seams:
        raise RuntimeError(
            f"No module of TRL above {trainer.__name__} has the name {SEAM}, which this package needs to put its own "
            "engine in. This version of TRL is not supported; install the one that this package asks for."
        )
    with ExitStack() as stack:
        stack.enter_context(patch.object(seams[0], SEAM, build))
        if hasattr(seams[0], "is_vllm_available"):  # asked for although the engine may be transformers
            stack.enter_context(patch.object(seams[0], "is_vllm_available", lambda: True))
        yield
