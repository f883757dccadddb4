"""The scale γ of the entropy gate, set for each batch from the records of the last one (MENTOR, arXiv:2510.04140)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..metrics import quantiles

GROWTH = 2.0
"""Largest factor by which γ grows where the quantile is above it and the records do not say how far."""


def next_scale(alpha: Float[Tensor, " N"], scale: float, quantile: float, least: float) -> float:
    """Return γ for the next batch: a quantile of the student's entropies in this one, but not below `least`.

    A record has α = min(1, H(θ)/γ), so that αγ is the entropy where α < 1. Where the quantile is at α = 1 it is at
    least γ. Then γ grows by the share of the tokens at α = 1 over the share that is to be there, at most twofold, so
    that it finds the quantile from below and stays near it.

    Args:
        alpha: α of the tokens that the mixture sampled, in all processes.
        scale: γ that they were sampled with, in nats.
        quantile: share of the tokens whose entropy is to lie below the next γ.
        least: smallest γ.
    """
    if not len(alpha):
        return scale
    (at,) = quantiles(alpha, [quantile])
    if at < 1.0:
        return max(scale * at, least)
    is_open = float((alpha >= 1.0).float().mean())
    return scale * min(max(is_open / (1.0 - quantile), 1.0), GROWTH)
