"""Triton kernels without their tuning, for a check that asks what they compute and not how fast."""

from __future__ import annotations

from functools import wraps
from math import prod
from typing import Any


def take_smallest() -> None:
    """Let each tuned kernel of Triton take its smallest configuration instead of compiling and timing all of them.

    The kernels of linear attention and Mamba layers have up to 36 configurations each, about a hundred for a model,
    and are tuned anew for other numbers of heads: minutes of a processor, for a model of two layers, too. What a
    configuration changes is the size of a tile and the number of warps.
    """
    from triton.runtime.autotuner import Autotuner

    tuned = Autotuner.run
    if hasattr(tuned, "__wrapped__"):
        return

    @wraps(tuned)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.configs = [min(self.configs, key=_size)]
        return tuned(self, *args, **kwargs)

    Autotuner.run = run  # type: ignore[method-assign]


def _size(config: Any) -> tuple[int, int, int]:
    tile = prod(value for value in config.kwargs.values() if isinstance(value, int))
    return tile, config.num_stages, config.num_warps
