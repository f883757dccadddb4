"""The end of a completion, marked for TRL.

TRL takes a completion for cut short unless its last token is one of `eos_token_ids`: in `completions/clipped_ratio`
and in `mask_truncated_completions`. A completion that ended at a stop text may have any token there, but its rollout
says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from ...rollouts.rollout import Rollout


class LastToken(int):
    """The last token id of a completion that ended. It is an int in all respects."""


class _AnyLastToken:
    """Equals each `LastToken` and nothing else: an entry of `eos_token_ids` for whatever a completion ended with."""

    def __eq__(self, token: object) -> bool:
        return isinstance(token, LastToken)

    __hash__ = object.__hash__


def mark_endings(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """The token ids of completions; the last id of each that ended is a `LastToken`."""
    return [
        [*rollout.completion_ids[:-1], LastToken(rollout.completion_ids[-1])]
        if rollout.finish_reason == "stop"
        else rollout.completion_ids
        for rollout in rollouts
    ]


@contextmanager
def endings_known(trainer: Any) -> Iterator[None]:
    """Let TRL's trainer see inside the block which completions of `mark_endings` ended."""
    with patch.object(trainer, "eos_token_ids", [*trainer.eos_token_ids, _AnyLastToken()]):
        yield
