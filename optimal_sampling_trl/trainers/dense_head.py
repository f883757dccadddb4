"""log θ of a few tokens at each position, from the forward pass in which TRL computes that of the sampled one.

TRL's fused output layer projects the student's hidden states tile by tile in an autograd function that it finds under
a name of its module, and lays out no logits (B, T, V). `DenseHead` stands under that name while a loss is computed. It
calls TRL's function and then reads further tokens from the same hidden states: the student's body runs once, and the
cost is one more output layer, forward and twice backward. Everything in TRL that this relies on is named here and
checked by tests/whole/test_upstream_trl.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from trl.trainer import utils

FUNCTION = "_ChunkedLogProbFunction"
"""Name in TRL's module under which the fused output layer finds its autograd function."""
TILE = 1 << 27
"""Largest number of logits that are laid out at a time: 512 MiB in float32."""


class Layer(NamedTuple):
    """Hold what an output layer does beside its weight and bias.

    Attributes:
        temperature: divides the logits.
        softcap: bounds the logits by softcap·tanh(·/softcap); None does not.
        scale: multiplies the logits before that.
        dtype: in which the layer multiplies.
    """

    temperature: float
    softcap: float | None
    scale: float
    dtype: torch.dtype

    def log_probabilities(
        self, hidden: Float[Tensor, "N H"], weight: Float[Tensor, "V H"], bias: Tensor | None, ids: Int[Tensor, "N K"]
    ) -> Float[Tensor, "N K"]:
        """Compute log θ of K tokens at each of N positions, in float32."""
        bias = None if bias is None else bias.to(self.dtype)
        logits = torch.nn.functional.linear(hidden.to(self.dtype), weight.to(self.dtype), bias).float() * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = logits / self.temperature
        return logits.gather(1, ids) - logits.logsumexp(1, keepdim=True)


class DenseHead:
    """Stands where TRL's fused output layer finds its autograd function.

    Args:
        function: TRL's.
        ids: tokens whose log θ is wanted at each position of a batch.
        mask: True at the positions that count.

    Attributes:
        log_theta: (N, K) log θ with gradient at the N positions that count, row by row; None until the student ran.
    """

    log_theta: Float[Tensor, "N K"] | None = None

    def __init__(self, function: Any, ids: Int[Tensor, "B T K"], mask: Bool[Tensor, "B T"]) -> None:
        self.function, self.ids, self.mask = function, ids, mask

    def apply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Any:
        """Return what TRL's function does, and keep log θ of the other tokens."""
        result = self.function.apply(hidden, weight, bias, *arguments)
        _, temperature, _, softcap, scale, _ = arguments
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        layer = Layer(temperature, softcap, scale, dtype)
        mask = self.mask.to(hidden.device)
        ids = self.ids.to(hidden.device)[mask]
        self.log_theta = _TiledLogProbabilities.apply(self._positions(hidden, mask), weight, bias, ids, layer)
        return result

    def _positions(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the hidden states (N, H) at the positions that count, which TRL may already have picked."""
        if utils._use_triton(hidden.device):
            return hidden
        B, T = mask.shape
        return hidden.view(B, -1, hidden.shape[-1])[:, -T:][mask]


@contextmanager
def dense_head(ids: Int[Tensor, "B T K"], mask: Bool[Tensor, "B T"]) -> Iterator[DenseHead]:
    """Let TRL's fused output layer also compute log θ of `ids` where `mask` is True, inside the block."""
    head = DenseHead(getattr(utils, FUNCTION), ids, mask)
    with patch.object(utils, FUNCTION, head):
        yield head


class _TiledLogProbabilities(torch.autograd.Function):
    """`Layer.log_probabilities` by tiles of positions, whose logits are computed again in the backward pass.

    A weight that DeepSpeed splits over processes is whole in both, as in TRL's own function.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, layer: Layer) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.layer = layer
        tiles = [layer.log_probabilities(hidden[rows], weight, bias, ids[rows]) for rows in _tiles(hidden, weight)]
        return torch.cat([hidden.new_empty(0, ids.shape[1], dtype=torch.float32), *tiles])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        *tensors, ids = ctx.saved_tensors
        (gradient,) = gradients
        with utils.maybe_gather_lm_head_ctx(*tensors[1:]), torch.enable_grad():
            leaves: list[Any] = [
                None if tensor is None else tensor.detach().requires_grad_(needed)
                for tensor, needed in zip(tensors, ctx.needs_input_grad)
            ]
            hidden, weight, bias = leaves
            for rows in _tiles(hidden, weight):
                ctx.layer.log_probabilities(hidden[rows], weight, bias, ids[rows]).backward(gradient[rows])
        return *(None if leaf is None else leaf.grad for leaf in leaves), None, None


def _tiles(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Return the rows whose logits fit into a tile."""
    size = max(TILE // weight.shape[0], 1)
    return [slice(start, start + size) for start in range(0, len(hidden), size)]
