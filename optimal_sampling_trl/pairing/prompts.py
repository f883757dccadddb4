"""A prompt as the token ids that one model of the pair reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..options import MAX_MODEL_LEN, check_choice, shown
from ..user_warnings import warn_user

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
"""A text, token ids, or chat messages."""
SYSTEM_MESSAGE = ("refuse", "replace", "append")
"""Ways to treat the system message of a prompt that a system prompt is put before."""
SYSTEM_ROLES = ("system", "developer")
SYSTEM_PROMPTS = {"teacher": "teacher_system_prompt", "student": "theta_system_prompt"}
"""The setting of each model's system prompt."""
TEACHER_PROMPT = "teacher_prompt"
"""The column of a data set with what the teacher reads in place of the row's `prompt`."""
_PROBE = ({"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"})


def check_system_prompts(owner: Any) -> None:
    """Refuse a system prompt that is no text, and a `system_message` that is none of `SYSTEM_MESSAGE`.

    Args:
        owner: has them as attributes.

    Raises:
        ValueError: naming the setting.
    """
    for name in SYSTEM_PROMPTS.values():
        if not isinstance(text := getattr(owner, name), str | None):
            raise ValueError(f"`{name}` is {shown(text)}; wanted a text, or None for no system prompt. Pass one.")
    check_choice("system_message", owner.system_message, SYSTEM_MESSAGE)


def is_chat(prompt: Any) -> bool:
    """Tell whether a prompt is chat messages: at least one, and nothing else. A text and token ids are none."""
    sequence = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    return sequence and len(prompt) > 0 and all(isinstance(item, dict) for item in prompt)


def check_prompt(prompt_ids: Sequence[int], context: int, vocabulary: int, index: int | str, role: str) -> None:
    """Refuse a prompt that a model cannot read.

    Args:
        prompt_ids: what the model is to read.
        context: most tokens, prompt and completion together.
        vocabulary: number of tokens that both models score.
        index: the prompt's number, or the words for where it stands.
        role: of the model.

    Raises:
        ValueError: on an empty prompt, one that leaves no room for a token, or an id that is no token.
    """
    name = f"The {role}'s prompt {index}"
    if not len(prompt_ids):
        raise ValueError(f"{name} is empty; wanted at least one token. Drop it or start it with a token of its own.")
    if len(prompt_ids) >= context:
        raise ValueError(
            f"{name} has {len(prompt_ids)} tokens, but the context holds {context}, of which one must be "
            f"left to generate. Shorten the prompt, raise {MAX_MODEL_LEN} where it was set, or pass models with a "
            "longer context."
        )
    low, high = min(prompt_ids), max(prompt_ids)
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{name} holds token {low if low < 0 else high}; wanted ids from 0 to {vocabulary - 1}. "
            "Was it made with the tokenizer of this pair?"
        )


def encode(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str | None,
    chat: bool,
    index: int,
    *,
    system_message: str = "refuse",
    role: str = "student",
    name: str = "Prompt",
) -> list[int]:
    """Return the token ids of one prompt for one model.

    Args:
        prompt: a text, token ids, or chat messages; messages go through the chat template always.
        tokenizer: the pair's.
        system_prompt: put before the prompt: as the system message of a chat, else as a text with an empty line.
        chat: send a text through the chat template, as the message of a user.
        index: the prompt's number, for errors.
        system_message: see `with_system_prompt`.
        role: of the model, for errors.
        name: what errors call the prompt.

    Raises:
        ValueError: on what is no prompt, or a system prompt that has no place.
    """
    name = f"{name} {index}"
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"{name} is an empty text; wanted at least one token. Drop it.")
        if not chat:
            return list(tokenizer(with_system_prompt(prompt, system_prompt))["input_ids"])
        prompt = [{"role": "user", "content": prompt}]
    if is_chat(prompt):
        try:
            messages = with_system_prompt(list(prompt), system_prompt, system_message)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return _encode_chat(messages, tokenizer, name, SYSTEM_PROMPTS[role] if system_prompt else None)
    try:
        if isinstance(prompt, bytes | bytearray | memoryview):
            raise TypeError("bytes are no token ids, though their items are numbers")
        ids = [_token(item) for item in prompt]
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"{name} is {str(prompt)[:80]!r} ({type(prompt).__name__}); "
            "wanted a text, a list of token ids or a list of chat messages. Wrap a single prompt in a list."
        ) from error
    if not ids:
        raise ValueError(f"{name} holds no token; wanted at least one. Drop it.")
    if system_prompt:
        raise ValueError(
            f"{name} is given as token ids, before which the system prompt {system_prompt[:40]!r} cannot be "
            "put. Pass the text or the messages, or put the system prompt's tokens into the ids."
        )
    return ids


