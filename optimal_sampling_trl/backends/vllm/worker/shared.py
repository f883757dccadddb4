"""One set of weights for both submodels, where the teacher is the student itself: only their caches are two.

vLLM knows an attention layer by its name, and keeps a cache for each. So the student's attention layers, and the
modules above them, are its own; all others are the teacher's, and so are all tensors. A reload of the student then
reaches the teacher as well.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention


def share_modules(theta: nn.Module, teacher: nn.Module) -> None:
    """Put the teacher's modules in the place of the student's below attention, and its tensors into what is left.

    Args:
        theta: the student, built like the teacher; its tensors may have no values.
        teacher: the teacher.
    """
    for name, child in list(theta.named_children()):
        of_teacher = teacher.get_submodule(name)
        if _has_attention(child):
            share_modules(child, of_teacher)
        else:
            setattr(theta, name, of_teacher)
    _take_tensors(theta, teacher)
    if isinstance(theta, Attention):
        _take_tensors(theta.impl, teacher.impl)


def _has_attention(module: nn.Module) -> bool:
    return any(isinstance(one, Attention) for one in module.modules())


def _take_tensors(taker: Any, giver: Any) -> None:
    """Give an object the tensors of another: parameters, buffers and attributes, each under its name."""
    for places in ("_parameters", "_buffers", "__dict__"):
        taken, given = getattr(taker, places, {}), getattr(giver, places, {})
        taken.update({name: given[name] for name, value in taken.items() if isinstance(value, Tensor)})


def share_layers(layers: dict[str, Any], prefix: str) -> None:
    """Let vLLM find the teacher's layer under the name of the student's, of layers that have no cache.

    Symptom: before torch 2.11 the student's experts are a layer whose weights were never loaded.
    Cause: vLLM counts experts there instead of naming them, and finds what the student was built with.
    Safe: both names lead to the layer that both models run.
    Upstream: none; vLLM knows of one model in an engine.
    Delete when: torch 2.11 is the oldest beside an accepted vLLM; a layer is then handed its own name.

    Args:
        layers: vLLM's layers by their names.
        prefix: of the student's names.
    """
    for name, layer in layers.items():
        if name.startswith(prefix) and not isinstance(layer, Attention):
            layers[name] = layers[name.removeprefix(prefix)]
