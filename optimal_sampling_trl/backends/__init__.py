"""The engines that sample: each turns requests into rollouts. Here is what they share and how one is picked."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from ..options import unknown_option

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..rollouts.progress import Progress
    from ..rollouts.request import Request
    from ..rollouts.rollout import Rollout

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "transformers", "vllm")
GPU_MEMORY_UTILIZATION = 0.5
"""vLLM's share of a device's memory, where the user gives none."""

LOADED = "a loaded model was passed, and vLLM loads its own from a folder or a model id"


class Backend(Protocol):
    """What the front door and the trainers ask of an engine."""

    name: str

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The pair's."""

    def check(self, request: Request, index: int) -> None:
        """Refuse a request that cannot be served; `index` is its number, for the error."""

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Rollout]:
        """One rollout for each request, in their order; each is added to `progress`."""

    def load_theta(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the student's weights in place; refuses a set that is not whole."""

    def sleep(self) -> None:
        """Free what memory the engine can until `wake_up`; the teacher is kept."""

    def wake_up(self) -> None:
        """Undo `sleep`."""

    def close(self) -> None:
        """Free the engine. Doing so twice is fine."""


def make_backend(
    backend: str,
    teacher: str | PreTrainedModel,
    theta: str | PreTrainedModel,
    *,
    two_prompts: bool = False,
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
    **engine_arguments: Any,
) -> Backend:
    """The engine named `backend`; `"auto"` is vLLM where it is installed and able, and says in the log why if not.

    Args:
        two_prompts: the teacher and the student will be given different prompts.

    Raises:
        ValueError: on an unknown backend or argument, a setting that the backend asked for does not have, or a pair
            that it cannot mix.
    """
    if backend not in BACKENDS:
        raise ValueError(unknown_option("backend", backend, BACKENDS))
    teacher, theta = _model(teacher, "teacher"), _model(theta, "student")
    asked = backend
    if backend == "auto":
        reason = why_not_vllm(teacher, theta, two_prompts=two_prompts, **engine_arguments)
        backend = "vllm" if reason is None else "transformers"
        ignored = f" `gpu_memory_utilization` ({gpu_memory_utilization}) is vLLM's alone and does nothing here."
        if gpu_memory_utilization == GPU_MEMORY_UTILIZATION:
            ignored = ""
        logger.info("Sampling with %s%s", backend, "." if reason is None else f": {reason}.{ignored}")
    if backend == "vllm":
        if not (isinstance(teacher, str) and isinstance(theta, str)):
            raise ValueError(f"backend='vllm': {LOADED}. Save it and pass its folder, or use backend='transformers'.")
        from .vllm.backend import VLLMBackend

        return VLLMBackend(teacher, theta, gpu_memory_utilization=gpu_memory_utilization, **engine_arguments)
    if asked == "transformers" and gpu_memory_utilization != GPU_MEMORY_UTILIZATION:
        raise ValueError(
            f"`gpu_memory_utilization` is {gpu_memory_utilization!r} and the backend 'transformers', which takes what "
            "memory it needs; wanted the setting with 'vllm' alone. Drop it, or lower `max_num_seqs` to need less."
        )
    from .transformers.backend import TransformersBackend

    return TransformersBackend(teacher, theta, **engine_arguments)


def why_not_vllm(
    teacher: str | PreTrainedModel, theta: str | PreTrainedModel, *, two_prompts: bool = False, **engine_arguments: Any
) -> str | None:
    """Why vLLM cannot sample this pair, or None where it can."""
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    if not (isinstance(teacher, str) and isinstance(theta, str)):
        return LOADED
    from .vllm.limits import can_read_two_prompts, check_pair, check_platform
    from .vllm.plugin import require

    try:
        require()
        if two_prompts and not can_read_two_prompts():
            return "teacher and student read different prompts, which the fused vLLM engine does on GPUs alone"
        check_platform(engine_arguments)
        check_pair(teacher, theta, engine_arguments)
    except (ImportError, ValueError) as error:
        return str(error)
    return None


def _model(model: Any, role: str) -> str | PreTrainedModel:
    """A loaded model as it is, a path as a text.

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
