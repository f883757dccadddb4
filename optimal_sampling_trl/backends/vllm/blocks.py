"""The blocks of the cache that requests may share where teacher and student read different prompts.

vLLM's scheduler decides which, by hashes of the teacher's tokens. So this file is not part of `worker/`, which runs
the models.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from .wire import teacher_shift_of, theta_prompt_of


def shared_end(prompt: int, behind: int, block_size: int) -> int:
    """Return the end of the part of a request's cache that may be shared, in tokens of the scheduled stream.

    The first completion token of the model whose prompt is d tokens shorter has place `prompt - d % block_size`.
    Blocks that end later belong to one request alone.

    Args:
        prompt: tokens of the scheduled prompt, the longer one.
        behind: d, by how many tokens the other one is shorter.
        block_size: tokens in a block of the cache.
    """
    first = prompt - behind % block_size
    return first // block_size * block_size


def private_blocks() -> None:
    """Let vLLM share blocks only where both streams of tokens are the same. May be called any number of times.

    Symptom: with two prompts the completions of one group overwrite each other's keys in one model's cache.
    Cause: blocks are shared by the scheduled tokens, and a shifted stream's completion lies up to a block earlier.
    Safe: a block that such a completion may reach is hashed with its request.
    Upstream: none; vLLM knows of one stream of tokens.
    Delete when: a request can say how much of its prompt may be shared.
    """
    from vllm.v1.core import kv_cache_utils

    original = kv_cache_utils.generate_block_hash_extra_keys
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def extra_keys(request: Any, start: int, end: int, multimodal: int) -> tuple[tuple[Any, ...] | None, int]:
        keys, multimodal = original(request, start, end, multimodal)
        theta_prompt = theta_prompt_of(request.sampling_params)
        if theta_prompt is None:
            return keys, multimodal
        prompt, shift = request.num_prompt_tokens, teacher_shift_of(request.sampling_params)
        further = ("optimal_sampling", prompt, shift, *theta_prompt) if start == 0 else ()
        if end > shared_end(prompt, shift or prompt - len(theta_prompt), end - start):
            further += (request.request_id,)
        return (*(keys or ()), *further) or None, multimodal

    setattr(kv_cache_utils, original.__name__, extra_keys)
