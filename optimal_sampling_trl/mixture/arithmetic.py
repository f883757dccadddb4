"""The arithmetic mixture q = (1-α)θ + αt in torch: log q, and the equations of its α. `mixture` has the symbols."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def log_average(
    log_theta: Float[Tensor, "N V"],
    log_teacher: Float[Tensor, "N V"],
    alpha: Float[Tensor, " N"],
    whole: Bool[Tensor, " N"] | None = None,
) -> Float[Tensor, "N V"]:
    """Return log((1-α)θ + αt); -inf where neither model has mass.

    Args:
        log_theta: log θ.
        log_teacher: log t.
        alpha: α.
        whole: rows in which θ has the weight 1 in place of 1-α, as in `top_k_swap`; None is no row.
    """
    log_rest, log_alpha = torch.log1p(-alpha), alpha.log()
    if whole is not None:
        log_rest = log_rest.masked_fill(whole, 0.0)
    dtype = log_theta.dtype
    return torch.logaddexp(log_rest[:, None].to(dtype) + log_theta, log_alpha[:, None].to(dtype) + log_teacher)


def is_unbounded(log_theta: Float[Tensor, "N V"], log_teacher: Float[Tensor, "N V"]) -> Bool[Tensor, " N"]:
    """Return the rows in which KL(q‖θ) is infinite for any α > 0: the teacher has a token that the student has not."""
    return (log_theta.isneginf() & ~log_teacher.isneginf()).any(-1)


def symmetric_alpha(
    log_theta: Float[Tensor, "N V"], log_teacher: Float[Tensor, "N V"], log_ratio: Float[Tensor, "N V"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return the root of (1-α)E_θ[ℓ] + αE_t[ℓ], and the Jeffreys divergence. ℓ is 0 where a model has no mass."""
    of_theta, of_teacher = (torch.linalg.vecdot(row.exp(), log_ratio) for row in (log_theta, log_teacher))
    return -of_theta / (of_teacher - of_theta), of_teacher - of_theta


def kl_and_slope(
    log_theta: Float[Tensor, "N V"], log_teacher: Float[Tensor, "N V"], alpha: Float[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return KL(q‖θ) and its slope in α, over the tokens that the student has.

    KL is summed as Σ q log w - q + θ, whose terms are not negative. The last two add up to 0. The slope is infinite at
    α = 1 where the teacher lacks a token: that token's part is left out, so that a solver steps back from there.
    """
    log_q = log_average(log_theta, log_teacher, alpha)
    log_w = torch.where(log_theta.isneginf(), 0.0, log_q - log_theta)
    theta, teacher, q = log_theta.exp(), log_teacher.exp(), log_q.exp()
    log_w = torch.where(q > 0, log_w, 0.0)
    return (q * log_w - q + theta).sum(-1), ((teacher - theta) * log_w).sum(-1)


def first_alpha(
    log_theta: Float[Tensor, "N V"], log_teacher: Float[Tensor, "N V"], epsilon: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Return a first guess of the α with KL(q‖θ) = ε.

    Near α = 0 the divergence is α²χ²/2 with χ² = Σ(t-θ)²/θ. It is convex, so that α is not below ε / KL(t‖θ).
    """
    theta = log_theta.exp()
    chi_square = torch.where(theta > 0, (log_teacher.exp() - theta).square() / theta, 0.0).sum(-1)
    of_teacher, _ = kl_and_slope(log_theta, log_teacher, torch.ones_like(epsilon))
    return torch.maximum(torch.sqrt(2 * epsilon / chi_square), epsilon / of_teacher)
