"""Corrections for having sampled from the mixture q instead of the student θ, as plain functions of tensors (B, T).

B completions of T tokens; `mask` is 1 on tokens and 0 on padding. The ratio of a token is r_i = θ(x_i)/q(x_i). A
correction is named `<level>_<shape>`, in the order of TRL's corrections. The level picks the ratios that make the
weight of token i,

| level      | weight w_i         | use                                                                               |
|------------|--------------------|-----------------------------------------------------------------------------------|
| `token`    | r_i                | biased: corrects the token, but not that q chose the prefix it follows            |
| `prefix`   | Π_{j≤i} r_j        | exact for a sum over tokens; with a window only the last k ratios: biased, calmer |
| `sequence` | Π_j r_j            | exact for any function of the completion; the variance grows with its length      |

and the shape tames a large weight, which biases the loss towards the tokens that q draws more often than θ:

| shape      | weight             | source                                                                            |
|------------|--------------------|-----------------------------------------------------------------------------------|
| `truncate` | min(w, C)          | Ionides, "Truncated Importance Sampling", 2008                                    |
| `mask`     | w·1[c ≤ w ≤ C]     | the masked importance sampling of TRL's `vllm_importance_sampling_mode`           |
| `luffy`    | w / (w + γ)        | Yan et al., "Learning to Reason under Off-Policy Guidance", arXiv:2504.14945      |

`none` is weight 1: the tokens are trained on as if the student had drawn them. Without negative advantages the
mixture's completions then act as demonstrations that turned out well.

Filtered imitation needs no correction: the completions that a reward accepts are imitated, whoever sampled them
(Dong et al., "RAFT", arXiv:2304.06767; Xiong et al., "A Minimalist Approach to LLM Reasoning", arXiv:2504.11343).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from .options import check_flag, check_number, check_whole, unknown_option

LEVELS = ("token", "prefix", "sequence")
SHAPES = ("truncate", "mask", "luffy")
ANCHOR_SHARE, ANCHOR_LOW, ANCHOR_HIGH, ANCHOR_NATS = 0.5, 0.8, 1.28, 1.0
"""The teacher's share of an anchored ratio, its bounds, and the limit of log θ/t in it: see `anchor_factor`."""
REWARD_TOLERANCE = 1e-6
"""Relative error that a comparison of rewards forgives.

A total of n weighted rewards of one sign is wrong by up to (n + 2)·6e-8 of itself in float32: a reward, its weight and
their product are rounded, and so is each of n − 1 sums. Weights of 0.35, 0.45 and 0.2 make 0.99999994 of full marks.
1e-6 is enough for 14 functions.
"""
CORRECTIONS = ("none", *(f"{level}_{shape}" for level in LEVELS for shape in SHAPES))


