"""The mixture of a batch of rows: from both models' logits to α and log q. `mixture` has the symbols and equations."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .arithmetic import log_average
from .settings import SWAP, Mixture, MixtureRows, precision
from .solver import solve_alpha
from .swap import likeliest


def mix(
    theta_logits: Float[Tensor, "N V_theta"],
    teacher_logits: Float[Tensor, "N V_teacher"],
    mixture: Mixture | Sequence[Mixture] | MixtureRows,
    temperature: float | Float[Tensor, " N"] = 1.0,
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
    """Solve α in each row and return the mixture.

    The vocabularies of one family are padded to different sizes. V is the smaller size, and both models are taken as
    distributions over those first V tokens. The logits may be of any float type. α is solved in float64; on a GPU by
    the kernels, within 1e-4. The call does not wait for a GPU.

    Args:
        theta_logits: the student's raw logits; -inf where a token is masked.
        teacher_logits: the teacher's raw logits. Call `fold_eos` on them before, where the two models end differently.
        mixture: one for all rows, or one for each.
        temperature: above 0; one for all rows, or one for each. It acts on both models before α is solved.

    Returns:
        alpha: (N,) float32; NaN in a row without a solution: a NaN among its logits, or no token with mass under both.
        log_q: (N, V) float32, normalised; NaN throughout a row without a solution.

    Raises:
        ValueError: on a temperature that is not above 0, or numbers of rows and mixtures that differ.

    Example:
        ```python
        theta_logits, teacher_logits = torch.randn(2, 100), torch.randn(2, 100)
        alpha, log_q = mix(theta_logits, teacher_logits, Mixture())
        assert alpha.shape == (2,) and log_q.shape == (2, 100)
        ```
    """
    _check_rows(theta_logits, teacher_logits, mixture, temperature)
    if isinstance(mixture, Mixture):
        mixture = [mixture] * len(theta_logits)
    rows = mixture if isinstance(mixture, MixtureRows) else MixtureRows.of(mixture, theta_logits.device)
    if has_kernels(theta_logits):
        return _mix_on_a_gpu(theta_logits, teacher_logits, rows, temperature)
    log_theta, log_teacher = log_distributions(theta_logits, teacher_logits, temperature)
    alpha = solve_alpha(log_theta, log_teacher, rows)
    log_q = torch.log_softmax(mix_at(log_theta, log_teacher, alpha, rows), dim=-1)
    return alpha.float(), log_q.float()


def has_kernels(logits: Tensor) -> bool:
    """Tell whether the kernels solve α of these logits: on a GPU, where Triton is installed."""
    return logits.is_cuda and find_spec("triton") is not None


def _mix_on_a_gpu(
    theta_logits: Tensor, teacher_logits: Tensor, rows: MixtureRows, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    from .kernels.launch import mix_logits

    if not isinstance(temperature, Tensor):
        temperature = torch.full((len(theta_logits),), temperature, device=theta_logits.device)
    mixed = mix_logits(theta_logits, teacher_logits, rows, temperature)
    V = min(theta_logits.shape[1], teacher_logits.shape[1])
    log_q = torch.log_softmax(mixed.logits[:, :V] / temperature[:, None], dim=-1)
    return mixed.alpha, log_q.masked_fill(mixed.alpha.isnan()[:, None], torch.nan)


def _check_rows(
    theta_logits: Tensor, teacher_logits: Tensor, mixture: Mixture | Sequence[Mixture] | MixtureRows, temperature: Any
) -> None:
    """Refuse arguments that would silently broadcast or pose another problem, without reading from a device."""
    N = len(theta_logits)
    if len(teacher_logits) != N:
        raise ValueError(
            f"mix: {N} rows of the student's logits and {len(teacher_logits)} of the teacher's; wanted equal. "
            "Pass both models' logits of the same tokens."
        )
    M = N if isinstance(mixture, Mixture) else len(mixture.method if isinstance(mixture, MixtureRows) else mixture)
    if M != N:
        raise ValueError(
            f"mix: {M} mixtures for {N} rows of logits; wanted one for all rows or one for each. Pass either."
        )
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(
            f"mix: `temperature` is {temperature!r}; wanted a number above 0. "
            "For the likeliest token solve at 1 and take the argmax of log_q."
        )


def log_distributions(
    theta_logits: Float[Tensor, "N V_theta"],
    teacher_logits: Float[Tensor, "N V_teacher"],
    temperature: float | Float[Tensor, " N"] = 1.0,
) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N V"]]:
    """Return log θ and log t over the common vocabulary at the sampling temperature, in the solver's precision."""
    V = min(theta_logits.shape[-1], teacher_logits.shape[-1])
    dtype = precision(theta_logits.device)
    scale = temperature[:, None].to(dtype) if isinstance(temperature, Tensor) else temperature
    log_theta = torch.log_softmax(theta_logits[:, :V].to(dtype) / scale, dim=-1)
    log_teacher = torch.log_softmax(teacher_logits[:, :V].to(dtype) / scale, dim=-1)
    return log_theta, log_teacher


