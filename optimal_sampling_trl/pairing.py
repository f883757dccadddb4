"""What a teacher and a student must share to be mixed, and the prompts of a pair: the refusals that need no engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from .mixture import fold_eos

if TYPE_CHECKING:
    from torch import Tensor

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
"""A text, token ids, or chat messages."""


@dataclass(frozen=True)
class Ending:
    """The end-of-sequence tokens of a pair: the student's rule, and the teacher's other ones are folded into them.

    Args:
        stop: the student's end-of-sequence ids, its main one first; empty where it has none.
        folded: the teacher's ids that are none of the student's.
    """

    stop: tuple[int, ...]
    folded: tuple[int, ...]

    def fold(self, teacher_logits: Tensor) -> Tensor:
        """The teacher's raw logits (N, V) with the mass of its own endings counted for the student's."""
        return fold_eos(teacher_logits, self.folded, self.stop[0]) if self.stop else teacher_logits


def load_config(model: str, role: str, **kwargs: Any) -> PreTrainedConfig:
    """The configuration of a model on disk or on the Hub.

    Raises:
        ValueError: where there is none, or where the model is no decoder that reads text alone.
    """
    try:
        config = AutoConfig.from_pretrained(model, **kwargs)
    except (OSError, ValueError) as error:
        where = "The folder does not exist" if not Path(model).exists() else "The folder holds no model"
        raise ValueError(
            f"The {role} could not be loaded from {str(model)!r}: {where} or is no model that transformers knows, and "
            f"no model of that name was found on the Hub. Pass a folder with a config.json or a model id. ({error})"
        ) from error
    check_decoder(config, role)
    return config


def check_weights(model: str, role: str) -> None:
    """Refuse a folder whose weights are cut short or not all there, by the files' headers, before an engine starts.

    A model id is left to the Hub's client, which checks what it downloads.

    Raises:
        ValueError: naming the model and the file.
    """
    folder = Path(model)
    if not folder.is_dir():
        return
    wanted: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        try:
            wanted |= set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError) as error:
            raise _broken(model, role, index, error) from error
    for path in sorted({*folder.glob("*.safetensors"), *(folder / name for name in wanted)}):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise _broken(model, role, path, error) from error


def _broken(model: str, role: str, path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"The {role} {model!r} cannot be loaded: {path.name} is missing or was cut short ({error}). Wanted a whole "
        "checkpoint: copy or save it again, or pass an earlier one."
    )


def check_decoder(config: PreTrainedConfig, role: str) -> None:
    """Refuse what is no decoder-only language model.

    Raises:
        ValueError: naming the model and its architecture.
    """
    kind = None
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder"
    elif any(getattr(config, part, None) is not None for part in ("vision_config", "audio_config")):
        kind = "a multimodal model"
    elif getattr(config, "vocab_size", None) is None:  # Qwen2.5-Omni, Granite Speech: models inside of a model
        kind = "a multimodal model without a vocabulary of its own"
    if kind:
        raise ValueError(
            f"The {role} {config.name_or_path!r} ({', '.join(config.architectures or ['?'])}) is {kind}; "
            "wanted a decoder-only language model. Pass a text checkpoint of its family."
        )


def token_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What is equal for tokenizers with the same tokens under the same ids, added ones included."""
    tokens = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def load_tokenizer(model: str, role: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        ValueError: where there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(model, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The {role}'s tokenizer could not be loaded from {str(model)!r}. Save one there with "
            f"`tokenizer.save_pretrained`. ({error})"
        ) from error


def check_same_tokens(teacher: PreTrainedTokenizerBase, theta: PreTrainedTokenizerBase) -> None:
    """Refuse a pair whose token ids do not mean the same text, added tokens included.

    Raises:
        ValueError: naming the first id that differs.
    """
    tokens = [{index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in (teacher, theta)]
    for index in sorted(tokens[0].keys() | tokens[1].keys()):
        of_teacher, of_theta = (vocabulary.get(index) for vocabulary in tokens)
        if of_teacher != of_theta:
            raise ValueError(
                f"Teacher and student have different tokenizers: token {index} is {of_teacher!r} in the teacher's "
                f"({len(teacher)} tokens, {teacher.name_or_path!r}), {of_theta!r} in the student's "
                f"({len(theta)} tokens, {theta.name_or_path!r}). Their probabilities cannot be multiplied. "
                "Pass two models of one family."
            )


def check_vocabulary(teacher: PreTrainedConfig, theta: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens that both models score: the smaller of the two padded vocabularies.

    Raises:
        ValueError: where a model has no row for one of the tokenizer's tokens.
    """
    largest = max(tokenizer.get_vocab().values())
    for role, config in (("teacher", teacher), ("student", theta)):
        if config.vocab_size <= largest:
            raise ValueError(
                f"The {role} {config.name_or_path!r} scores {config.vocab_size} tokens, but the tokenizer's last has "
                f"id {largest}. Resize its embeddings (`model.resize_token_embeddings`) or pass its own tokenizer."
            )
    return min(teacher.vocab_size, theta.vocab_size)


def end_of_sequence(
    teacher: GenerationConfig | PreTrainedConfig, theta: GenerationConfig | PreTrainedConfig, tokenizer_eos: int | None
) -> Ending:
    """Where a completion of the pair ends: at the student's tokens (`tokenizer_eos` first, which TRL trains it on)."""

    def ids(config: GenerationConfig | PreTrainedConfig) -> list[int]:
        eos = config.eos_token_id
        return [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]

    of_theta = [] if tokenizer_eos is None else [tokenizer_eos]
    stop = tuple(dict.fromkeys([*of_theta, *ids(theta)]))
    return Ending(stop, tuple(index for index in dict.fromkeys(ids(teacher)) if index not in stop))


def load_generation_config(model: str, config: PreTrainedConfig, **kwargs: Any) -> GenerationConfig | PreTrainedConfig:
    """The generation settings beside a model, which may name more end-of-sequence tokens; else its configuration."""
    try:
        return GenerationConfig.from_pretrained(model, **kwargs)
    except OSError:
        return config


def context_length(*configs: PreTrainedConfig) -> int:
    """Most tokens, prompt and completion together, that all the models can read."""
    return min(getattr(config, "max_position_embeddings", None) or 2**31 for config in configs)


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
    if system_prompt is not None:
        raise ValueError(
            f"Prompt {index} is given as token ids, before which the system prompt {system_prompt[:40]!r} cannot be "
            "put. Pass the text or the messages, or put the system prompt's tokens into the ids."
        )
    return ids


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
