"""The place in a trainer where an engine of this package stands for TRL's `VLLMGeneration`, and the choice of one.

TRL builds that object inside `__init__`, under a name of its module, and offers no other way in.
`engine_replaced_by` puts ours under that name while `__init__` runs.

Two later versions of TRL concern this place. Their release notes were read; they were not run. Version 1.17 corrects
truncated sampling by the mask of kept tokens that vLLM returns (`return_sampling_mask`). `limits.py` refuses that
setting, since its columns and those of the records would collide. Version 1.18 makes asynchronous GRPO a stable
trainer with its own loop and client (`trl.trainer.async_grpo_trainer`, `trl.generation.async_vllm_client`), which do
not use this name.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

from transformers import PreTrainedModel

from ...backends import Choice, choose
from ...pairing import Source
from .base import MixtureGeneration, MixturePlan, tokenizer_of
from .colocated import EngineGeneration, pair_arguments
from .live import LiveGeneration
from .self_teacher import check_own_adapter, other_files, own_teacher

logger = logging.getLogger(__name__)

TRAINER_PACKAGE = "trl.trainer"
SEAM = "VLLMGeneration"
"""The name in the module of each of TRL's trainers that its `__init__` calls to build its engine."""


def build_generation(
    plan: MixturePlan, loaded_teacher: PreTrainedModel | None, **trl_arguments: Any
) -> MixtureGeneration:
    """Build what stands for TRL's `VLLMGeneration`, on the backend that the generator asks for.

    Args:
        plan: which mixture each completion is sampled from.
        loaded_teacher: the trainer's own, which the transformers backend shares instead of loading another.
        **trl_arguments: what TRL passes to its `VLLMGeneration`.

    Raises:
        ValueError: where the generator or a server asks for vLLM, which is not installed or cannot sample this pair.
    """
    generator, model = plan.generator, trl_arguments["model"]
    if generator.is_own_teacher:
        check_own_adapter(generator, model)
    if trl_arguments["mode"] == "server":
        if find_spec("vllm") is None:
            raise ValueError(
                "`vllm_mode` is 'server', but vLLM is not installed: TRL's client needs it here, too, to send weights "
                "to the server. Install it, or use `vllm_mode='colocate'`."
            )
        from .server import ServerGeneration

        folder = Source(str(model.name_or_path), "student")
        if reason := other_files(generator, model, folder, trl_arguments["accelerator"]):
            raise ValueError(f"`vllm_mode` is 'server', but {reason}.")
        return ServerGeneration(plan, **trl_arguments)
    choice = _choose(plan, **trl_arguments)
    if generator.backend == "vllm" and choice.reason is not None:
        raise ValueError(f"`backend` is 'vllm', but {choice.reason}. Use backend='transformers', or 'auto'.")
    if generator.backend != "transformers":
        why = "." if choice.reason is None else f": {choice.reason}"
        logger.info("Rollouts are sampled with %s%s", choice.name, why)
    if choice.pair is not None:
        return EngineGeneration(plan, choice.pair, choice.theta, **trl_arguments)
    if generator.is_own_teacher:
        return LiveGeneration(plan, own_teacher(generator, model), **trl_arguments)
    return LiveGeneration(plan, choice.teacher if loaded_teacher is None else loaded_teacher, **trl_arguments)


def _choose(plan: MixturePlan, **trl_arguments: Any) -> Choice:
    """Pick the backend of a pair; a teacher that is a frozen student is a model of its own, read from its files."""
    generator, model = plan.generator, trl_arguments["model"]
    choice = choose(
        "transformers" if generator.backend == "transformers" else "auto",
        generator.named_teacher,
        model.name_or_path or model,
        pair_arguments(plan, trl_arguments),
        two_prompts=plan.two_prompts or generator.is_the_student,
        tokenizer=tokenizer_of(trl_arguments["processing_class"]),
        theta_settings=getattr(model, "generation_config", None),
    )
    if choice.pair is None or not generator.is_frozen_student:
        return choice
    if reason := other_files(generator, model, choice.theta, trl_arguments["accelerator"]):
        return replace(choice, name="transformers", pair=None, reason=reason)
    return replace(choice, pair=replace(choice.pair, one_model=False))


@contextmanager
def engine_replaced_by(trainer: type, build: Callable[..., Any]) -> Iterator[None]:
    """Let TRL's trainer above `trainer` build its engine with `build` inside the block.

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
