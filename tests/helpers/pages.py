"""Rollouts of readable text, for the tests of the page, and the contrast of its colours."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.rollouts.rollout import Rollout

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!--"
CORPUS = ["We add 24 and 48.\nThe answer is 72.", "What is 24 + 48?", "Be brief."]


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that the emoji and the kanji of a test take several tokens each."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def text_rollout(text: str, alpha: float | list[float] = 0.5, **changes: Any) -> Rollout:
    """A rollout of `text`, all of its tokens with the same α or with the α of a list, log θ = -2, log t = -1."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    prompt = tokenizer.encode("What is 24 + 48?")
    weights = torch.tensor(alpha) if isinstance(alpha, list) else torch.full((len(ids),), alpha)
    fields: dict[str, Any] = {
        "prompt_ids": prompt,
        "theta_prompt_ids": prompt,
        "completion_ids": ids,
        "alpha": weights,
        "log_q": torch.full((len(ids),), -1.5),
        "log_theta": torch.full((len(ids),), -2.0),
        "log_teacher": torch.full((len(ids),), -1.0),
        "text": text,
        "finish_reason": "stop",
        "mixture": Mixture(),
        "temperature": 1.0,
    }
    return Rollout(**{**fields, **changes})


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two opaque colours `rgb(r, g, b)`."""
    dark, light = sorted([_luminance(one), _luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    """WCAG 2 relative luminance of `rgb(r, g, b)`."""
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
