"""Numbers that the trainers log of a batch, and the names under which they are logged.

q is the mixture, θ the student, t the teacher, x a sampled token. Each function takes the values of all processes and
returns floats by name, so that a trainer only has to gather and to append. They are finite: where there is nothing to
average there is no name, and a token that one of the models rules out is left out of a divergence, which it would make
infinite. The mean reward of a half that no function could score is NaN, which TRL leaves out of its means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .losses import effective_sample_size

ALPHA_MEAN = "alpha/mean"
"""Mean of α over the mixture's tokens."""
ALPHA_QUANTILES = {"alpha/q10": 0.1, "alpha/q50": 0.5, "alpha/q90": 0.9}
"""Quantiles of α over the mixture's tokens, and their shares."""
ALPHA_BAND = ("alpha/q10", "alpha/q90")
"""Ends of the band that the figures draw around the mean."""
ENTROPY_SCALE = "mixture/entropy_scale"
"""Scale of the entropy gate that the batch was sampled with, in nats, where `entropy_quantile` sets it."""
KL_THETA = "mixture/kl_theta"
"""KL(q‖θ) on the mixture's tokens, in nats a token: estimated, or the mean of dense records where they have it. Those
are of q before truncation, estimates of the distribution that the tokens were drawn from."""
KL_TEACHER = "mixture/kl_teacher"
"""KL(q‖t), likewise."""
SAMPLE_SIZE = "mixture/ess"
"""Effective sample size of the mixture's tokens for the student, as a share of their number."""
ACCEPTANCE = "mixture/acceptance"
"""Mean of min(1, θ/q) over the mixture's tokens: an estimate of Σ min(θ, q), the share of the student's drafts that
speculative sampling would accept. Where dense records have that sum, its mean."""
REWARD_THETA = "mixture/reward_theta"
"""Mean reward of the completions that the student sampled."""
REWARD_MIXTURE = "mixture/reward_mixture"
"""Mean reward of the completions that the mixture sampled."""
REWARD_TEACHER = "mixture/reward_teacher"
"""Mean reward of the teacher alone on the prompts of an evaluation."""
ACCEPTED_THETA = "accepted/theta"
"""Share of the student's completions that the reward accepts."""
ACCEPTED_MIXTURE = "accepted/mixture"
"""Share of the mixture's completions that the reward accepts."""
ACCEPTED_TEACHER = "accepted/teacher"
"""Share of the teacher's own completions that the reward accepts, on the prompts of an evaluation."""
ACCEPTED_PROMPTS = "accepted/prompts"
"""Share of the prompts with a completion that the reward accepts."""
GROUPS_WITH_SIGNAL = "mixture/groups_with_signal"
"""Share of the groups whose rewards differ, and which therefore have advantages other than 0."""
GROUPS_IN_NEED = "mixture/groups_in_need"
"""Share of the groups that got rows of the mixture in a second round, by the student's own rows of the first."""
OWN_SUCCESS = "mixture/own_success"
"""Share of a prompt's own rows that reached `alpha_by_success`, by which its mixture was annealed; the mean of all."""
TOKENS_PER_SECOND = "mixture/tokens_per_second"
"""Sampled tokens of all processes, by the seconds of the slowest."""
LOG_THETA_DIFFERENCE = "engine/log_theta_difference"
"""Mean of |log θ in the trainer − log θ in the engine|, in nats a token."""

DENSE_DIVERGENCE = "dense/divergence"
"""Mean divergence of the student from the teacher that the dense term trains on, in nats a token."""
DENSE_COEFFICIENT = "dense/coefficient"
"""Coefficient of the dense term."""
DENSE_MEANS = ("kl_theta_teacher", "kl_teacher_theta", "entropy_theta", "entropy_teacher")
"""Exact numbers of dense records that are logged as `dense/<name>`: the mean over all tokens, whoever drew them."""

