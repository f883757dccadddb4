"""What the fused engine refuses before it starts, each by name and reason: seconds instead of a trace from vLLM."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ...options import unknown_option
from ...pairing import (
    Ending,
    check_same_tokens,
    check_vocabulary,
    check_weights,
    context_length,
    end_of_sequence,
    load_config,
    load_generation_config,
    load_tokenizer,
)

OTHER_BACKEND = "Sample with backend='transformers' instead."
OWNED = {
    "model": "the engine's model is the teacher: pass it as `teacher`",
    "worker_extension_cls": "this backend installs its sampler through it",
    "speculative_config": "a draft would be accepted by the teacher's distribution instead of the mixture's",
    "spec_method": "a draft would be accepted by the teacher's distribution instead of the mixture's",
    "spec_model": "a draft would be accepted by the teacher's distribution instead of the mixture's",
    "spec_tokens": "a draft would be accepted by the teacher's distribution instead of the mixture's",
    "kv_transfer_config": "a transferred cache would outlive a reload of the student",
    "kv_offloading_size": "an offloaded cache would outlive a reload of the student",
    "cpu_offload_gb": "the student's weights are replaced in place, which an offloader would undo",
    "offload_group_size": "the student's weights are replaced in place, which an offloader would undo",
    "enable_lora": "the student's adapter is merged into the weights that `load_theta` pushes",
    "enable_eplb": "it moves the experts of one model, and here are two",
    "enable_dbo": "it splits a batch that the two models share",
    "enable_prompt_embeds": "one embedding cannot be read by two models",
    "enable_return_routed_experts": "it looks for the experts of one model, and here are two",
    "watermark_config": "its tokens are drawn by a key instead of from the mixture",
    "return_sampling_mask": "its columns and those of the records would meet",
}
"""Engine arguments that cannot be set, and why; a value that switches them off is let through."""
CACHE_TYPES = ("auto", "float16", "bfloat16", "float32")
LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "npcache", "pt")
"""Those of vLLM's default loader, which reads the student's files after the teacher's."""
RECURRENT = {
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lfm2",
    "mamba",
    "mamba2",
    "minimax",
    "nemotron_h",
    "plamo2",
    "qwen3_5",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv",
    "zamba",
    "zamba2",
}
"""Model types with recurrent layers that do not name them in `layer_types`."""


@dataclass
class Pair:
    """What a teacher and a student have in common, read before an engine starts.

    Args:
        teacher: the teacher's folder or name.
        theta: the student's folder or name.
        ending: where completions end.
        vocabulary: the number of tokens that both models score.
        engine_vocabulary: the number that the teacher scores: the ids of a record's columns start there.
        context: most tokens that both can read in this engine.
        tokenizer: the pair's.
        two_prompts: whether a student may have a prompt of its own: under Model Runner V2, on GPUs.
        stale: why the engine must not sample until the next reload, or None.
        has_nan: whether a model returned NaN since the caches were last cleaned.
    """

    teacher: str
    theta: str
    ending: Ending
    vocabulary: int
    engine_vocabulary: int
    context: int
    tokenizer: PreTrainedTokenizerBase
    two_prompts: bool = False
    stale: str | None = None
    has_nan: bool = False


def check_pair(teacher: str, theta: str, arguments: dict[str, Any]) -> Pair:
    """Read both models' configurations and refuse what the fused engine cannot mix.

    Raises:
        ValueError: naming the model and the reason.
    """
    trust = {"trust_remote_code": bool(arguments.get("trust_remote_code", False))}
    paths = {"teacher": teacher, "student": theta}
    revisions: dict[str, dict[str, Any]] = {"teacher": {}, "student": {}}  # vLLM's is the teacher's
    if arguments.get("revision") is not None:
        revisions["teacher"] = {"revision": arguments["revision"]}
    configs = {role: load_config(path, role, **trust, **revisions[role]) for role, path in paths.items()}
    for role, path in paths.items():
        check_weights(path, role)
    for role, config in configs.items():
        _check_architecture(config, role)
        _check_heads(config, role, arguments.get("tensor_parallel_size", 1))
        if (getattr(config, "quantization_config", None) or {}).get("kv_cache_scheme"):
            other = "student" if role == "teacher" else "teacher"
            raise ValueError(
                f"The {role} {paths[role]!r} brings an FP8 KV cache, which the {other} would share unscaled."
            )
    of_tokenizer = arguments.get("tokenizer_revision") or arguments.get("revision")
    source = {} if of_tokenizer is None else {"revision": of_tokenizer}
    tokenizers = {"teacher": load_tokenizer(str(arguments.get("tokenizer") or teacher), "teacher", **trust, **source)}
    tokenizers["student"] = load_tokenizer(theta, "student", **trust)
    check_same_tokens(tokenizers["teacher"], tokenizers["student"])
    settings = {role: load_generation_config(path, configs[role], **revisions[role]) for role, path in paths.items()}
    return Pair(
        teacher,
        theta,
        end_of_sequence(settings["teacher"], settings["student"], tokenizers["student"].eos_token_id),
        check_vocabulary(configs["teacher"], configs["student"], tokenizers["student"]),
        configs["teacher"].vocab_size,
        _check_context(configs, arguments.get("max_model_len")),
        tokenizers["student"],
        can_read_two_prompts(),
    )


