"""A whole set of the student's weights, checked as it comes in: each fits, none is missing, tied ones are equal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ....pairing.source import fingerprint

HEAD = "lm_head.weight"


class IncomingWeights:
    """The weights of one reload, in any portions, under the names of the files or of a module in memory.

    Args:
        model: the fused model.

    Attributes:
        buffers: the files' values of what has not come: a trainer's parameters hold no buffers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.is_tied = bool(model.theta_config.model_config.hf_config.tie_word_embeddings)
        self.missing = {name for name in model.theta_required if not (self.is_tied and name == HEAD)}
        self.buffers: dict[str, Tensor] = dict(model.theta_buffers)
        names = model.theta_names
        self._embedding_name = None if names is None else names.ties.get(HEAD)
        self._tied: dict[str, int] = {}  # fingerprints of the head and the embedding, whichever comes first

    def accept(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Hand on those that are to be loaded, under the names of the files.

        Raises:
            ValueError: on one that is unknown or of another shape, or a head of its own for a tied student.
        """
        for name, weight in self._on_disk(weights):
            if self.is_tied and name == HEAD:
                self._check_tied(HEAD, weight)
                continue
            self._check_shape(name, weight)
            self.missing.discard(name)
            self.buffers.pop(name, None)
            yield name, weight.detach()

    def finish(self) -> None:
        """Refuse a set that is not whole.

        Raises:
            ValueError: naming what is missing.
        """
        if self.missing:
            names = sorted(self.missing)
            few = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ValueError(
                f"{len(names)} of the student's {len(self.model.theta_required)} weights are missing: {few}. "
                "Wanted the whole set: pass all of `model.named_parameters()`, an adapter merged into it."
            )

    def _on_disk(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        names = self.model.theta_names
        for name, weight in self.model.of_text("theta", weights):
            if self.is_tied and name == self._embedding_name and not weight.is_meta:
                self._check_tied(name, weight)
            yield from [(name, weight)] if names is None else names.on_disk([(name, weight)], self.model.theta_shapes)

    def _check_tied(self, name: str, weight: Tensor) -> None:
        """Refuse a head that differs from a tied student's embedding: it would be dropped without a word."""
        if not weight.is_meta:
            self._tied[name] = int(fingerprint(weight))
        if weight.is_meta or len(set(self._tied.values())) > 1:
            raise ValueError(
                f"The student's weight {HEAD!r} is no copy of its embedding, and the engine's student, built from its "
                "folder, ties the two. Save the untied student and build the engine from that folder."
            )

    def _check_shape(self, name: str, weight: Tensor) -> None:
        expected: dict[str, torch.Size] = self.model.theta_shapes
        if name not in expected or weight.shape != expected[name]:
            got = f"has shape {tuple(weight.shape)}" if name in expected else "is none of its checkpoint's"
            wanted = f"shape {tuple(expected[name])}" if name in expected else f"names such as {min(expected)!r}"
            raise ValueError(f"The student's weight {name!r} {got}; wanted {wanted}. Was it another model's?")