@dataclass(frozen=True)
class Correction:
    """Correct a mixture's completions by a weight for each token.

    Args:
        name: one of `CORRECTIONS`.
        clip_max: C of the shapes `truncate` and `mask`.
        clip_min: c of the shape `mask`; None is no lower bound.
        gamma: γ of the shape `luffy`.
        window: number of the last ratios that the level `prefix` multiplies; None is all.
        self_normalise: divide the weights by their mean over the mixture's tokens, in all processes together.

    Raises:
        ValueError: on an unknown name, or a number out of range.
    """

    name: str = "none"
    clip_max: float = 3.0
    clip_min: float | None = None
    gamma: float = 0.1
    window: int | None = None
    self_normalise: bool = False

    def __post_init__(self) -> None:
        if self.name not in CORRECTIONS:
            raise ValueError(unknown_option("correction", self.name, CORRECTIONS))
        check_number("Correction", "clip_max", self.clip_max, 0.0)
        check_number("Correction", "gamma", self.gamma, 0.0)
        if self.clip_min is not None:
            check_number("Correction", "clip_min", self.clip_min, 0.0, self.clip_max)
        if self.window is not None:
            check_whole("Correction", "window", self.window, 1)
        check_flag("Correction", "self_normalise", self.self_normalise)

    def weights(
        self,
        log_theta: Float[Tensor, "B T"],
        log_q: Float[Tensor, "B T"],
        mask: Float[Tensor, "B T"],
        mixture_rows: Bool[Tensor, " B"],
        *,
        inclusive: bool = True,
        total: Callable[[Tensor], Tensor] = lambda sums: sums,
    ) -> Float[Tensor, "B T"]:
        """Return the weight of each token; 1 in rows that the student sampled, and on padding. Carries no gradient.

        Args:
            log_theta: log-probability of each token under the student.
            log_q: log-probability of each token under the distribution that it was drawn from.
            mask: 1 on tokens, 0 on padding.
            mixture_rows: True in rows that the mixture sampled.
            inclusive: see `log_weights`.
            total: adds up a tensor over all processes that share the batch; by default this one has all of it.
        """
        ones = torch.ones_like(log_theta)
        if self.name == "none":
            return ones
        level, shape = self.name.split("_")
        log_weight = log_weights(log_theta.detach(), log_q, mask, level, window=self.window, inclusive=inclusive)
        weight = self._shape(log_weight.exp(), shape)
        rows = mixture_rows[:, None]
        if self.self_normalise:
            tokens = rows * mask
            count, whole = total(torch.stack([tokens.sum(), (weight * tokens).sum()]))
            weight = weight * count / whole.clamp(min=torch.finfo(weight.dtype).tiny)
        return torch.where(rows & (mask != 0), weight, ones)  # TRL's VESPO adds the logarithms up over padding, too

    def _shape(self, weight: Tensor, shape: str) -> Tensor:
        if shape == "truncate":
            return weight.clamp(max=self.clip_max)
        if shape == "luffy":
            smallest = torch.finfo(weight.dtype).tiny  # γ and w may both be 0
            return 1 / (1 + self.gamma / weight.clamp(min=smallest))  # w/(w+γ), finite where w overflows
        return weight.masked_fill((weight > self.clip_max) | (weight < (self.clip_min or 0.0)), 0.0)


def log_weights(
    log_theta: Float[Tensor, "B T"],
    log_q: Float[Tensor, "B T"],
    mask: Float[Tensor, "B T"],
    level: str,
    *,
    window: int | None = None,
    inclusive: bool = True,
) -> Float[Tensor, "B T"]:
    """Return the logarithm of the weight of each token, before a shape tames it (see the head of this module).

    Args:
        log_theta: log-probability of each token under the student.
        log_q: log-probability of each token under the distribution that it was drawn from.
        mask: 1 on tokens, 0 on padding.
        level: one of `LEVELS`.
        window: largest number of ratios that the level `prefix` multiplies; None is all.
        inclusive: False leaves the ratio of token i out of the level `prefix`, Π_{j<i} r_j, which is exact for a
            function of the prefix, such as a divergence between the two next-token distributions.

    Raises:
        ValueError: on an unknown level.
    """
    # Padding may hold anything. A ratio of infinity, brought down to 1e30 nats, has a sum with one of 0.
    log_ratio = (log_theta - log_q).masked_fill(mask == 0, 0.0).clamp(max=1e30)
    if level == "token":
        return log_ratio
    if level == "sequence":
        return log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
    if level != "prefix":
        raise ValueError(unknown_option("level of a correction", level, LEVELS))
    if not inclusive:
        log_ratio = pad(log_ratio, (1, -1))
    if window is None or window >= log_ratio.shape[1]:
        return log_ratio.cumsum(dim=1)
    return pad(log_ratio, (window - 1, 0)).unfold(1, window, 1).sum(dim=-1)  # a difference of sums loses -inf


def keep_positive(advantages: Float[Tensor, " B *T"], rows: Bool[Tensor, " B"]) -> Float[Tensor, " B *T"]:
    """Set advantages below 0 to 0 in the completions that `rows` marks.

    A failure of the mixture says little about the student, which would often not have taken that path.
    """
    marked = rows.reshape(-1, *[1] * (advantages.ndim - 1))
    return torch.where(marked, advantages.clamp(min=0.0), advantages)


