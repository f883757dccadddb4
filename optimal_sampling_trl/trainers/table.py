"""TRL's table of completions, completed: the advantage that is trained on, who sampled a row, and its mean α.

TRL fills the column `advantage` before the loss's advantages are known, and has a place for further columns. The table
is printed, written and sent to Weights & Biases and Trackio where `log_completions` is set.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from jaxtyping import Bool, Float
from torch import Tensor

from .records import Turns

SAMPLED_BY = "mixture/sampled_by"
"""Column that says 'student' or 'mixture'."""
ALPHA = "mixture/alpha"
"""Column of the mean α over a completion's tokens."""


def complete_table(
    logs: dict[str, Any], advantages: Float[Tensor, " B *T"], mask: Bool[Tensor, "B T"], turns: Turns
) -> list[float]:
    """Correct the last batch's rows in TRL's table, in all processes together.

    Args:
        logs: TRL's columns, whose last rows are those of the batch.
        advantages: what the loss multiplies each completion with, or each of its tokens; in RAFT their weights.
        mask: True on the tokens that are trained on.
        turns: of this process's B completions.

    Returns:
        the advantages of this process's completions.
    """
    means = mean_advantages(advantages, mask).tolist()
    alphas = [torch.cat([rollout.alpha for rollout in of_row]) for of_row in turns]
    columns = (
        means,
        ["student" if of_row[0].mixture.is_theta_only else "mixture" for of_row in turns],
        [float(alpha.mean()) if len(alpha) else None for alpha in alphas],
    )
    trained, sampled_by, alpha = (gather_object(column) for column in columns)
    _replace_last(logs["advantages"], trained)
    logs["extra"][SAMPLED_BY].extend(sampled_by)
    logs["extra"][ALPHA].extend(alpha)
    return means


def mean_advantages(advantages: Float[Tensor, " B *T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Average advantages over the tokens of each completion; 0 where none of them is trained on."""
    counts = mask.sum(1)
    if advantages.ndim == 1:
        return advantages.masked_fill(counts == 0, 0.0)
    return (advantages * mask).sum(1) / counts.clamp(min=1)


def _replace_last(column: deque[Any], values: Sequence[Any]) -> None:
    """Put `values` where the last values of a column stand, as many of them."""
    for _ in range(min(len(values), len(column))):
        column.pop()
    column.extend(values)
