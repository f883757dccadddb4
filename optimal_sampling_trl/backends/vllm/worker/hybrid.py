"""Teacher and student as one vLLM model where one of them has linear attention, and so states beside its cache."""

from __future__ import annotations

import copy
from importlib import import_module
from math import prod
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models import ModelRegistry

from ....pairing import has_states, language_model
from ..hooks import own_architectures
from ..pair_settings import settings_of
from .model import OptimalSamplingForCausalLM
from .submodels import theta_model_config

Shapes = tuple[tuple[int, ...], ...]
"""Of the states that a layer keeps for a request: its convolution's and its recurrence's."""


class OptimalSamplingHybridForCausalLM(OptimalSamplingForCausalLM):
    """The fused model, known to vLLM as one with states: it then plans blocks that hold a state of either model."""

    is_hybrid = True
    has_inner_state = True

    def get_model_state_cls(self) -> type:
        """Return the class that Model Runner V2 asks for its hooks."""
        from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

        from .model_state import MixtureSampling

        return type("HybridState", (MixtureSampling, MambaHybridModelState), {})

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> Shapes:
        """The shapes of the larger of the two models' states, which a block has to hold."""
        return _largest_state(vllm_config)[0]

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """The types of the same."""
        return _largest_state(vllm_config)[1]


def _largest_state(config: VllmConfig) -> tuple[Shapes, tuple[torch.dtype, ...]]:
    theta = theta_model_config(config.model_config, settings_of(config).theta)
    states = [_state(config, model) for model in (config.model_config, theta) if has_states(model.hf_text_config)]
    return max(states, key=lambda state: sum(prod(shape) * dtype.itemsize for shape, dtype in zip(*state)))


def _state(config: VllmConfig, model: ModelConfig) -> tuple[Shapes, tuple[torch.dtype, ...]]:
    """A model's own states, which its class in vLLM reads off a configuration."""
    text = language_model(model.hf_config)
    names = own_architectures(model) if text is model.hf_config else list(text.architectures or [])
    model_class: Any = ModelRegistry.resolve_model_cls(names, model)[0]
    alone = copy.copy(config)
    alone.model_config = model
    if not hasattr(model_class, "get_mamba_state_shape_from_config"):
        # Up to vLLM 0.26 the multimodal class of Qwen3.5 alone describes the states of its language model.
        model_class = import_module(model_class.__module__).Qwen3_5ForConditionalGeneration
    return (
        model_class.get_mamba_state_shape_from_config(alone),
        model_class.get_mamba_state_dtype_from_config(alone),
    )
