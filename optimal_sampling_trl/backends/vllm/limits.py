"""Refusals of the fused engine before it starts: each names the setting and the reason, in place of vLLM's trace."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ...options import MAX_MODEL_LEN, check_whole, unknown_option
from ...pairing import Pair, Source, context_length, name_sources, read_pair, rope_kinds
from .families import (
    OTHER_BACKEND,
    check_family,
    check_latent,
    check_shared_caches,
    check_wrapper,
    has_experts,
    has_several_tables,
    has_window,
    is_on_cpu,
    latent_sizes,
)
from .pair_settings import KEY
from .speculation import NUM_SPECULATIVE_TOKENS, check_speculation
from .states import check_states
from .wire import RECORD_COLUMNS

DRAFTS = f"the student drafts, and the mixture verifies: `{NUM_SPECULATIVE_TOKENS}` alone says how many tokens"
OWNED = {
    "model": "the engine's model is the teacher: pass it as `teacher`",
    "worker_extension_cls": "this backend installs its sampler through it",
    "speculative_config": DRAFTS,
    "spec_method": DRAFTS,
    "spec_model": DRAFTS,
    "spec_tokens": DRAFTS,
    "kv_transfer_config": "a transferred cache would outlive a reload of the student",
    "kv_offloading_size": "an offloaded cache would outlive a reload of the student",
    "cpu_offload_gb": "the student's weights are replaced in place, which an offloader would undo",
    "offload_group_size": "the student's weights are replaced in place, which an offloader would undo",
    "enable_lora": "the student's adapter is merged into the weights that `load_theta` pushes",
    "enable_eplb": "it moves the experts of one model, and here are two",
    "enable_dbo": "it splits a batch that the two models share",
    "enable_prompt_embeds": "one embedding cannot be read by two models",
    "enable_return_routed_experts": "it looks for the experts of one model, and here are two",
    "disable_hybrid_kv_cache_manager": "this backend sets it by the windows of the two models",
    "kv_sharing_fast_prefill": "it skips tokens by the layers of one model, and here are two",
    "disable_sliding_window": "a `max_model_len` of at most the window does the same for both models",
    "watermark_config": "its tokens are drawn by a key instead of from the mixture",
    "return_sampling_mask": "its columns and those of the records would meet",
}
"""Engine arguments that cannot be set, and why; a value that switches them off is let through."""
SIZES = {
    "max_model_len": "Drop it for what both models can read.",
    "max_num_seqs": "Drop it for vLLM's own.",
    "tensor_parallel_size": "Drop it for one device.",
    "data_parallel_size": "Drop it for one engine.",
}
"""Engine arguments that are whole numbers above 0, and how to go on without."""
CACHE_TYPES = ("auto", "float16", "bfloat16", "float32")
LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "npcache", "pt")
"""Those of vLLM's default loader, which reads the student's files after the teacher's."""
ONE_PROMPT = "sliding windows, latent attention or linear attention"
"""Features of layers with which both models of a pair read one prompt, as `check_pair` finds; for the errors."""


def check_pair(
    teacher: str | Source,
    theta: str | Source,
    arguments: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    theta_settings: GenerationConfig | None = None,
) -> Pair:
    """Read what both models share, and refuse what the fused engine cannot mix.

    Args:
        teacher: the teacher's folder or name, or the source of one.
        theta: likewise of the student.
        arguments: the engine's: they say which files are the models', and how large the engine is (`check_sizes`).
        tokenizer: the trainer's, where there is one; by default the student's.
        theta_settings: generation settings of the student that is trained, of whose files the engine loads a copy.

    Raises:
        ValueError: naming the model and the reason.
    """
    sources = name_sources(teacher, theta, arguments)
    for source in sources:
        check_wrapper(source.config, source.role)
    configs = {role: source.text_config for role, source in zip(("teacher", "student"), sources)}
    context = arguments.get("max_model_len") or context_length(*configs.values())
    for role, config in configs.items():
        check_family(config, role, context)
        _check_heads(config, role, arguments.get("tensor_parallel_size", 1))
        if (getattr(config, "quantization_config", None) or {}).get("kv_cache_scheme"):
            other = "student" if role == "teacher" else "teacher"
            raise ValueError(
                f"The {role} {config.name_or_path!r} brings an FP8 KV cache, which the {other} would share unscaled."
            )
    if has_experts(configs["student"]) and not has_experts(configs["teacher"]):
        raise ValueError(
            f"The student {configs['student'].name_or_path!r} has experts and the teacher "
            f"{configs['teacher'].name_or_path!r} has none: vLLM makes what experts need for the engine's own model "
            f"alone, which is the teacher. Wanted a teacher with experts, or a dense student. {OTHER_BACKEND}"
        )
    check_states(configs, arguments)
    check_shared_caches(configs)
    check_latent(configs)
    check_speculation(configs, arguments, context)
    _check_max_model_len(configs, arguments.get("max_model_len"))
    two_prompts = not has_several_tables(configs.values()) and not any(
        has_window(config, context) or latent_sizes(config) for config in configs.values()
    )
    return read_pair(
        *sources,
        tokenizer=tokenizer,
        theta_settings=theta_settings,
        teacher_tokenizer=None if sources[0] is sources[1] else _teacher_tokenizer(sources[0], arguments),
        max_model_len=arguments.get("max_model_len"),
        two_prompts=two_prompts,
    )


