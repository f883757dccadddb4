"""A prompt as the token ids that one model of the pair reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
"""A text, token ids, or chat messages."""


def check_prompt(prompt_ids: Sequence[int], context: int, vocabulary: int, index: int, role: str) -> None:
    """Refuse a prompt that a model cannot read.

    Raises:
        ValueError: on an empty prompt, one that leaves no room for a token, or an id that is no token.
    """
    name = f"The {role}'s prompt {index}"
    if not len(prompt_ids):
        raise ValueError(f"{name} is empty; wanted at least one token. Drop it or start it with a token of its own.")
    if len(prompt_ids) >= context:
        raise ValueError(
            f"{name} has {len(prompt_ids)} tokens, but the context holds {context}, of which one must be "
            "left to generate. Shorten the prompt or pass models with a longer context."
        )
    low, high = min(prompt_ids), max(prompt_ids)
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{name} holds token {low if low < 0 else high}; wanted ids from 0 to {vocabulary - 1}. "
            "Was it made with the tokenizer of this pair?"
        )


def encode(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, chat: bool, index: int
) -> list[int]:
    """The token ids of one prompt for one model.

    Args:
        prompt: a text, token ids, or chat messages; messages go through the chat template always.
        tokenizer: the pair's.
        system_prompt: put before the prompt: as the system message of a chat, else as a text with an empty line.
        chat: send a text through the chat template, as the message of a user.
        index: the prompt's number, for errors.

    Raises:
        ValueError: on what is no prompt, or a system prompt that has no place.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"Prompt {index} is an empty text; wanted at least one token. Drop it.")
        if not chat:
            return list(tokenizer(with_system_prompt(prompt, system_prompt))["input_ids"])
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, Sequence) and len(prompt) and all(isinstance(item, dict) for item in prompt):
        return _encode_chat(with_system_prompt(list(prompt), system_prompt), tokenizer, index)
    try:
        ids = [item.__index__() for item in prompt]  # type: ignore[union-attr]
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"Prompt {index} is {str(prompt)[:80]!r} ({type(prompt).__name__}); "
            "wanted a text, a list of token ids or a list of chat messages. Wrap a single prompt in a list."
        ) from error
    if not ids:
        raise ValueError(f"Prompt {index} holds no token; wanted at least one. Drop it.")
    if system_prompt:
        raise ValueError(
            f"Prompt {index} is given as token ids, before which the system prompt {system_prompt[:40]!r} cannot be "
            "put. Pass the text or the messages, or put the system prompt's tokens into the ids."
        )
    return ids


def reads_two_prompts(teacher_system_prompt: str | None, theta_system_prompt: str | None) -> bool:
    """Tell whether these system prompts give the two models different prompts; an empty one is none."""
    return (teacher_system_prompt or None) != (theta_system_prompt or None)


def with_system_prompt(prompt: Any, system_prompt: str | None) -> Any:
    """A text or chat messages with a system prompt before them: as a message, or as a text with an empty line.

    Raises:
        ValueError: where the messages have a system prompt of their own.
    """
    if not system_prompt:
        return prompt
    if isinstance(prompt, str):
        return f"{system_prompt}\n\n{prompt}"
    if prompt[0].get("role") == "system":
        raise ValueError(
            f"A prompt begins with the system message {str(prompt[0].get('content'))[:40]!r}, and a system prompt was "
            f"given as well ({system_prompt[:40]!r}). Keep one of the two."
        )
    return [{"role": "system", "content": system_prompt}, *prompt]


def _encode_chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, index: int) -> list[int]:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"Prompt {index} needs a chat template, and the tokenizer {tokenizer.name_or_path!r} has none. "
            "Pass plain texts, or set `tokenizer.chat_template` and save it with the model."
        )
    encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])
