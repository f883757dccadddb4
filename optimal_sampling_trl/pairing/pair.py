"""What a teacher and a student share: token ids, vocabulary, context, and the tokens that end a completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ..mixture import fold_eos

if TYPE_CHECKING:
    from torch import Tensor


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


def context_length(*configs: PreTrainedConfig) -> int:
    """Most tokens, prompt and completion together, that all the models can read."""
    return min(getattr(config, "max_position_embeddings", None) or 2**31 for config in configs)
