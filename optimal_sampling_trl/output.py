"""The output of the front door: texts, ids, α, and a page of every token."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .options import shown
from .page import write_page
from .rollouts.rollout import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_IN_A_CELL = 200
"""Rollouts that a notebook's cell holds, whose page is saved with the notebook."""
FRAME = '<iframe srcdoc="{page}" sandbox="allow-scripts" style="width: 100%; height: 36em; border: 0"></iframe>'


@dataclass(frozen=True, repr=False)
class OptimalSamplingOutput:
    """The result of `OptimalSamplingV1.generate`: an entry for each sequence, the n of a prompt side by side.

    A notebook shows it as a page of the rollouts.

    Args:
        generated_texts: the completions without special tokens.
        generated_ids: their token ids, an end-of-sequence token included.
        num_tokens: how many tokens each has.
        alpha_stats: mean, std, min, max, count and history (a list of `count` numbers) of α over all tokens in order
            of the sequences; None where α is not tracked.
        rollouts: the sequences with all their records.
        tokenizer: the pair's, which the page needs.

    Example:
        ```python
        with OptimalSamplingV1(model_teacher="large", model_theta="small") as sampler:
            output = sampler.generate(["3 + 4 =", "1 + 1 ="], n=2, max_tokens=8)
        assert len(output.generated_texts) == 4 and output.alpha_stats["count"] == sum(output.num_tokens)
        output.to_html("output/rollouts.html", rewards=[1, 0, 0, 1])
        ```
    """

    generated_texts: list[str]
    generated_ids: list[list[int]]
    num_tokens: list[int]
    alpha_stats: dict[str, Any] | None
    rollouts: list[Rollout]
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls, rollouts: list[Rollout], tokenizer: PreTrainedTokenizerBase, track_alpha_stats: bool = True
    ) -> OptimalSamplingOutput:
        """Make the output of rollouts."""
        return cls(
            generated_texts=[rollout.text for rollout in rollouts],
            generated_ids=[rollout.completion_ids for rollout in rollouts],
            num_tokens=[len(rollout.completion_ids) for rollout in rollouts],
            alpha_stats=_alpha_stats(rollouts) if track_alpha_stats else None,
            rollouts=rollouts,
            tokenizer=tokenizer,
        )

    def to_html(
        self,
        path: str | os.PathLike[str],
        rewards: Iterable[float | None] | None = None,
        title: str = "Rollouts",
    ) -> Path:
        """Write the rollouts as one HTML file, every token with its records; see `page.write_page`.

        Args:
            path: the file to write.
            rewards: one for each rollout.
            title: heading of the page.

        Returns:
            the path.

        Raises:
            ValueError: on no rollouts, on rewards of another number, and on an output without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                "This output has no `tokenizer`; wanted the pair's, which turns ids into text. "
                "Call `page.write_page` with one."
            )
        return write_page(path, self.rollouts, self.tokenizer, rewards=rewards, title=title)

    def __repr__(self) -> str:
        stats = self.alpha_stats
        alpha = "" if stats is None else f", α {stats['mean']:.3f} ({stats['min']:.3f} to {stats['max']:.3f})"
        first = f", first {shown(self.generated_texts[0][:60])}" if self.rollouts else ""
        return f"OptimalSamplingOutput({len(self.rollouts)} rollouts, {sum(self.num_tokens)} tokens{alpha}{first})"

    def _repr_html_(self) -> str | None:
        """Return the page in a frame; None where there is nothing to show, for which a notebook prints the text."""
        if self.tokenizer is None or not self.rollouts:
            return None
        first, count = self.rollouts[:MOST_IN_A_CELL], len(self.rollouts)
        title = "Rollouts" if len(first) == count else f"The first {len(first)} of {count} rollouts"
        with tempfile.TemporaryDirectory() as folder:
            page = write_page(Path(folder) / "page.html", first, self.tokenizer, title=title).read_text("utf-8")
        return FRAME.format(page=html.escape(page))


def _alpha_stats(rollouts: list[Rollout]) -> dict[str, Any]:
    alpha = torch.cat([rollout.alpha for rollout in rollouts]).double()
    return {
        "mean": float(alpha.mean()),
        "std": float(alpha.std(correction=0)),
        "min": float(alpha.min()),
        "max": float(alpha.max()),
        "count": len(alpha),
        "history": alpha.tolist(),
    }