ALPHA_TOKENS = "alpha/tokens"
"""Histogram of α over the mixture's tokens."""
LOG_WEIGHT = "mixture/log_weight"
"""Histogram of log θ(x) − log q(x) over the mixture's tokens, in nats."""


def of_mixture(
    alpha: Float[Tensor, " N"],
    log_q: Float[Tensor, " N"],
    log_theta: Float[Tensor, " N"],
    log_teacher: Float[Tensor, " N"],
    exact: Mapping[str, Float[Tensor, " N"]] = MappingProxyType({}),
) -> dict[str, float]:
    """Summarise the records of the N tokens that the mixture sampled; empty where there are none.

    Args:
        exact: scalars of dense records by their names, which take the places of estimates.
    """
    if not len(alpha):
        return {}
    return {
        ALPHA_MEAN: float(alpha.mean()),
        **dict(zip(ALPHA_QUANTILES, quantiles(alpha, list(ALPHA_QUANTILES.values())), strict=True)),
        **_finite_mean(KL_THETA, exact.get("kl_q_theta", log_q - log_theta)),
        **_finite_mean(KL_TEACHER, exact.get("kl_q_teacher", log_q - log_teacher)),
        SAMPLE_SIZE: float(effective_sample_size(log_theta - log_q) / len(alpha)),
    }


def of_drafts(
    log_q: Float[Tensor, " N"],
    log_theta: Float[Tensor, " N"],
    exact: Mapping[str, Float[Tensor, " N"]] = MappingProxyType({}),
) -> dict[str, float]:
    """Estimate the acceptance of the student's drafts from the N tokens that the mixture sampled; empty without any.

    Args:
        exact: scalars of dense records by their names; `overlap` takes the place of the estimate.

    Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, §3.3.
    """
    return _finite_mean(ACCEPTANCE, exact.get("overlap", (log_theta - log_q).clamp(max=0.0).exp()))


def of_dense(name: str, values: Float[Tensor, " N"]) -> dict[str, float]:
    """Average one of the dense records' exact numbers over N tokens; empty where none is finite.

    Args:
        name: one of `DENSE_MEANS`.
        values: the numbers; a divergence is infinite where one model rules out what the other may draw.
    """
    return _finite_mean(f"dense/{name}", values)


def histograms_of_mixture(
    alpha: Float[Tensor, " N"], log_q: Float[Tensor, " N"], log_theta: Float[Tensor, " N"]
) -> dict[str, Float[Tensor, " N"]]:
    """Return the finite values of each histogram over the N tokens that the mixture sampled; none where empty."""
    values = {ALPHA_TOKENS: alpha, LOG_WEIGHT: log_theta - log_q}
    finite = {name: value[value.isfinite()] for name, value in values.items()}
    return {name: value for name, value in finite.items() if len(value)}


def of_speed(tokens: Float[Tensor, " P"], seconds: Float[Tensor, " P"]) -> dict[str, float]:
    """Compute the speed of sampling from the tokens and the seconds of each of P processes."""
    return {TOKENS_PER_SECOND: float(tokens.sum() / seconds.max().clamp(min=1e-9))}


def of_rewards(
    rewards: Float[Tensor, " N"], student_rows: Bool[Tensor, " N"], mixture_rows: Bool[Tensor, " N"]
) -> dict[str, float]:
    """Average the rewards of the student's completions and of the mixture's.

    Args:
        rewards: reward of each completion; NaN where no function could score it.
        student_rows: True where the completion stands for the student, which sampled it alone.
        mixture_rows: True where the mixture sampled it.
    """
    return _of_halves(rewards, student_rows, mixture_rows, (REWARD_THETA, REWARD_MIXTURE))


def of_groups(rewards: Float[Tensor, "G N"]) -> dict[str, float]:
    """Count the groups of N completions whose rewards differ; NaN stands where no function could score one."""
    largest, smallest = rewards.nan_to_num(nan=-torch.inf).amax(1), rewards.nan_to_num(nan=torch.inf).amin(1)
    return {GROUPS_WITH_SIGNAL: float((largest > smallest).float().mean())}


