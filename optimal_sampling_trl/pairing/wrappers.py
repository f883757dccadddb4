"""Multimodal models that are used for text: the language model inside of a wrapper, its settings and its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

from torch import Tensor
from transformers import PreTrainedConfig

WRAPPERS = {
    "gemma3": "Gemma3ForCausalLM",
    "gemma4": "Gemma4ForCausalLM",
    "mistral3": "MistralForCausalLM",
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
    "qwen3_vl": "Qwen3ForCausalLM",
}
"""Model types of the wrappers that were checked, and the architecture of the language model inside of each."""
INSIDE = ("model.language_model.", "language_model.model.")
"""Prefixes of the language model's weights: in memory and in new files, and in old files."""
HEADS = ("lm_head.", "language_model.lm_head.")
OWN = (
    "model.layers.",
    "model.embed_tokens.",
    "model.norm.",
    "model.embed_tokens_per_layer.",
    "model.per_layer_model_projection.",
    "model.per_layer_projection_norm.",
)
"""Beginnings of the names that the language model's weights have without a wrapper."""


PREFIXES = {**dict.fromkeys(INSIDE, "model."), "language_model.lm_head": "lm_head"}
"""Prefixes of layers inside of a wrapper, and those that the layers have without it."""


def is_wrapper(config: PreTrainedConfig) -> bool:
    """Return True for a model with towers for other inputs, whose language model is used alone."""
    return config.model_type in WRAPPERS


def language_model(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of the settings of a wrapper's language model, under the wrapper's name; others as they are."""
    if not is_wrapper(config):
        return config
    text = copy.copy(config.get_text_config())
    text.name_or_path = config.name_or_path
    text.architectures = [WRAPPERS[config.model_type]]
    text.tie_word_embeddings = config.tie_word_embeddings
    if hasattr(config, "quantization_config"):
        text.quantization_config = config.quantization_config
    return text


def text_name(name: str) -> str | None:
    """Return the name of a wrapper's weight in the language model alone; None for a tower's."""
    for prefix in INSIDE:
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    for prefix in HEADS:
        if name.startswith(prefix):
            return "lm_head." + name.removeprefix(prefix)
    return name if name.startswith(OWN) else None


def text_weights(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Hand on a wrapper's weights under the names of its language model, without those of its towers."""
    for name, weight in named:
        if (inside := text_name(name)) is not None:
            yield inside, weight