def can_read_two_prompts() -> bool:
    """Whether this machine's engine takes a prompt for each model: Model Runner V2 does."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def _check_architecture(config: PreTrainedConfig, role: str) -> None:
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    reason = None
    if config.get_text_config() is not config:
        reason = "is a multimodal wrapper round a language model"
    elif config.model_type in RECURRENT or kinds - {
        "full_attention",
        "attention",
        "sliding_attention",
    }:
        reason = "has recurrent or linear layers (a Mamba or linear hybrid), whose states the engine cannot hold twice"
    elif getattr(config, "kv_lora_rank", None):
        reason = "has latent attention (MLA), whose cache has blocks of another kind than the other model's"
    elif "sliding_attention" in kinds or window:
        reason = f"has sliding-window attention (window {window}), which is not tested in a shared cache"
    if reason:
        name = f"{config.name_or_path!r} ({', '.join(config.architectures or [config.model_type])})"
        raise ValueError(
            f"The {role} {name} {reason}. Wanted a dense or MoE decoder with full attention. {OTHER_BACKEND}"
        )


def _check_heads(config: PreTrainedConfig, role: str, tensor_parallel_size: int) -> None:
    if config.num_attention_heads % tensor_parallel_size:
        raise ValueError(
            f"The {role} {config.name_or_path!r} has {config.num_attention_heads} attention heads; wanted a multiple "
            f"of `tensor_parallel_size`, which is {tensor_parallel_size}. Lower it."
        )


def _check_context(configs: dict[str, PreTrainedConfig], asked: int | None) -> int:
    if asked is not None and asked < 1:
        raise ValueError(f"`max_model_len` is {asked}; wanted at least 1. Drop it for what both models can read.")
    for role, config in configs.items():
        if asked and asked > context_length(config):
            raise ValueError(
                f"`max_model_len` is {asked}, but the {role} {config.name_or_path!r} reads at most "
                f"{context_length(config)} tokens. Lower `max_model_len`."
            )
    return asked or context_length(*configs.values())


def check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse engine arguments that vLLM does not have, that this backend sets itself, or that it cannot honour.

    Raises:
        ValueError: naming the argument, and the nearest known name or the reason.
    """
    from vllm import LLM, EngineArgs

    known = {field.name for field in fields(EngineArgs)} | set(inspect.signature(LLM.__init__).parameters)
    known -= {"self", "kwargs", "model"}
    for name, value in arguments.items():
        if name in OWNED and value:
            raise ValueError(f"The engine argument `{name}` cannot be set: {OWNED[name]}.")
        if name not in known | OWNED.keys():
            raise ValueError(unknown_option("engine argument", name, known))
    wanted = {
        "hf_overrides": (_names_no_architecture, "a dict without `architectures`, which this backend sets"),
        "additional_config": (_leaves_our_key, "a dict without the key `optimal_sampling`, which this backend sets"),
        "logprobs_mode": (lambda value: value == "processed_logprobs", "'processed_logprobs', which are log q"),
        "max_logprobs": (lambda value: value == -1 or value >= 3, "at least 3, which carry the records"),
        "pipeline_parallel_size": (lambda value: value == 1, "1: a stage would have to pass on two hidden states"),
        "kv_cache_dtype": (
            lambda value: value in CACHE_TYPES,
            f"no FP8, whose scales are of one model: {CACHE_TYPES}",
        ),
        "load_format": (lambda value: value in LOAD_FORMATS, f"a format that loads two models: {LOAD_FORMATS}"),
        "model_impl": (lambda value: value in ("auto", "vllm"), "'auto' or 'vllm'"),
        "decode_context_parallel_size": (lambda value: value == 1, "1: the student's cache has places of its own"),
        "runner": (lambda value: value in ("auto", "generate"), "'generate'"),
    }
    for name, (holds, words) in wanted.items():
        if arguments.get(name) is not None and not holds(arguments[name]):
            raise ValueError(f"The engine argument `{name}` is {arguments[name]!r}; wanted {words}.")


def _names_no_architecture(value: Any) -> bool:
    return isinstance(value, dict) and "architectures" not in value


def _leaves_our_key(value: Any) -> bool:
    return isinstance(value, dict) and "optimal_sampling" not in value


def check_platform(arguments: dict[str, Any]) -> None:
    """Refuse a way of running that this backend does not have.

    Raises:
        ValueError: on Model Runner V1 on a GPU, or models spread over processes that this one does not run in.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0":
        raise ValueError(
            "VLLM_USE_V2_MODEL_RUNNER is 0: vLLM would use Model Runner V1, whose rows this backend maps to requests "
            "on the host, which a GPU would wait for. Unset the variable."
        )
    sizes = {name: arguments.get(name) or 1 for name in ("tensor_parallel_size", "data_parallel_size")}
    if max(sizes.values()) > 1 and arguments.get("distributed_executor_backend") != "external_launcher":
        name = max(sizes, key=lambda key: sizes[key])
        raise ValueError(
            f"`{name}` is {sizes[name]}: the student's weights are reloaded inside of one process. Start one process "
            "for each device and pass distributed_executor_backend='external_launcher', as TRL's colocate mode does."
        )
