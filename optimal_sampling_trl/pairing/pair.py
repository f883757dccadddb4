"""A teacher and a student as a pair: the token ids, vocabulary, context and endings that both share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..options import check_flag
from .ending import Ending, end_of_sequence, special_tokens
from .prompts import template_digest
from .source import MODEL_OPTIONS, Source

STUDENT = "student"
"""The teacher's name where it is the student itself."""
STATE_LAYERS = {"linear_attention", "conv"}
"""Kinds of layers that keep a state of what they read, as `layer_types` calls them. Mamba layers are of the first."""


@dataclass(frozen=True)
class Pair:
    """A teacher and a student as an engine serves them, worked out by `read_pair` before it starts.

    Args:
        teacher: the teacher's folder or name; empty for a loaded model without one.
        theta: the student's, likewise.
        tokenizer: the tokenizer of both.
        vocabulary: the number of tokens that both models score.
        engine_vocabulary: the number that the teacher scores: vLLM's token ids end there.
        context: most tokens, prompt and completion together, that both can read in this engine.
        ending: where completions end.
        two_prompts: whether this engine takes another prompt for the student than for the teacher.
        windows: lengths of the two models' sliding windows, in tokens; empty where neither has one.
        has_states: whether a model has layers that keep a state of what they read, such as linear attention.
        shares_caches: whether some layers read the cache of another layer.
        teacher_template: `template_digest` of the teacher's own tokenizer; None where it has no chat template.
        teacher_tokenizer: the teacher's own, which reads the prompts that the teacher alone is given.
        one_model: whether the teacher is the student itself: one set of weights, which a reload replaces for both.
        configurations: `Source.settings` of `"teacher"` and `"theta"`; empty where a server holds the models.
    """

    teacher: str
    theta: str
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    engine_vocabulary: int
    context: int
    ending: Ending
    two_prompts: bool = True
    teacher_template: str | None = None
    windows: tuple[int, ...] = ()
    has_states: bool = False
    shares_caches: bool = False
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    one_model: bool = False
    configurations: dict[str, dict[str, Any]] = field(default_factory=dict, compare=False)

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """The tokens that a completion's text leaves out, by their ids."""
        return special_tokens(self.tokenizer)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of a completion's tokens, without the special ones."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def check_stop_texts(self, stop: Sequence[str], ignore_eos: bool, index: int) -> None:
        """Refuse a stop text that no completion's text can hold, by which nothing would ever end.

        Args:
            stop: the texts.
            ignore_eos: whether completions go on after their end tokens, of which a text may otherwise name one.
            index: the request's number, for the error.

        Raises:
            ValueError: naming the text and the token.
        """
        ends = () if ignore_eos else self.ending.stop
        for text in stop:
            for id, token in self.special_tokens.items():
                if token in text and id not in ends:
                    raise ValueError(
                        f"Request {index} has the stop text {text!r}, and {token!r} is a special token, which is left "
                        "out of a completion's text; wanted a text without one. To end at the token, add its id, "
                        f"{id}, to `eos_token_id` in the student's generation config (`generation_config.json`); else "
                        "drop the text."
                    )


def is_student(teacher: Any) -> bool:
    """Tell whether a teacher is named as the student itself.

    Raises:
        ValueError: where a folder has that name.
    """
    if not (isinstance(teacher, str) and teacher == STUDENT):
        return False
    if os.path.isdir(STUDENT):
        raise ValueError(
            "The teacher is 'student', the student itself, and there is a folder of that name. Write './student' for "
            "the folder, or rename it."
        )
    return True


def name_sources(
    teacher: str | PreTrainedModel | Source, theta: str | PreTrainedModel | Source, arguments: Mapping[str, Any]
) -> tuple[Source, Source]:
    """Return the sources of both models, loaded as an engine's arguments say; `revision` is the teacher's alone.

    A teacher that is the student has the student's source, the same object.

    Raises:
        ValueError: on a `revision` for such a teacher, and on a `trust_remote_code` that is neither True nor False.
    """
    if arguments.get("trust_remote_code") is not None:
        check_flag("The engine", "trust_remote_code", arguments["trust_remote_code"])
    options = {name: arguments[name] for name in MODEL_OPTIONS if name in arguments}
    shared = {name: value for name, value in options.items() if name != "revision"}
    overrides = arguments.get("hf_overrides")
    further = {
        "token": arguments.get("hf_token"),
        "overrides": overrides if isinstance(overrides, Mapping) else {},
    }
    of_theta = Source.of(theta, "student", shared, **further)
    if is_student(teacher):
        if arguments.get("revision") is not None:
            raise ValueError(
                f"`revision` is {arguments['revision']!r}, which is the teacher's, and the teacher is the student "
                "itself. Drop it, and pass a student of another revision as a folder."
            )
        return of_theta, of_theta
    return Source.of(teacher, "teacher", options, **further), of_theta


