"""Weights that a trainer sends to a server: they reach the student, whole or not at all, and the teacher stays.

vLLM builds its engine of weight transfer by the name that `plugin.register` gives it, and calls it between two steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from .incoming import IncomingWeights
from .weights import check_shapes, load_copies, reloading


class _Receiver:
    """The student as vLLM's transport sees it: loads one set of weights that comes in portions."""

    def __init__(self, model: Any) -> None:
        self.model, self.incoming = model, IncomingWeights(model)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load a portion, whose tensors the transport may use again afterwards."""
        load_copies(self.model.theta, self.incoming.accept(weights))

    def finish(self) -> None:
        """Load what does not come from a trainer."""
        self.incoming.finish()
        load_copies(self.model.theta, self.incoming.buffers.items())


class ThetaTransfer:
    """Loads weights into the student; a class puts this base before one of vLLM's engines, which brings the tensors.

    All weights come in one update, as TRL's client sends them. They are loaded while the server runs no step, so that
    no request meets a student of which a part is missing.
    """

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        super().__init__(config, vllm_config, device, _Receiver(model))  # type: ignore[call-arg]
        self.fused = model
        self.model_config = self._default_model_config = model.theta_config.model_config

    def start_weight_update(self) -> None:
        """Mark the student as stale; it stays so if the update never comes."""
        self.fused.stale = "a trainer announced new weights of the student, and they did not arrive"

    def receive_weights(self, update_info: Any) -> None:
        """Take a whole set of weights and load it.

        Raises:
            ValueError: where weights are missing, unknown or of another shape, before any is taken.
        """
        check_shapes(self.fused, zip(update_info.names, update_info.shapes, strict=True))
        receiver: Any = _Receiver(self.fused)
        self.model = receiver
        with reloading(self.fused):
            super().receive_weights(update_info)  # type: ignore[misc]
            receiver.finish()

    def finish_weight_update(self) -> None:
        """Do nothing: `receive_weights` finished what it began."""


class ThetaNCCL(ThetaTransfer, NCCLWeightTransferEngine):
    """Over NCCL, as TRL's client sends them; it needs a GPU at both ends."""
