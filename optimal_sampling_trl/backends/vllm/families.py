"""The families of models that the fused engine takes, and what keeps it from the others: by configurations alone."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Iterator
from importlib.util import find_spec

from transformers import PreTrainedConfig

from ...pairing import STATE_LAYERS, attention_window, has_states, is_wrapper, rope_kinds, shares_caches
from .versions import minor_version

WINDOWED = ("gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "mistral", "phi3")
"""Model types whose windows were held against the oracle: vLLM reads windows in each family's code by other rules."""
LINEAR = ("granitemoehybrid", "lfm2", "nemotron_h", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
"""Model types whose linear attention, Mamba layers or short convolutions were held against the oracle."""
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
"""Model types whose latent attention was held against the oracle. Sparse ones keep caches of further kinds."""
ATTENTION = {"full_attention", "attention", "sliding_attention"}
FEED_FORWARD = {"mlp", "moe"}
STATES = {"mamba", "mamba2", "recurrent", "hybrid"}
"""Kinds of layers, as `layer_types` calls them."""
RECURRENT = {
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "jamba",
    "kimi_linear",
    "mamba",
    "mamba2",
    "minimax",
    "plamo2",
    "recurrent_gemma",
    "rwkv",
    "zamba",
    "zamba2",
}
"""Model types with recurrent layers that do not name them in `layer_types`."""
EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts", "block_configs")
"""Fields of a configuration by which vLLM knows a mixture of experts."""
RENAMED = ("compressed-tensors", "fp8")
"""Ways of quantising of which vLLM can rename the layers that a checkpoint leaves out."""
SHARED_SINCE = (0, 31)
"""The first version of vLLM whose layers that share a cache were held against the oracle on a GPU."""
OTHER_BACKEND = "Sample with backend='transformers' instead."


def check_family(config: PreTrainedConfig, role: str, context: int) -> None:
    """Refuse a model that the fused engine cannot hold beside another one, or was never seen to hold exactly.

    Args:
        config: the model's.
        role: what the error calls it.
        context: most tokens that the engine reads.

    Raises:
        ValueError: naming the model, the reason and the way out.
    """
    if reason := next(_reasons(config, role, context), None):
        name = f"{config.name_or_path!r} ({', '.join(config.architectures or [config.model_type])})"
        raise ValueError(
            f"The {role} {name} {reason}. Wanted a dense or MoE decoder of a family in docs/models.md. {OTHER_BACKEND}"
        )


def check_wrapper(config: PreTrainedConfig, role: str) -> None:
    """Refuse a quantised multimodal wrapper whose list of layers left out cannot be given the language model's names.

    Raises:
        ValueError: naming the model.
    """
    quantised = getattr(config, "quantization_config", None)
    if not is_wrapper(config) or not quantised:
        return
    has_patterns = re.search(r'"re:[^"]*language_model', json.dumps(quantised)) is not None
    if role == "student" or quantised.get("quant_method") not in RENAMED or has_patterns:
        raise ValueError(
            f"The {role} {config.name_or_path!r} is a quantised multimodal model, whose layers that stay as they are "
            f"go by the wrapper's names. Wanted a teacher by {' or '.join(RENAMED)} without patterns of such names, "
            f"or one that is not quantised. {OTHER_BACKEND}"
        )


def _reasons(config: PreTrainedConfig, role: str, context: int) -> Iterator[str]:
    kinds, window = set(getattr(config, "layer_types", None) or ()), attention_window(config)
    if config.get_text_config() is not config:
        yield "is a multimodal wrapper round a language model"
    if config.model_type in RECURRENT or kinds & STATES or (has_states(config) and config.model_type not in LINEAR):
        yield f"has layers with a state (Mamba, linear, convolutions); checked were those of {', '.join(LINEAR)}"
    if config.model_type.startswith("qwen3_5") and find_spec("torchvision") is None:
        yield "is a Qwen3.5, whose code in vLLM imports torchvision: install one that loads beside this torch"
    if "moe" in kinds and is_on_cpu():
        yield "has experts without a gate, for which vLLM has no kernel on a CPU"
    if config.model_type == "lfm2" and not config.tie_word_embeddings:
        yield "has an output layer of its own, which vLLM's code of an LFM2 ties to the embedding"
    if config.model_type == "lfm2" and not hasattr(config, "conv_dim"):
        yield "lacks `conv_dim` and `block_dim`, which vLLM reads; in published files both are the hidden size"
    if further := kinds - ATTENTION - FEED_FORWARD - STATE_LAYERS:
        yield f"has layers of the kind {', '.join(sorted(further))}, which were never checked beside others"
    if latent_sizes(config) and (config.model_type not in LATENT or hasattr(config, "index_topk")):
        yield f"has latent attention (MLA), which was checked for {', '.join(LATENT)} alone, and never the sparse kind"
    if latent_sizes(config) and config.tie_word_embeddings:
        yield "has latent attention and ties its output layer to the embedding, which vLLM's code of it does not"
    if window and window < context and config.model_type not in WINDOWED:
        yield (
            f"has sliding-window attention (window {window}), which was checked for {', '.join(WINDOWED)} alone; with "
            f"`max_model_len` at most {window} the window is none"
        )
    if "dynamic" in rope_kinds(config):
        yield "has dynamic RoPE, whose angles vLLM computes otherwise than transformers, which trains"
    if "mscale_all_dim" in rope_kinds(config).get("yarn", {}) and not latent_sizes(config) and not reads_mscale():
        yield "has YaRN with `mscale_all_dim`, which vLLM reads from 0.30 on: its angles are others here"
    if getattr(config, "is_heterogeneous", False) and not reads_layers():
        yield "has heads of two sizes, told of each layer since transformers 5.15, which vLLM reads from 0.28 on"
    if role == "student" and config.model_type == "gpt_oss":
        yield "is a gpt-oss, of which vLLM's reload keeps the old experts; it may be the teacher"
    if not has_a_class(config):
        yield "has no class of vLLM's own and would run on vLLM's Transformers backend, which cannot hold two models"


def is_on_cpu() -> bool:
    """Tell whether vLLM runs on a CPU here."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def has_a_class(config: PreTrainedConfig) -> bool:
    """Tell whether this vLLM has code for a model. On its Transformers backend the layers of two models have one name
    up to 0.31, and the second one's code is not compiled."""
    from vllm import ModelRegistry

    found = [ModelRegistry.models.get(name) for name in config.architectures or ()]
    rooms = [getattr(entry, "module_name", "") for entry in found if entry is not None]
    return bool(rooms) and not any(".transformers" in room for room in rooms)


def reads_mscale() -> bool:
    """Tell whether this vLLM makes the cosines of YaRN as long as transformers does: see vLLM issue 48621."""
    from vllm.model_executor.layers.rotary_embedding.yarn_scaling_rope import YaRNScalingRotaryEmbedding

    return "mscale_all_dim" in inspect.signature(YaRNScalingRotaryEmbedding.__init__).parameters


def reads_layers() -> bool:
    """Tell whether this vLLM reads configurations whose layers differ: vLLM 0.26 does not."""
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    return hasattr(ModelArchConfigConvertorBase, "get_per_layer_hf_configs")


def latent_sizes(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Sizes of what latent attention keeps of a token, its key's rotated part behind; None for other attention."""
    rank = getattr(config, "kv_lora_rank", None)
    return (rank, getattr(config, "qk_rope_head_dim", 0)) if rank else None


def check_latent(configs: dict[str, PreTrainedConfig]) -> None:
    """Refuse latent attention beside another kind, or beside one that keeps more or less of a token.

    Raises:
        ValueError: naming both.
    """
    sizes = {role: latent_sizes(config) for role, config in configs.items()}
    if len(set(sizes.values())) > 1:
        words = " and ".join(f"the {role}'s {f'keeps {size}' if size else 'has none'}" for role, size in sizes.items())
        raise ValueError(
            f"Of latent attention (MLA), {words} numbers of a token. Wanted two models of one family, whose caches "
            f"have blocks of one kind. {OTHER_BACKEND}"
        )


def has_window(config: PreTrainedConfig, context: int) -> bool:
    """Return True where a model reads less than a context through its windows; a longer window is none."""
    return (attention_window(config) or context) < context


def has_several_tables(configs: Collection[PreTrainedConfig]) -> bool:
    """Return True where an engine keeps several tables of cached blocks: for windows of different lengths, and for
    layers that read another layer's cache or keep a state."""
    windows = {attention_window(config) for config in configs} - {None}
    return len(windows) > 1 or any(shares_caches(config) or has_states(config) for config in configs)


def check_shared_caches(configs: dict[str, PreTrainedConfig]) -> None:
    """Refuse layers that read another layer's cache, on a GPU with an older vLLM: they have tables of blocks of their
    own, which were not run there.

    Args:
        configs: of both models, by their roles.

    Raises:
        ValueError: naming the model.
    """
    for role, config in configs.items():
        if shares_caches(config) and not is_on_cpu() and minor_version() < SHARED_SINCE:
            wanted, got = (".".join(map(str, version)) for version in (SHARED_SINCE, minor_version()))
            raise ValueError(
                f"The {role} {config.name_or_path!r} has layers that read another layer's cache "
                f"(`{config.model_type}`), and vLLM is {got}; on a GPU they were checked from {wanted} on. Install a "
                f"newer vLLM. {OTHER_BACKEND}"
            )


def has_experts(config: PreTrainedConfig) -> bool:
    """Return True for a mixture of experts, as vLLM tells one by its configuration."""
    return any(getattr(config, name, None) for name in EXPERTS)