def own_baseline(
    rewards: Float[Tensor, "G N"], theta_rows: Bool[Tensor, "G N"], scale: bool = True
) -> Float[Tensor, "G N"]:
    """Return the advantages over the mean reward of the completions that the student sampled, in groups of N.

    The student's advantages are divided by the standard deviation of its rewards. The mixture's are not: they say in
    units of the reward by how much a completion with help beats those without.
    Source: Jiang et al., "MENTOR", arXiv:2510.04140.

    Args:
        rewards: reward of each completion; NaN, where no function could score one, gets no advantage.
        theta_rows: True where the student sampled the completion alone; at least one in each group.
        scale: whether the student's advantages are divided.
    """
    ours = rewards.masked_fill(~theta_rows, torch.nan)
    mean = ours.nanmean(1, keepdim=True)
    count = ours.isfinite().sum(1, keepdim=True)
    deviation = ((ours - mean).square().nansum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    advantages = rewards - mean
    if scale:
        advantages = torch.where(theta_rows, advantages / (deviation + 1e-4), advantages)  # TRL's 1e-4
    return advantages.nan_to_num(nan=0.0)


def mixture_weight(step: float, steps: float | None) -> float:
    """Return the weight of the mixture's advantages: half a cosine from 1 at step 0 to 0 at `steps`; 1 if None."""
    return 1.0 if steps is None else (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def sampled_token_coefficients(
    log_teacher: Float[Tensor, "B T"],
    log_theta: Float[Tensor, "B T"],
    mask: Float[Tensor, "B T"],
    *,
    clip: float | None = None,
    mean: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, "B T"]:
    """Return the coefficient c of −c·∇log θ(x) that takes the student to the teacher with sampled tokens alone: ℓ(x).

    The log-variance divergence of a sampling distribution q, V_q = Var_q[ℓ]/2 with ℓ = log t − log θ, is 0 only where
    θ = t on q's support (Richter et al., "VarGrad", arXiv:2010.10436). With q held fixed its gradient is

        ∇V_q = −E_q[(ℓ − E_q[ℓ]) ∇log θ],

    of which −ℓ(x)∇log θ(x) is an estimate without bias where E_q[ℓ] = 0: that is what `kl_symmetry` solves for, so its
    rollouts need neither a baseline nor a weight. On the student's own tokens E_θ[−ℓ∇log θ] = ∇KL(θ‖t), the gradient
    of reverse KL. For any other q subtract the mean (`mean`).

    Args:
        log_teacher: log-probability of each token under the teacher.
        log_theta: log-probability of each token under the student.
        mask: 1 on tokens, 0 on padding.
        clip: limits ℓ to [−clip, clip], in nats; biased, but one token cannot outweigh a batch. Without it a token
            that the teacher rules out (ℓ = −inf: an ending of the teacher's that was folded) is left out.
        mean: the mean over the whole batch of ℓ after `clip`, repeated for each completion; it is subtracted.
    """
    coefficient = (log_teacher - log_theta).detach().masked_fill(mask == 0, 0.0)
    coefficient = coefficient.masked_fill(coefficient.isinf(), 0.0) if clip is None else coefficient.clamp(-clip, clip)
    if mean is not None:
        coefficient = coefficient - mean[:, None]
    return coefficient * mask


def anchor_factor(
    advantages: Float[Tensor, "*B T"], log_ratio: Float[Tensor, "*B T"], share: float | Tensor = ANCHOR_SHARE
) -> Float[Tensor, "*B T"]:
    """Factor of A·∇log θ in the gradient of min(r·A, clip(r, 0.8, 1.28)·A), with r anchored at student and teacher.

    The ratio is r = θ/(θ_old^(1−s)·t^s), the logarithm of θ/t in it limited to 1 nat either way. At θ = θ_old it is
    (θ/t)^s. Beyond the limit the teacher's part has no gradient; where the clipped side is the smaller r has none, so
    that a token which the student likes better than the teacher does is reinforced no further.

    Source: Zhang et al., "Reinforcement-aware Knowledge Distillation for LLM Reasoning", arXiv:2602.22495v2, §4.1,
    §5.1.1 (the bounds 0.2 and 0.28) and Appendices A and B (s = 1 − α = 0.5, 1 nat), on the student's own rollouts.

    Args:
        advantages: A of each token.
        log_ratio: log t − log θ of each token; −inf where the teacher rules it out.
        share: s; where it is 0 the factor is 1.
    """
    ratio = torch.exp(-share * log_ratio.clamp(-ANCHOR_NATS, ANCHOR_NATS))
    slope = torch.where(log_ratio.abs() < ANCHOR_NATS, 1.0, 1 - share)
    clipped = torch.where(advantages > 0, ratio > ANCHOR_HIGH, ratio < ANCHOR_LOW)
    return torch.where(clipped, 0.0, ratio * slope)


def confidence(entropy: Float[Tensor, "*B T"], routed: Float[Tensor, "*B T"]) -> Float[Tensor, "*B T"]:
    """Weight exp(−H(t)) of each token that learns from the teacher, before it is divided by its mean over those.

    A teacher that is unsure of the next token teaches less there. Source: Li et al., "Unifying Group-Relative and
    Self-Distillation Policy Optimization via Sample Routing", arXiv:2604.02288v1, §3.2, with β = 1.

    Args:
        entropy: H(t) of the next token, in nats.
        routed: 1 on tokens that learn from the teacher, 0 on others and on padding.
    """
    return torch.exp(-entropy) * routed


def accept_rewards(rewards: Float[Tensor, " B"], least: float | None = None) -> Bool[Tensor, " B"]:
    """Decide which completions a reward accepts.

    Args:
        rewards: reward of each completion; NaN, of one that could not be scored, is not accepted.
        least: smallest reward that is accepted, rounding aside (`reaches`); None accepts rewards strictly above 0.
    """
    return rewards > 0 if least is None else reaches(rewards, least)


def reaches(rewards: Float[Tensor, " *N"], least: float) -> Bool[Tensor, " *N"]:
    """Decide which rewards are at least another, of which `REWARD_TOLERANCE` is forgiven: of 0 nothing.

    Args:
        rewards: the rewards; NaN reaches nothing.
        least: what they have to reach.
    """
    return rewards >= least - REWARD_TOLERANCE * abs(least)


def imitation_loss(
    log_theta: Float[Tensor, "B T"],
    weights: Float[Tensor, " B"],
    mask: Float[Tensor, "B T"],
    count: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Compute −Σ w·log θ(x)/N, the loss of imitating completions of weight w; 0 where every weight is.

    With q held fixed and w the acceptance of a verifier, its gradient is −P(accepted)·E[∇log θ(y) | y accepted], so it
    takes θ towards q conditioned on success. A divisor of all tokens shrinks the step while few are accepted; one of
    the accepted tokens keeps its length.

    Args:
        log_theta: log-probability of each token under the student.
        weights: weight of each completion.
        mask: 1 on tokens, 0 on padding.
        count: N; where it is 0, so is the loss.
    """
    total = (weights[:, None] * log_theta * mask).sum()
    return -total / torch.where(count > 0, count, 1.0)


def effective_sample_size(log_weights: Float[Tensor, " *N"]) -> Float[Tensor, ""]:
    """Return (Σw)²/Σw²: the number of equally weighted samples that weigh as much together. 0 where every weight is 0.

    Source: Kish, "Survey Sampling", 1965; Liu, "Monte Carlo Strategies in Scientific Computing", 2001, §2.5.3.

    Args:
        log_weights: log w, of any scale: their exponentials may over- or underflow.
    """
    if not log_weights.gt(-torch.inf).any():
        return log_weights.new_zeros(())
    shares = log_weights.clamp(max=torch.finfo(log_weights.dtype).max).flatten().softmax(0)
    return 1 / shares.square().sum()
