"""The short convolutions of LFM2 on a CPU, where vLLM's kernel takes those of Mamba alone."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor, nn

from ..families import is_on_cpu

KERNELS = "vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d"
WIDTH = 4
"""Of the convolutions that vLLM's kernel for CPUs computes."""


def convolve_by_torch(model: nn.Module) -> None:
    """Let short convolutions run by torch's operations, on the CPU. May be called any number of times.

    Symptom: on a CPU an LFM2 stops in its first step: a weight has two dimensions, or a width that is not 4.
    Cause: vLLM packs the weights of every convolution for its kernel, which takes a width of 4; LFM2's is 3.
    Safe: the weights stay as they are, and vLLM's own operations of torch for other processors compute the same.
    Upstream: none found.
    Delete when: test_records passes for the pair "lfm2" without this function.
    """
    if not is_on_cpu():
        return
    short = [module for module in model.modules() if type(module).__name__ == "ShortConv"]
    for module in short:
        layer: Any = module.conv
        layer._cpu_skip_gemm_dispatch = True
    if short:
        kernels: Any = import_module(KERNELS)
        kernels.causal_conv1d_update_cpu_vec = _convolve


def _convolve(
    x: Tensor, states: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, places: Tensor, *args: Any
) -> Tensor:
    """Convolve a token of each request (N, dim), and move on its state, one of (M, dim, width - 1)."""
    if weight.shape[-1] == WIDTH:
        return import_module("vllm._custom_ops").causal_conv1d_update_cpu_vec(
            x, states, weight, bias, activation, places, *args
        )
    mine = states[places].contiguous()
    out = import_module(KERNELS).causal_conv1d_update_torch(x.unsqueeze(-1), mine, weight, bias, activation)
    states[places] = mine
    return out.squeeze(-1)