def read_pair(
    teacher: Source,
    theta: Source,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    theta_settings: GenerationConfig | None = None,
    max_model_len: int | None = None,
    two_prompts: bool = True,
) -> Pair:
    """Work out what both models share, and refuse two that cannot be mixed.

    Args:
        teacher: the teacher's source.
        theta: the student's source.
        tokenizer: the pair's; by default the student's.
        teacher_tokenizer: the teacher's, which must have the same tokens; by default the one beside its files, or the
            pair's where the teacher is the student.
        theta_settings: generation settings of the student in memory, where `theta` names the files of a copy; by
            default those of `theta`.
        max_model_len: most tokens that the engine reads, no more than both models can; by default as many.
        two_prompts: see `Pair`.

    Raises:
        ValueError: where a model or a tokenizer cannot be loaded, or the two differ in their tokens.
    """
    tokenizer = theta.tokenizer() if tokenizer is None else tokenizer
    one_model = teacher is theta
    if teacher_tokenizer is None:
        teacher_tokenizer = tokenizer if one_model else teacher.tokenizer()
    of_theta = theta.generation_config() if theta_settings is None else theta_settings
    check_same_tokens(teacher_tokenizer, tokenizer)
    vocabulary = check_vocabulary(teacher.text_config, theta.text_config, tokenizer)
    return Pair(
        teacher=teacher.name,
        theta=theta.name,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        engine_vocabulary=teacher.text_config.vocab_size,
        context=max_model_len or context_length(teacher.text_config, theta.text_config),
        ending=end_of_sequence(
            of_theta if one_model else teacher.generation_config(),
            of_theta,
            tokenizer.eos_token_id,
            teacher_tokenizer.eos_token_id,
            vocabulary,
        ),
        two_prompts=two_prompts,
        teacher_template=template_digest(teacher_tokenizer),
        windows=tuple(
            sorted({window for window in map(attention_window, (teacher.text_config, theta.text_config)) if window})
        ),
        has_states=any(map(has_states, (teacher.text_config, theta.text_config))),
        shares_caches=any(map(shares_caches, (teacher.text_config, theta.text_config))),
        teacher_tokenizer=teacher_tokenizer,
        one_model=one_model,
        configurations={"teacher": teacher.settings(), "theta": theta.settings()},
    )


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
    """Return the number of tokens that both models score: the smaller of the two padded vocabularies.

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


def context_length(*configs: PreTrainedConfig) -> int:
    """Return the most tokens, prompt and completion together, that all the models can read.

    A model with LongRoPE is read to its original context: beyond it transformers turns all keys by other angles, those
    that were cached before too, and vLLM takes the other angles for short texts as well.
    """
    return min(map(_context_length, configs))


def _context_length(config: PreTrainedConfig) -> int:
    lengths = [getattr(config, "max_position_embeddings", None) or 2**31]
    if "longrope" in (ropes := rope_kinds(config)):
        lengths.append(
            ropes["longrope"].get("original_max_position_embeddings") or config.original_max_position_embeddings
        )
    return min(lengths)


def rope_kinds(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Return a model's settings of rotary embeddings by transformers' name of their kind; layers may differ."""
    found = getattr(config, "rope_parameters", None) or {}
    layers = [found] if "rope_type" in found else [each for each in found.values() if isinstance(each, dict)]
    return {str(each.get("rope_type")): each for each in layers}


def shares_caches(config: PreTrainedConfig) -> bool:
    """Return True for a model in which some layers read the keys and values of an earlier one."""
    return bool(getattr(config, "num_kv_shared_layers", 0))


def attention_window(config: PreTrainedConfig) -> int | None:
    """Return the length of the sliding window, a token's own place included; None where no layer has one."""
    kinds = getattr(config, "layer_types", None)
    if not getattr(config, "use_sliding_window", True) or (kinds and "sliding_attention" not in kinds):
        return None
    return getattr(config, "sliding_window", None) or None


def has_states(config: PreTrainedConfig) -> bool:
    """Return True for a model with layers that keep a state: linear attention, or short convolutions."""
    return not STATE_LAYERS.isdisjoint(getattr(config, "layer_types", None) or ())
