"""The prompt of a later turn, which knows the row of its completion.

TRL's loop of tools samples the completions of a batch that called one, and tells an engine their token ids alone: the
sum of a row's prompt, its completion so far, and what the tools returned. Two rows of a group may have the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any


class TurnPrompt(list[int]):
    """Token ids that the student reads before a turn of a completion. Its sum with a list is one of the same row.

    Args:
        ids: the row's prompt and all that followed.
        row: number of the row in this process's batch.
    """

    def __init__(self, ids: Iterable[int], row: int) -> None:
        super().__init__(ids)
        self.row = row

    def __add__(self, more: list[Any]) -> TurnPrompt:  # type: ignore[override]
        return TurnPrompt(super().__add__(more), self.row)


def rows_of(prompts: Sequence[list[int]]) -> list[int]:
    """The row of each prompt of a call: its own, or its place among them where it begins a batch."""
    return [prompt.row if isinstance(prompt, TurnPrompt) else place for place, prompt in enumerate(prompts)]


class Context:
    """Answers the question of TRL's loop of tools how much a colocated `vllm.LLM` reads.

    Args:
        limit: tells it, and is asked anew each time.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit

    @property
    def llm_engine(self) -> Context:
        """Itself, on TRL's way to the number."""
        return self

    model_config = llm_engine

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its completion."""
        return self._limit()
