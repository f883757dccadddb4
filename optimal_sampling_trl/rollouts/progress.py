"""A bar over rollouts: their number and that of their tokens, tokens/s, the mean of α so far, and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from .rollout import Rollout

EVERY = 0.25
"""Seconds between two looks at a batch in progress, each of which waits for the device."""


def is_watched() -> bool:
    """Tell whether somebody looks at the bars of this process: in a terminal, or in a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return sys.stderr.isatty() or hasattr(shell, "kernel")


class Progress:
    """A tqdm bar of rollouts.

    Args:
        total: number of rollouts at the end.
        shown: False is quiet: nothing is printed, counted or waited for.
        done: number of rollouts before the start.
    """

    def __init__(self, total: int, shown: bool = True, done: int = 0) -> None:
        self.shown, self.done, self.tokens, self.alpha = shown, done, 0, 0.0
        self._start = self._looked = time.monotonic()
        self._bar = tqdm(total=total, initial=done, desc="Rollouts", unit=" rollouts", disable=not shown)

    @property
    def due(self) -> bool:
        """True when it is time for another `peek`."""
        return self.shown and time.monotonic() - self._looked > EVERY

    def peek(self, rollouts: int, tokens: int, alpha: float) -> None:
        """Show a batch in progress: rollouts that ended, tokens drawn and the sum of α over them."""
        self._show(self.done + rollouts, self.tokens + tokens, self.alpha + alpha)

    def add(self, rollouts: Iterable[Rollout]) -> None:
        """Count finished rollouts."""
        if self.shown:
            for rollout in rollouts:
                self.done += 1
                self.tokens += len(rollout.completion_ids)
                self.alpha += float(rollout.alpha.sum())
            self._show(self.done, self.tokens, self.alpha)

    def _show(self, rollouts: int, tokens: int, alpha: float) -> None:
        self._looked = time.monotonic()
        rate = tokens / max(self._looked - self._start, 1e-9)
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
        mean = alpha / max(tokens, 1)
        self._bar.set_postfix_str(f"{tokens:,} tokens, {shown} tokens/s, mean α {mean:.3f}", refresh=False)
        self._bar.n = rollouts
        self._bar.refresh()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
