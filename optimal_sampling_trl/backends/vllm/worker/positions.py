"""Positions of tokens as the trainer's code of a model reads them, where vLLM's reads or turns them otherwise."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from vllm.model_executor.layers.attention import MLAAttention

from ..families import is_on_cpu


def read_query_scale(config: PreTrainedConfig) -> None:
    """Let vLLM find the scale that Ministral 3 gives to queries behind its original context.

    Symptom: behind 16384 tokens of a Ministral 3 the engine's log-probabilities are not the trainer's.
    Cause: transformers has the scale among the settings of rotary embeddings, and vLLM reads another field.
    Safe: that field is set to the same two numbers, unless the files have it; the formula is one.
    Upstream: vLLM issue 48621.
    Delete when: test_records passes for the pair "ministral3-wrappers" without this function.

    Args:
        config: of the model that is built next; changed in place.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    beta = rope.get("llama_4_scaling_beta")
    if beta and not getattr(config, "llama_4_scaling", None):
        length = rope["original_max_position_embeddings"]
        config.llama_4_scaling = {"beta": beta, "original_max_position_embeddings": length}


def rotate_every_head(model: nn.Module) -> None:
    """Let latent attention and LFM2 turn queries and keys by torch's operations, on the CPU.

    Symptom: on a CPU a model with latent attention is another one, by 0.3 nats a token, unless its angles are YaRN's;
        an LFM2 is, by 0.15.
    Cause: vLLM's kernel for CPUs takes queries of three dimensions, cut out of longer rows, for flat ones.
    Safe: vLLM's own operations of torch compute the same, as they do for YaRN; a GPU keeps its kernel.
    Upstream: none found; vLLM pull request 12777 is the same for GPUs.
    Delete when: test_records passes for the pairs "moonlight" and "lfm2" without this function.
    """
    if not is_on_cpu():
        return
    for module in model.modules():
        if isinstance(getattr(module, "mla_attn", None), MLAAttention) or type(module).__name__ == "Lfm2Attention":
            rotary: Any = module.rotary_emb
            rotary._forward_method = rotary.forward_native