def of_own_rows(shares: Float[Tensor, "P G"], by_success: bool) -> dict[str, float]:
    """Summarise what the student's own rows of the first round led to.

    Args:
        shares: how near the student the second round of each of G groups of P processes is sampled; 1 is the student.
        by_success: True where they are shares of successes.
    """
    success = {OWN_SUCCESS: float(shares.mean())} if by_success else {}
    return {GROUPS_IN_NEED: float((shares < 1).double().mean()), **success}


def of_acceptance(
    rewards: Float[Tensor, "G N"],
    accepted: Bool[Tensor, "G N"],
    student_rows: Bool[Tensor, "G N"],
    mixture_rows: Bool[Tensor, "G N"],
) -> dict[str, float]:
    """Compute the shares of completions and of prompts that a reward accepts.

    Args:
        rewards: rewards of the N completions of each of G prompts; NaN, where no function could score one, leaves the
            completion out of its share.
        accepted: True where the completion is accepted.
        student_rows: True where the completion stands for the student, which sampled it alone.
        mixture_rows: True where the mixture sampled it.
    """
    shares = _shares(rewards, accepted).flatten()
    return {
        **_of_halves(shares, student_rows.flatten(), mixture_rows.flatten(), (ACCEPTED_THETA, ACCEPTED_MIXTURE)),
        ACCEPTED_PROMPTS: float(accepted.any(1).float().mean()),
    }


def of_teacher(rewards: Float[Tensor, " N"], accepted: Bool[Tensor, " N"]) -> dict[str, float]:
    """Average the rewards of the teacher's own completions, and compute the share that is accepted.

    Args:
        rewards: reward of each completion; NaN, where no function could score one, leaves it out.
        accepted: True where the completion is accepted.
    """
    return {
        REWARD_TEACHER: float(rewards.nanmean()),
        ACCEPTED_TEACHER: float(_shares(rewards, accepted).nanmean()),
    }


def _shares(rewards: Float[Tensor, " *N"], accepted: Bool[Tensor, " *N"]) -> Float[Tensor, " *N"]:
    """Return 1 for each accepted completion and 0 for each other, NaN where no function could score it."""
    return accepted.float().masked_fill(rewards.isnan(), torch.nan)


def _of_halves(
    values: Float[Tensor, " N"],
    student_rows: Bool[Tensor, " N"],
    mixture_rows: Bool[Tensor, " N"],
    names: tuple[str, str],
) -> dict[str, float]:
    """Average the values of the student's completions and of the mixture's; without a name where there is no row."""
    halves = zip(names, (values[student_rows], values[mixture_rows]), strict=True)
    return {name: float(half.nanmean()) for name, half in halves if len(half)}


def token_differences(trainer: Float[Tensor, "B T"], engine: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Return |log θ in the trainer − log θ in the engine| of each token."""
    return (trainer - engine).abs()


def completion_differences(
    trainer: Float[Tensor, " B"], engine: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, " B"]:
    """Compute the absolute difference of each completion's log θ per token; RLOO's trainer knows only their sums."""
    return ((engine * mask).sum(1) - trainer).abs() / mask.sum(1).clamp(min=1)


def of_differences(differences: Float[Tensor, " N"]) -> dict[str, float]:
    """Average the differences of N tokens or completions; empty where there are none."""
    return _finite_mean(LOG_THETA_DIFFERENCE, differences)


def _finite_mean(name: str, values: Float[Tensor, " N"]) -> dict[str, float]:
    """Average the finite ones of N values; empty where there are none."""
    finite = values[values.isfinite()]
    return {name: float(finite.mean())} if len(finite) else {}


def quantiles(values: Float[Tensor, " N"], shares: Sequence[float]) -> list[float]:
    """Compute quantiles by numpy, linear between neighbours: `Tensor.quantile` refuses more than 2^24 values."""
    return np.quantile(values.double().cpu().numpy(), shares).tolist()
