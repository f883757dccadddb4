"""The number of tokens to draft: that which gives most tokens a second, by the batch and by the drafts that are kept.

A pass over a few sequences waits for the weights, so that drafts cost little there; over many it computes, and pays
for each draft. What a pass takes is reckoned from the sizes of both models, and not measured: the same requests then
have the same drafts, and a seed the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

LAYER = 36e-6
"""Seconds that a layer takes at least: its kernels start one after the other."""
READ, COMPUTE = 1 / 3e12, 1 / 5e14
"""Seconds for each byte of weights, and for each multiplication and addition: an H100's."""
PASS, ROW = 6e-4, 2e-5
"""Seconds of a pass, and for each token in it, beside both models: the mixture, the sampler, the records, the host."""
DRAFT = 3e-4
"""Seconds of a draft beside the student."""
MARGIN = 1.03
"""The gain of speed below which nothing is drafted: the estimate is no more precise."""
PRIOR, PRIOR_WEIGHT = 0.8, 3.0
"""The share of drafts that are kept where nothing was seen, and how many drafts that counts for."""
MEMORY = 0.995
"""The part of what was seen before that a draft leaves, so that the share follows the mixtures that are asked."""
RETRY = 100
"""Passes without drafts after which some are drawn, to see whether more of them are kept by now."""


class Size(NamedTuple):
    """Hold a model's number of layers, the weights that a token is multiplied with, and the bytes of each."""

    layers: int
    weights: float
    width: int

    def seconds(self, rows: int) -> float:
        """Return what a pass over so many tokens takes: it reads the weights while it multiplies."""
        reading, computing = self.weights * self.width * READ, 2 * self.weights * rows * COMPUTE
        return self.layers * LAYER + (reading**2 + computing**2) ** 0.5


def size_of(config: Any, width: int) -> Size:
    """Return the size of a dense decoder.

    Args:
        config: of the language model.
        width: bytes of a weight.
    """
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = config.hidden_size * head * (2 * heads + 2 * (getattr(config, "num_key_value_heads", None) or heads))
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    layers = config.num_hidden_layers
    return Size(layers, layers * layer + config.hidden_size * config.vocab_size, width)


@dataclass
class DraftCounts:
    """Chooses, before each pass, how many tokens of each sequence the student drafts after it.

    Args:
        counts: the numbers to choose from, 0 among them.
        teacher: the teacher's size.
        theta: the student's.
    """

    counts: tuple[int, ...]
    teacher: Size
    theta: Size
    kept: float = PRIOR * PRIOR_WEIGHT
    tried: float = PRIOR_WEIGHT
    without: int = 0

    def forget(self) -> None:
        """Begin anew: what is drafted from now on depends on nothing that was seen before."""
        self.kept, self.tried, self.without = PRIOR * PRIOR_WEIGHT, PRIOR_WEIGHT, 0

    def see(self, drafted: int, kept: int) -> None:
        """Note how many drafts of a sequence were kept. One that is not ends the trial of those behind it."""
        tried = min(kept + 1, drafted)
        faded = MEMORY**tried
        self.kept, self.tried = self.kept * faded + kept, self.tried * faded + tried

    @property
    def share(self) -> float:
        """The share of drafts that are kept, by those that were seen lately."""
        return self.kept / self.tried

    def choose(self, batch: int) -> int:
        """Return how many tokens to draft of each sequence in a batch of so many."""
        count = self._fastest(batch)
        self.without = 0 if count else self.without + 1
        if self.without < RETRY:
            return count
        self.without = 0
        return min(filter(None, self.counts))

    def _fastest(self, batch: int) -> int:
        speeds = {count: speed(count, batch, self.share, self.teacher, self.theta) for count in self.counts}
        best = max(speeds, key=speeds.__getitem__)
        return best if speeds[best] > MARGIN * speeds[0] else 0


def speed(count: int, batch: int, share: float, teacher: Size, theta: Size) -> float:
    """Return the tokens of a sequence in a second, as reckoned.

    Args:
        count: the tokens that are drafted at a time.
        batch: the sequences.
        share: of the drafts that are kept, below 1.
        teacher: the teacher's size.
        theta: the student's.
    """
    rows = batch * (count + 1)
    verifying = PASS + rows * ROW + teacher.seconds(rows) + theta.seconds(rows)
    drafting = count * (DRAFT + theta.seconds(batch))
    return sum(share**index for index in range(count + 1)) / (verifying + drafting)
