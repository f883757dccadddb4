"""Torch in the place of vLLM's kernels that choose and sort experts, for a vLLM that was packed without them.

None of it waits for the host, so that CUDA graphs may hold it. What runs with it says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def stand_in() -> bool:
    """Put torch's operations there if the kernels are missing, and tell whether they are."""
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not torch.cuda.is_available() or hasattr(torch.ops._moe_C, "topk_softmax"):
        return False
    for function in (topk_softmax, topk_sigmoid, moe_sum, moe_align_block_size):
        setattr(ops, function.__name__, function)
    return True


def _choose(
    weights: Tensor, ids: Tensor, scores: Tensor, renormalize: bool, bias: Tensor | None, scale: float
) -> None:
    chosen = (scores if bias is None else scores + bias.float()).topk(ids.shape[1], -1).indices
    own = scores.gather(1, chosen)
    own = own / own.sum(-1, keepdim=True) if renormalize else own
    weights.copy_(own * scale)
    ids.copy_(chosen.to(ids.dtype))


def topk_softmax(
    weights: Tensor, ids: Tensor, indices: Any, gating: Tensor, renormalize: bool = False, bias: Tensor | None = None
) -> None:
    """Write the likeliest experts of each token (N, k) and their probabilities."""
    _choose(weights, ids, gating.float().softmax(-1), renormalize, bias, 1.0)


def topk_sigmoid(
    weights: Tensor,
    ids: Tensor,
    indices: Any,
    gating: Tensor,
    renormalize: bool = False,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Write the experts of each token (N, k) by biased scores, and their own scores."""
    _choose(weights, ids, gating.float().sigmoid(), renormalize, bias, scale)


def moe_sum(each: Tensor, output: Tensor, topk_ids: Any = None, expert_map: Any = None) -> None:
    """Write the sum (N, hidden) over the experts of each token (N, k, hidden)."""
    output.copy_(each.float().sum(1))


def moe_align_block_size(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_ids: Tensor,
    expert_ids: Tensor,
    total: Tensor,
    expert_map: Any = None,
) -> None:
    """Sort the pairs of token and expert by expert, each expert's filled up to whole blocks."""
    flat, device = topk_ids.flatten().long(), topk_ids.device
    counts = torch.zeros(num_experts, dtype=torch.long, device=device).scatter_add_(0, flat, torch.ones_like(flat))
    padded = (counts + block_size - 1) // block_size * block_size
    ends = padded.cumsum(0)
    order = flat.argsort(stable=True)
    experts = flat[order]
    rank = torch.arange(len(flat), device=device) - (counts.cumsum(0) - counts)[experts]
    sorted_ids.fill_(len(flat))
    sorted_ids.scatter_(0, (ends - padded)[experts] + rank, order.to(sorted_ids.dtype))
    firsts = torch.arange(len(expert_ids), device=device) * block_size
    expert_ids.copy_(torch.searchsorted(ends, firsts, right=True).clamp(max=num_experts - 1).to(expert_ids.dtype))
    total.copy_(ends[-1:].to(total.dtype))
