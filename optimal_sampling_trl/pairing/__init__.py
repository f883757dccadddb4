"""A teacher and a student before an engine starts: the files of each, what both share, and their prompts."""

from __future__ import annotations

from .checkpoint import checkpoint_digest
from .ending import Ending, end_of_sequence, stop_tokens
from .pair import (
    Pair,
    attention_window,
    check_same_tokens,
    check_vocabulary,
    context_length,
    has_states,
    name_sources,
    read_pair,
    rope_kinds,
    shares_caches,
)
from .prompts import (
    Prompt,
    check_prompt,
    check_system_message,
    encode,
    reads_two_prompts,
    template_digest,
    template_refusal,
    warn_of_templates,
    with_system_prompt,
)
from .source import (
    MODEL_OPTIONS,
    Source,
    check_adapter,
    check_decoder,
    check_weights,
    folder_digest,
    load_config,
    load_generation_config,
    load_tokenizer,
    token_digest,
    weight_digest,
)
from .wrappers import is_wrapper, language_model

__all__ = [
    "MODEL_OPTIONS",
    "Ending",
    "Pair",
    "Prompt",
    "Source",
    "attention_window",
    "check_adapter",
    "check_decoder",
    "check_prompt",
    "check_same_tokens",
    "check_system_message",
    "check_vocabulary",
    "check_weights",
    "checkpoint_digest",
    "context_length",
    "encode",
    "end_of_sequence",
    "folder_digest",
    "has_states",
    "is_wrapper",
    "language_model",
    "load_config",
    "load_generation_config",
    "load_tokenizer",
    "name_sources",
    "read_pair",
    "reads_two_prompts",
    "rope_kinds",
    "shares_caches",
    "stop_tokens",
    "template_digest",
    "template_refusal",
    "token_digest",
    "warn_of_templates",
    "weight_digest",
    "with_system_prompt",
]
