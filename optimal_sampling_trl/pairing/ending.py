"""The end of a completion: read here, and nowhere else, for both backends, the server and the trainers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ..mixture import fold_eos

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
        """Return the teacher's raw logits (N, V) with the mass of its own endings counted for the student's."""
        return fold_eos(teacher_logits, self.folded, self.stop[0]) if self.stop else teacher_logits


def stop_tokens(
    settings: GenerationConfig | PreTrainedConfig, tokenizer_eos: int | None, vocabulary: int | None = None
) -> tuple[int, ...]:
    """Return the tokens at which one model ends a completion, its tokenizer's first, as TRL has it in `eos_token_ids`.

    Args:
        settings: the model's generation settings, or its configuration where it has none.
        tokenizer_eos: the end-of-sequence id of its tokenizer.
        vocabulary: the number of tokens that both models score; ids beyond it, which are never drawn, are left out.
    """
    eos = settings.eos_token_id
    named = [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]
    ids = [*([] if tokenizer_eos is None else [tokenizer_eos]), *named]
    return tuple(id for id in dict.fromkeys(ids) if id >= 0 and (vocabulary is None or id < vocabulary))


def end_of_sequence(
    teacher: GenerationConfig | PreTrainedConfig,
    theta: GenerationConfig | PreTrainedConfig,
    tokenizer_eos: int | None,
    teacher_eos: int | None = None,
    vocabulary: int | None = None,
) -> Ending:
    """Find the tokens that end a completion of the pair: the student's.

    Args:
        teacher: the teacher's generation settings, or its configuration where it has none.
        theta: likewise of the student.
        tokenizer_eos: the end-of-sequence id of the tokenizer that the pair is used with, which TRL trains it on.
        teacher_eos: that of the teacher's own tokenizer, which a fine-tuning may have named there alone.
        vocabulary: see `stop_tokens`.
    """
    stop = stop_tokens(theta, tokenizer_eos, vocabulary)
    of_teacher = stop_tokens(teacher, teacher_eos, vocabulary)
    return Ending(stop, tuple(id for id in of_teacher if id not in stop))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokens that a completion's text leaves out, by their ids."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return named | {id: str(token) for id, token in tokenizer.added_tokens_decoder.items() if token.special}
