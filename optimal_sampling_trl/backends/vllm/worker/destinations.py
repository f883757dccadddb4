"""The places to which vLLM's loaders copy a model's weights, so that loading them again is a copy of each.

Finding a place by its name takes the host longer than a GPU takes to fill it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Destinations:
    """The places of a model's weights, learned from vLLM's loaders as they load each for the first time.

    A weight that is not copied as a whole to one place (a part of it under tensor parallelism, one that is packed or
    padded) has none, and goes through its loader each time.

    Args:
        model: has vLLM's `load_weights`; its layers keep what is loaded as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.places: dict[str, Tensor | None] = {}

    @torch.no_grad()
    def load(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Write weights into the model's own storages, each before the next comes, as it may be gathered for a moment.

        Args:
            named_parameters: the weights under the names of the model's checkpoint.
        """
        for name, weight in named_parameters:
            if name not in self.places:
                self.places[name] = self._learn(name, weight)
            elif (place := self.places[name]) is None:
                self.model.load_weights([(name, weight)])
            else:
                place.copy_(weight)

    def _learn(self, name: str, weight: Tensor) -> Tensor | None:
        """Load a weight by vLLM's loaders. Return its place if they copied it as it is and wrote nothing else."""
        with _Writes() as writes:
            self.model.load_weights([(name, weight)])
        if writes.has_others or len(writes.copies) != 1:
            return None
        place, source = writes.copies[0]
        is_whole = source.data_ptr() == weight.data_ptr() and source.shape == weight.shape == place.shape
        return place if is_whole and source.stride() == weight.stride() else None


class _Writes(TorchDispatchMode):
    """Record inside the block what is copied where, and whether anything else is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.has_others = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.copies.append((args[0], args[1]))
        elif func._schema.is_mutable:
            self.has_others = True
        return func(*args, **(kwargs or {}))
