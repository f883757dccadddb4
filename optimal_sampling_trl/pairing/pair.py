"""A teacher and a student as a pair: the token ids, vocabulary, context and endings that both share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..mixture import fold_eos
from .source import MODEL_OPTIONS, Source

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ending:
    """The end-of-sequence tokens of a pair.

    The student's end tokens stop a completion; the teacher's other ones count as the student's first.

    Args:
        stop: the student's end-of-sequence ids, its main one first; empty where it has none.
        folded: the teacher's ids that are none of the student's.
    """

    stop: tuple[int, ...]
    folded: tuple[int, ...]

    def fold(self, teacher_logits: Tensor) -> Tensor:
        """The teacher's raw logits (N, V) with the mass of its own endings counted for the student's."""
        return fold_eos(teacher_logits, self.folded, self.stop[0]) if self.stop else teacher_logits


@dataclass(frozen=True)
class Pair:
    """A teacher and a student as an engine serves them, worked out by `read_pair` before it starts.

    Args:
        teacher: the teacher's folder or name; empty for a loaded model without one.
        theta: the student's, likewise.
        tokenizer: of both.
        vocabulary: the number of tokens that both models score.
        engine_vocabulary: the number that the teacher scores: vLLM's token ids end there.
        context: most tokens, prompt and completion together, that both can read in this engine.
        ending: where completions end.
        two_prompts: whether this engine takes another prompt for the student than for the teacher.
    """

    teacher: str
    theta: str
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    engine_vocabulary: int
    context: int
    ending: Ending
    two_prompts: bool = True


def name_sources(
    teacher: str | PreTrainedModel | Source, theta: str | PreTrainedModel | Source, arguments: Mapping[str, Any]
) -> tuple[Source, Source]:
    """Both models of a pair, as an engine's arguments say how to load them; `revision` is the teacher's alone."""
    options = {name: arguments[name] for name in MODEL_OPTIONS if name in arguments}
    shared = {name: value for name, value in options.items() if name != "revision"}
    overrides = arguments.get("hf_overrides")
    further = {
        "token": arguments.get("hf_token"),
        "overrides": overrides if isinstance(overrides, Mapping) else {},
    }
    return Source.of(teacher, "teacher", options, **further), Source.of(theta, "student", shared, **further)


def read_pair(
    teacher: Source,
    theta: Source,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    max_model_len: int | None = None,
    two_prompts: bool = True,
) -> Pair:
    """Work out what both models share, and refuse two that cannot be mixed.

    Args:
        teacher: the teacher's source.
        theta: the student's source.
        tokenizer: the pair's; by default the student's.
        teacher_tokenizer: the teacher's, which must have the same tokens; by default the one beside its files.
        max_model_len: most tokens that the engine reads, no more than both models can; by default as many.
        two_prompts: see `Pair`.

    Raises:
        ValueError: where a model or a tokenizer cannot be loaded, or the two differ in their tokens.
    """
    tokenizer = theta.tokenizer() if tokenizer is None else tokenizer
    check_same_tokens(teacher.tokenizer() if teacher_tokenizer is None else teacher_tokenizer, tokenizer)
    return Pair(
        teacher=teacher.name,
        theta=theta.name,
        tokenizer=tokenizer,
        vocabulary=check_vocabulary(teacher.config, theta.config, tokenizer),
        engine_vocabulary=teacher.config.vocab_size,
        context=max_model_len or context_length(teacher.config, theta.config),
        ending=end_of_sequence(teacher.generation_config(), theta.generation_config(), tokenizer.eos_token_id),
        two_prompts=two_prompts,
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
    """The end of the pair's completions: the student's tokens (`tokenizer_eos` first, which TRL trains it on)."""

    def ids(config: GenerationConfig | PreTrainedConfig) -> list[int]:
        eos = config.eos_token_id
        return [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]

    of_theta = [] if tokenizer_eos is None else [tokenizer_eos]
    stop = tuple(dict.fromkeys([*of_theta, *ids(theta)]))
    return Ending(stop, tuple(index for index in dict.fromkeys(ids(teacher)) if index not in stop))


def context_length(*configs: PreTrainedConfig) -> int:
    """Most tokens, prompt and completion together, that all the models can read."""
    return min(getattr(config, "max_position_embeddings", None) or 2**31 for config in configs)
