"""The two submodels of the fused model: each is configured and built as vLLM would build it alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import parallel_state
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_config
from vllm.v1.attention.backend import subclass_attention_backend

from ....pairing import is_wrapper, language_model
from ....pairing.wrappers import PREFIXES
from .convolutions import convolve_by_torch
from .positions import read_query_scale, rotate_every_head


def as_text(config: VllmConfig, architectures: list[str]) -> tuple[VllmConfig, list[str]]:
    """Return the configuration and architectures of a multimodal wrapper's language model; others as they are."""
    whole = config.model_config.hf_config
    if not is_wrapper(whole):
        return config, architectures
    if config.quant_config is not None:
        config.quant_config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=PREFIXES))
    text = language_model(whole)
    return config.with_hf_config(text, text.architectures), list(text.architectures or [])


def build_submodel(config: VllmConfig, architectures: list[str], prefix: str) -> nn.Module:
    """Build a submodel with vLLM's constructor, under the submodel's configuration.

    Symptom: the student runs with the teacher's compiled code, FP8 input type or head type.
    Cause: a submodel that is built by `cls(vllm_config=...)` reads `get_current_vllm_config()`, which is the engine's.
    Safe: `initialize_model` sets the current configuration while each submodel is built, as vLLM's loader does.
    Upstream: vLLM issue 55383, the key of the compilation cache ignores the module tree.
    Delete when: never, it is vLLM's own constructor.
    """
    make_expert_group(config.model_config)
    read_query_scale(config.model_config.hf_config)
    model_class, _ = ModelRegistry.resolve_model_cls(architectures, config.model_config)
    model = initialize_model(config, prefix=prefix, model_class=model_class)
    rotate_every_head(model)
    convolve_by_torch(model)
    return model


def make_expert_group(config: ModelConfig) -> None:
    """Make the group of ranks that share experts, where a model has some and the process has no such group.

    Symptom: an engine with experts that starts after one without, in one process: an assertion on a missing group.
    Cause: the parallel groups are the process's, and the first engine's model decides which there are.
    Safe: the group has the ranks of tensor parallelism, as vLLM makes it where there is no data parallelism.
    Upstream: none found.
    Delete when: test_other_names_in_memory_than_on_disk passes for experts without this function.
    """
    if not config.is_moe or parallel_state._EP is not None:
        return
    world, size = parallel_state.get_world_group(), parallel_state.get_tensor_model_parallel_world_size()
    ranks = [list(range(first, first + size)) for first in range(0, dist.get_world_size(), size)]
    backend = dist.get_backend(world.device_group)
    parallel_state._EP = parallel_state.init_model_parallel_group(ranks, world.local_rank, backend, group_name="ep")


def copy_cache_config(vllm_config: VllmConfig) -> Any:
    """Copy the settings of the cache for the student, before the teacher is built.

    Symptom: the student's cache is FP8 with scale 1 beside a quantised teacher.
    Cause: a checkpoint with `kv_cache_scheme` sets the shared `cache_config.cache_dtype` while it is built.
    Safe: FP8 caches are refused by limits.py, and the student's settings are taken before the teacher is built.
    Upstream: none found.
    Delete when: the setting belongs to a layer.
    """
    return copy.copy(vllm_config.cache_config)


def use_own_window(cache_config: Any, theta: ModelConfig) -> None:
    """Give the student's layers the student's window.

    Symptom: a student without windows reads as its teacher does, within a window, or the other way round.
    Cause: where all layers of the engine's model have a window, vLLM writes it into the settings of every layer.
    Safe: the student's copy of the settings holds its own window, by vLLM's own rule.
    Upstream: none; vLLM knows of one model in an engine.
    Delete when: test_records passes for the pair "mistral-window-and-none" without this function.
    """
    kinds = set(getattr(theta.hf_text_config, "layer_types", None) or ())
    cache_config.sliding_window = theta.get_sliding_window() if kinds <= {"sliding_attention"} else None


def use_common_blocks(layers: Iterable[Any]) -> None:
    """Give layers with a window blocks of the size that all others have.

    Symptom: a pair with windows does not start: "failed to convert the KV cache specs to one unified type".
    Cause: vLLM 0.26 gives a layer with a window its kernel's smallest block, whatever `block_size` is, and one table
        of blocks has one size.
    Safe: in one table a windowed layer keeps each token, as the layers beside it do, by the same kernel.
    Upstream: newer versions give such layers the asked size where their kernel takes it.
    Delete when: tests/checks/check_families.py starts Gemma 2 on the oldest accepted vLLM without this function.
    """
    for layer in layers:
        if getattr(layer, "sliding_window", None) is not None and isinstance(layer, Attention):
            vars(layer)["get_kv_cache_spec"] = partial(_spec_of_common_block, layer)


def _spec_of_common_block(layer: Any, config: VllmConfig) -> Any:
    return replace(type(layer).get_kv_cache_spec(layer, config), block_size=config.cache_config.block_size)


def theta_model_config(teacher: ModelConfig, theta: str) -> ModelConfig:
    """The configuration of the student, which vLLM makes as it made the teacher's."""
    overrides: Any = teacher.hf_overrides  # a dict, as limits.py has it; `architectures` is the fused model's
    further = {name: value for name, value in overrides.items() if name != "architectures"}
    if is_wrapper(whole := get_config(theta, teacher.trust_remote_code, token=teacher.hf_token)):
        further["architectures"] = language_model(whole).architectures  # no multimodal model to vLLM
    return ModelConfig(
        model=theta,
        tokenizer=teacher.tokenizer,
        skip_tokenizer_init=True,
        trust_remote_code=teacher.trust_remote_code,
        model_impl=teacher.model_impl,
        dtype=teacher.dtype,
        seed=teacher.seed,
        hf_token=teacher.hf_token,
        hf_overrides=further,
        max_model_len=teacher.max_model_len,
        enforce_eager=teacher.enforce_eager,
    )


def bind_attention(model: nn.Module, config: VllmConfig) -> None:
    """Let the attention layers of `model` be planned by its own head counts.

    Symptom: the student's attention is planned with the teacher's head counts.
    Cause: some builders of attention metadata read them from the engine's `model_config`.
    Safe: the student's layers carry a subclass of their backend whose builder is handed the student's configuration.
    Upstream: FlashAttention reads them from the layers since 0.31; others do not. Not seen on the CPU.
    Delete when: all builders read them from the layers.
    """
    bound: dict[type, type] = {}
    for module in model.modules():
        if isinstance(module, (Attention, MLAAttention)):
            backend = module.attn_backend
            if backend not in bound:
                bound[backend] = subclass_attention_backend("Theta", backend, _bound_builder(backend, config))
            module.attn_backend = bound[backend]


def _bound_builder(backend: Any, config: VllmConfig) -> type:
    class ThetaBuilder(backend.get_builder_cls()):  # type: ignore[misc]
        def __init__(
            self, spec: Any, names: list[str], vllm_config: VllmConfig, device: torch.device, **kwargs: Any
        ) -> None:
            config.cache_config = vllm_config.cache_config  # one cache: its block counts are known only by now
            super().__init__(spec, names, config, device, **kwargs)

    return ThetaBuilder
