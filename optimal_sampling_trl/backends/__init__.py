"""The engines that sample: each turns requests into rollouts. This file has their protocol and picks one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from ..options import unknown_option
from .vllm import GPU_MEMORY_UTILIZATION

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ..pairing import NamedWeights, Pair, Source
    from ..rollouts.progress import Progress
    from ..rollouts.request import Request
    from ..rollouts.rollout import Rollout

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "transformers", "vllm")

NO_LOADED_MODELS = "a loaded model was passed, and vLLM loads its own from a folder or a model id"


class Backend(Protocol):
    """An engine as the front door and the trainers use it."""

    name: str
    pair: Pair

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The pair's tokenizer."""

    def check(self, request: Request, index: int) -> None:
        """Refuse a request that cannot be served; `index` is its number, for the error."""

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Rollout]:
        """Sample one rollout for each request, in their order; each is added to `progress`."""

    def load_theta(self, named_parameters: NamedWeights) -> None:
        """Replace the student's weights in place; refuse a set that is not whole."""

    def weight_digest(self, role: str) -> str | None:
        """Return what changes with the weights of `"teacher"` or `"theta"`; None as long as they are the files'."""

    def sleep(self) -> None:
        """Free as much memory as the engine can until `wake_up`; the teacher is kept."""

    def wake_up(self) -> None:
        """Undo `sleep`."""

    def close(self) -> None:
        """Free the engine. Doing so twice is fine."""


@dataclass(frozen=True)
class Choice:
    """The backend that serves a pair, and what was read about the pair to pick it.

    Args:
        name: `"vllm"` or `"transformers"`.
        teacher: the teacher.
        theta: the student.
        pair: what vLLM's engine is to be built on; None with transformers, which reads its own.
        reason: why vLLM cannot serve the pair; None where it can, or was not asked for.
    """

    name: str
    teacher: Source
    theta: Source
    pair: Pair | None = None
    reason: str | None = None


def choose(
    backend: str,
    teacher: str | os.PathLike[str] | PreTrainedModel,
    theta: str | os.PathLike[str] | PreTrainedModel,
    engine_arguments: Mapping[str, Any],
    *,
    two_prompts: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    theta_settings: GenerationConfig | None = None,
) -> Choice:
    """Pick the engine of a pair. The front door and the trainers both decide it here.

    Args:
        backend: one of `BACKENDS`; `"auto"` is vLLM where it is installed and able.
        teacher: a folder, a model id or a loaded model.
        theta: likewise.
        engine_arguments: the arguments that the engine will be built with; they say which files hold the models.
        two_prompts: the teacher and the student will be given different prompts.
        tokenizer: the trainer's, where there is one: its end token ends a completion.
        theta_settings: generation settings of the model that is trained, where vLLM loads a copy of its files.

    Raises:
        ImportError: where `"vllm"` is asked for and not installed, or unsuited.
        ValueError: on an unknown backend, on what is no model, or where `"vllm"` is asked for and cannot mix the two.
    """
    if backend not in BACKENDS:
        raise ValueError(unknown_option("backend", backend, BACKENDS))
    from ..pairing import name_sources

    sources = name_sources(_model(teacher, "teacher"), _model(theta, "student"), engine_arguments)
    if backend == "transformers":
        return Choice("transformers", *sources)
    is_loaded = any(source.is_loaded for source in sources)
    if backend == "vllm" and is_loaded:
        raise ValueError(
            f"backend='vllm': {NO_LOADED_MODELS}. Save it and pass its folder, or use backend='transformers'."
        )
    if backend == "auto" and find_spec("vllm") is None:
        return Choice("transformers", *sources, reason="vLLM is not installed")
    if is_loaded:
        return Choice("transformers", *sources, reason=NO_LOADED_MODELS)
    try:
        pair = _read_for_vllm(*sources, engine_arguments, two_prompts, tokenizer, theta_settings)
        return Choice("vllm", *sources, pair=pair)
    except (ImportError, ValueError) as error:
        if backend == "vllm":
            raise
        return Choice("transformers", *sources, reason=str(error))