def blend(
    theta: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], alpha: Float[Tensor, " N"]
) -> Float[Tensor, "N V"]:
    """Return (1-α)·θ + α·t of logits or log-probabilities: log q up to a constant of the row.

    At α = 0 and α = 1 it is one model's row, exactly. Blended raw logits may be handed to an engine, whose sampler
    divides them by the temperature T afterwards: θ^((1-α)/T) t^(α/T) is q_α at T.
    """
    weight = alpha[:, None].to(theta.dtype)
    mixed = (1 - weight) * theta + weight * teacher
    return torch.where(weight == 0, theta, torch.where(weight == 1, teacher, mixed))  # 0·(-inf) is NaN


def mix_at(
    theta: Float[Tensor, "N V"],
    teacher: Float[Tensor, "N V"],
    alpha: Float[Tensor, " N"],
    rows: MixtureRows,
    temperature: float | Float[Tensor, " N"] = 1.0,
) -> Float[Tensor, "N V"]:
    """Mix two models' raw logits at a known α, each row in its form.

    Divided by the temperature T they are log q up to a constant of the row, as an engine's sampler expects them. In
    the geometric form that is `blend`. In the arithmetic form it is T·(log q + (1-α)·log Σe^(θ/T) + α·log Σe^(t/T)):
    the constant makes the logits continuous in α, whose ends are one model's row, exactly. Of `top_k_swap` it is the
    same, but for the ends: a token of the student's is as it was where nothing is swapped.

    Args:
        theta: the student's raw logits, or log-probabilities, over the common vocabulary.
        teacher: the teacher's, likewise.
        alpha: the weight of the teacher.
        rows: the forms of the rows, and what `top_k_swap` reads; the rest is not read.
        temperature: above 0; one for all rows, or one for each.
    """
    geometric = blend(theta, teacher, alpha)
    if not rows.methods("arithmetic") and not rows.most_swapped:
        return geometric
    scale = temperature[:, None].to(theta.dtype) if isinstance(temperature, Tensor) else temperature
    weight = alpha[:, None].to(theta.dtype)
    theta_sum, teacher_sum = ((row / scale).logsumexp(-1, keepdim=True) for row in (theta, teacher))
    log_theta, log_teacher = theta / scale - theta_sum, teacher / scale - teacher_sum
    is_swapped = rows.are(method=SWAP)
    if rows.most_swapped:
        log_theta = log_theta.masked_fill(is_swapped[:, None] & ~likeliest(teacher, rows), -torch.inf)
    log_q = log_average(log_theta, log_teacher, alpha, whole=is_swapped)
    is_blended = (weight == 0) | (weight == 1) | rows.are(form="geometric")[:, None]
    average = scale * (log_q + (1 - weight) * theta_sum + weight * teacher_sum)
    return torch.where(is_blended & ~is_swapped[:, None], geometric, average)