def _teacher_tokenizer(teacher: Source, arguments: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Return the tokenizer that vLLM loads for its model."""
    revision = arguments.get("tokenizer_revision") or arguments.get("revision")
    options = {**teacher.options, "revision": revision}
    return Source(str(arguments.get("tokenizer") or teacher.name), "teacher", options, teacher.token).tokenizer()


def _check_heads(config: PreTrainedConfig, role: str, tensor_parallel_size: int) -> None:
    if config.num_attention_heads % tensor_parallel_size:
        raise ValueError(
            f"The {role} {config.name_or_path!r} has {config.num_attention_heads} attention heads; wanted a multiple "
            f"of `tensor_parallel_size`, which is {tensor_parallel_size}. Lower it."
        )


def check_sizes(arguments: Mapping[str, Any]) -> None:
    """Refuse sizes that are no whole numbers above 0, before anything is reckoned with them.

    Raises:
        ValueError: naming the setting.
    """
    for name, advice in SIZES.items():
        if arguments.get(name) is not None:
            check_whole("The engine", name, arguments[name], 1, advice)


def _check_max_model_len(configs: dict[str, PreTrainedConfig], wanted: int | None) -> None:
    for role, config in configs.items():
        if wanted and wanted > context_length(config):
            ends = "longrope" in rope_kinds(config)
            reason = " (LongRoPE: behind them vLLM's angles would not be those of transformers, which trains)"
            raise ValueError(
                f"`max_model_len` is {wanted}, but the {role} {config.name_or_path!r} reads at most "
                f"{context_length(config)} tokens{reason if ends else ''}. Lower {MAX_MODEL_LEN}."
            )


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse engine arguments that vLLM does not have, that this backend sets itself, or that it cannot honour.

    Raises:
        ValueError: naming the argument, and the nearest known name or the reason.
    """
    from vllm import LLM, EngineArgs

    known = {field.name for field in fields(EngineArgs)} | set(inspect.signature(LLM.__init__).parameters)
    known = known - {"self", "kwargs", "model"} | {NUM_SPECULATIVE_TOKENS}
    for name, value in arguments.items():
        if name in OWNED and value:
            raise ValueError(f"The engine argument `{name}` cannot be set: {OWNED[name]}.")
        if name not in known | OWNED.keys():
            raise ValueError(unknown_option("engine argument", name, known))
    for name, value in arguments.items():
        words = None if value is None else _wanted_instead(name, value)
        if words is not None:
            raise ValueError(f"The engine argument `{name}` is {value!r}; wanted {words}.")


def _wanted_instead(name: str, value: Any) -> str | None:
    """Say what an argument must be where the engine cannot honour `value`; None where it can."""
    if name == "hf_overrides" and not (isinstance(value, dict) and "architectures" not in value):
        return "a dict without `architectures`, which this backend sets"
    if name == "additional_config" and not (isinstance(value, dict) and KEY not in value):
        return f"a dict without the key `{KEY}`, which this backend sets"
    if name == "logprobs_mode" and value != "processed_logprobs":
        return "'processed_logprobs', which are log q"
    if name == "max_logprobs" and value != -1 and value < RECORD_COLUMNS:
        return f"at least {RECORD_COLUMNS}, which carry the records"
    if name == "gpu_memory_utilization" and not 0 < value <= 1:
        return "a share above 0, of at most 1 (`vllm_gpu_memory_utilization` in a trainer)"
    if name == "pipeline_parallel_size" and value != 1:
        return "1: a stage would have to pass on two hidden states"
    if name == "kv_cache_dtype" and value not in CACHE_TYPES:
        return f"no FP8, whose scales are of one model: {CACHE_TYPES}"
    if name == "load_format" and value not in LOAD_FORMATS:
        return f"a format that loads two models: {LOAD_FORMATS}"
    if name == "model_impl" and value not in ("auto", "vllm"):
        return "'auto' or 'vllm'"
    if name == "decode_context_parallel_size" and value != 1:
        return "1: the student's cache has places of its own"
    if name == "runner" and value not in ("auto", "generate"):
        return "'generate'"
    return None


def check_platform(arguments: Mapping[str, Any]) -> None:
    """Refuse a way of running that this backend does not have.

    Raises:
        ValueError: on Model Runner V1 on a GPU, a size that is none, or models spread over processes that this one
            does not run in.
    """
    if not is_on_cpu() and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0":
        raise ValueError(
            "VLLM_USE_V2_MODEL_RUNNER is 0: vLLM would use Model Runner V1, whose rows this backend maps to requests "
            "on the host, which a GPU would wait for. Unset the variable."
        )
    check_sizes(arguments)
    sizes = {name: arguments.get(name) or 1 for name in ("tensor_parallel_size", "data_parallel_size")}
    if max(sizes.values()) > 1 and arguments.get("distributed_executor_backend") != "external_launcher":
        name = max(sizes, key=lambda key: sizes[key])
        raise ValueError(
            f"`{name}` is {sizes[name]}: the student's weights are reloaded inside of one process. Start one process "
            "for each device and pass distributed_executor_backend='external_launcher', as TRL's colocate mode does."
        )