def _read_for_vllm(
    teacher: Source,
    theta: Source,
    engine_arguments: Mapping[str, Any],
    two_prompts: bool,
    tokenizer: PreTrainedTokenizerBase | None,
    theta_settings: GenerationConfig | None,
) -> Pair:
    """Return the pair as the fused engine serves it.

    Raises:
        ImportError: where vLLM is missing, unsuited, or did not load this package's plugin.
        ValueError: where it cannot serve the pair, saying why.
    """
    from .vllm.launch import quiet

    quiet()
    from .vllm.limits import ONE_PROMPT, check_pair, check_platform
    from .vllm.plugin import require

    require()
    check_platform(engine_arguments)
    pair = check_pair(teacher, theta, engine_arguments, tokenizer, theta_settings)
    if two_prompts and not pair.two_prompts:
        raise ValueError(f"teacher and student read different prompts, which takes models without {ONE_PROMPT}")
    return pair


def why_not_vllm(
    teacher: str | PreTrainedModel, theta: str | PreTrainedModel, *, two_prompts: bool = False, **engine_arguments: Any
) -> str | None:
    """Return the reason why vLLM cannot sample this pair, or None where it can."""
    return choose("auto", teacher, theta, engine_arguments, two_prompts=two_prompts).reason


def make_backend(
    backend: str,
    teacher: str | PreTrainedModel,
    theta: str | PreTrainedModel,
    *,
    two_prompts: bool = False,
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
    **engine_arguments: Any,
) -> Backend:
    """Build the engine that `choose` picks; with `"auto"` the log says which, and why if it is not vLLM.

    Args:
        backend: one of `BACKENDS`.
        teacher: a folder, a model id, a loaded model, or `"student"`: the student itself.
        theta: likewise a folder, a model id or a loaded model.
        two_prompts: the teacher and the student will be given different prompts.
        gpu_memory_utilization: vLLM's share of a device's memory.
        **engine_arguments: further arguments of the engine.

    Raises:
        ImportError: see `choose`.
        ValueError: on an unknown backend or argument, a setting that the backend asked for does not have, or a pair
            that it cannot mix.
    """
    from ..pairing import is_student

    choice = choose(backend, teacher, theta, engine_arguments, two_prompts=two_prompts or is_student(teacher))
    is_default = gpu_memory_utilization == GPU_MEMORY_UTILIZATION
    if backend == "auto":
        ignored = f" `gpu_memory_utilization` ({gpu_memory_utilization}) is vLLM's alone and does nothing here."
        why = "." if choice.reason is None else f": {choice.reason}.{'' if is_default else ignored}"
        logger.info("Sampling with %s%s", choice.name, why)
    if choice.pair is not None:
        from .vllm.backend import VLLMBackend

        names, share = (choice.pair.teacher, choice.pair.theta), gpu_memory_utilization
        return VLLMBackend(*names, pair=choice.pair, gpu_memory_utilization=share, **engine_arguments)
    if backend == "transformers" and not is_default:
        raise ValueError(
            f"`gpu_memory_utilization` is {gpu_memory_utilization!r} and the backend 'transformers', which takes what "
            "memory it needs; wanted the setting with 'vllm' alone. Drop it, or lower `max_num_seqs` to need less."
        )
    from .transformers.backend import TransformersBackend

    return TransformersBackend(choice.teacher, choice.theta, **engine_arguments)


def _model(model: Any, role: str) -> str | PreTrainedModel:
    """Return a loaded model as it is, a path as a text.

    Raises:
        ValueError: on anything else.
    """
    if isinstance(model, os.PathLike):
        return os.fspath(model)
    if isinstance(model, str) or hasattr(model, "config"):
        return model
    raise ValueError(
        f"The {role} is {model!r} ({type(model).__name__}); wanted a folder, a model id or a loaded model. "
        "Pass one of the three."
    )