def _token(item: Any) -> int:
    """Return a token id; refuse True and False, which Python and torch take for 1 and 0."""
    if isinstance(item, bool) or getattr(item, "dtype", None) is torch.bool:
        raise TypeError("a truth value is no token id")
    return item.__index__()  # type: ignore[no-any-return]


def reads_two_prompts(teacher_system_prompt: str | None, theta_system_prompt: str | None) -> bool:
    """Tell whether these system prompts give the two models different prompts; an empty one is none."""
    return (teacher_system_prompt or None) != (theta_system_prompt or None)


def with_system_prompt(prompt: Any, system_prompt: str | None, system_message: str = "refuse") -> Any:
    """Put a system prompt before a text, with an empty line between, or before chat messages as a message.

    Args:
        prompt: a text or chat messages; they stay as they are.
        system_prompt: what is put before it; nothing where it is None or empty.
        system_message: what is done where the messages have a system message: `"refuse"` it, `"replace"` it by the
            system prompt, or `"append"` the system prompt to it.

    Raises:
        ValueError: where the messages have a system message that is to be refused.
    """
    if not system_prompt:
        return prompt
    if isinstance(prompt, str):
        return f"{system_prompt}\n\n{prompt}"
    first, *rest = prompt
    if first.get("role") not in SYSTEM_ROLES:
        return [{"role": "system", "content": system_prompt}, *prompt]
    content = first.get("content")
    if system_message == "replace":
        return [{**first, "content": system_prompt}, *rest]
    if system_message == "append":
        parts = isinstance(content, list)
        both = [*content, {"type": "text", "text": system_prompt}] if parts else f"{content}\n\n{system_prompt}"
        return [{**first, "content": both}, *rest]
    raise ValueError(
        f"A prompt begins with the system message {str(content)[:40]!r}, and a system prompt was given as well "
        f"({system_prompt[:40]!r}). Keep one of the two, or set `system_message` to 'replace' or 'append'."
    )


def _encode_chat(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, name: str, setting: str | None
) -> list[int]:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{name} needs a chat template, and the tokenizer {tokenizer.name_or_path!r} has none. "
            "Pass plain texts, or set `tokenizer.chat_template` and save it with the model."
        )
    try:
        ids = render(messages, tokenizer)
        bare = render(messages[1:], tokenizer) if setting is not None and len(messages) > 1 else None
    except (TemplateError, TypeError) as error:
        raise template_refusal(error, messages, tokenizer, name, setting) from error
    if ids == bare:
        raise ignored_refusal(setting, str(messages[0]["content"]), name[0].lower() + name[1:])
    return ids


def render(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
    """Return the token ids of a chat that an answer is to follow; `options` go to its template."""
    encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **options)
    return list(encoded["input_ids"])


def ignored_refusal(setting: str | None, system_prompt: str, where: str) -> ValueError:
    """Make the error for a chat template that drops system messages without a word."""
    return ValueError(
        f"`{setting}` is {system_prompt[:40]!r}, and the chat template leaves out system messages: {where} reads the "
        "same without it. Put the text into the user's message, or pass a tokenizer whose `chat_template` takes one."
    )


def template_refusal(
    error: Exception, messages: Sequence[Any], tokenizer: PreTrainedTokenizerBase, where: str, setting: str | None
) -> ValueError:
    """Make the error for messages that a chat template cannot render.

    Args:
        error: what the template raised.
        messages: the chat.
        tokenizer: with the template.
        where: the words for the prompt.
        setting: the name of the system prompt that was put before the chat; None where there was none.
    """
    roles = ", ".join(str(message.get("role")) for message in messages)
    cure = "Fix the row, or pass a tokenizer with another `chat_template`."
    if setting is not None:
        cure = (
            f"`{setting}` is put before a chat as a system message. Does the template take none? Then drop the "
            "setting and put its text into the user's message, or pass a tokenizer with another `chat_template`."
        )
    return ValueError(
        f"{where}: the chat template of {tokenizer.name_or_path!r} does not take messages of the roles {roles}: "
        f"{error}. {cure}"
    )


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return what is equal for chat templates that render a chat alike; None where there is no template."""
    if tokenizer.chat_template is None:
        return None
    try:
        text = tokenizer.apply_chat_template(list(_PROBE), tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError):  # an odd template: by its own text
        text = str(tokenizer.chat_template)
    return hashlib.sha256(str(text).encode()).hexdigest()[:16]


def warn_of_templates(teacher: str, teacher_template: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn where the teacher was trained on another chat template than the one that renders its prompts.

    Args:
        teacher: its name.
        teacher_template: `template_digest` of its own tokenizer.
        tokenizer: the one that renders the prompts.
    """
    both = {teacher_template, template_digest(tokenizer)}
    if None not in both and len(both) > 1:
        warn_user(
            f"The teacher {teacher!r} has another chat template than {tokenizer.name_or_path!r}, which "
            "renders the chats of both models: it may answer worse than it can. Pass texts that suit both, or a "
            "student with the teacher's template.",
        )
