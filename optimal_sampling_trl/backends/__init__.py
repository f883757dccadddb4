"""The engines that sample: each turns requests into rollouts. Here is what they share and how one is picked."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from ..options import unknown_option

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..request import Request
    from ..rollout import Rollout

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "transformers", "vllm")


class Backend(Protocol):
    """What the front door and the trainers ask of an engine."""

    name: str
    tokenizer: PreTrainedTokenizerBase

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout for each request, in their order."""

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
    gpu_memory_utilization: float = 0.5,
    **engine_arguments: Any,
) -> Backend:
    """The engine named `backend`; `"auto"` is vLLM where it is installed and able, and says in the log why if not.

    Args:
        two_prompts: the teacher and the student will be given different prompts.

    Raises:
        ValueError: on an unknown backend or argument, or a pair that the backend cannot mix.
    """
    if backend not in BACKENDS:
        raise ValueError(unknown_option("backend", backend, BACKENDS))
    if backend == "auto":
        reason = why_not_vllm(teacher, theta, two_prompts=two_prompts, **engine_arguments)
        backend = "vllm" if reason is None else "transformers"
        logger.info("Sampling with %s%s", backend, "." if reason is None else f": {reason}")
    if backend == "vllm":
        from .vllm.engine import VLLMBackend

        return VLLMBackend(teacher, theta, gpu_memory_utilization=gpu_memory_utilization, **engine_arguments)
    from .transformers import TransformersBackend

    return TransformersBackend(teacher, theta, **engine_arguments)


def why_not_vllm(
    teacher: str | PreTrainedModel, theta: str | PreTrainedModel, *, two_prompts: bool = False, **engine_arguments: Any
) -> str | None:
    """Why vLLM cannot sample this pair, or None where it can."""
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    if not (isinstance(teacher, str) and isinstance(theta, str)):
        return "a loaded model was passed, and vLLM loads its own from a folder or a model id"
    if two_prompts:
        return "teacher and student read different prompts, which the fused vLLM engine cannot do yet"
    return None
