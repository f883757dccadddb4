"""TRL's divergence over the vocabulary: a weight for each position, and advice where TRL refuses a teacher."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import trl
from torch import Tensor

_MODULE = sys.modules[trl.DistillationTrainer.__module__]
_FUNCTION = "ChunkedDivergenceFunction"
"""Name in TRL's module under which its loss finds the divergence of each position."""


@contextmanager
def weighted_divergence(weights: Tensor, mask: Tensor) -> Iterator[None]:
    """Multiply the divergence of each position in TRL's loss by a weight inside the block.

    Args:
        weights: of the completions' tokens (B, T).
        mask: 1 on tokens (B, T), 0 on padding.
    """
    with patch.object(_MODULE, _FUNCTION, _WeightedDivergence(getattr(_MODULE, _FUNCTION), weights, mask)):
        yield


class _WeightedDivergence:
    """Stands in for TRL's autograd function, and multiplies the divergence of each position by its weight."""

    def __init__(self, function: Any, weights: Tensor, mask: Tensor) -> None:
        self.function, self.weights, self.valid = function, weights.reshape(-1), mask.reshape(-1) != 0

    def apply(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        divergence, entropy = self.function.apply(*arguments)
        # On devices with Triton TRL computes the valid positions alone, elsewhere all (B·T).
        weights = self.weights if len(divergence) == len(self.weights) else self.weights[self.valid]
        return divergence * weights.to(divergence), entropy


@contextmanager
def advice_on_vocabularies() -> Iterator[None]:
    """Add to TRL's refusal of a teacher with a padded vocabulary the losses that take it."""
    try:
        yield
    except ValueError as error:
        if "vocab_size" not in str(error):
            raise
        raise ValueError(
            f"{error} (One that is padded to another size will do for `loss='dense'` and `loss='sampled_token'`, "
            "which read the teacher from the rollouts.)"
        ) from error
