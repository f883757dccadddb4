"""The mixture of a student and a teacher that rollouts are sampled from, and the weight α that it gives the teacher.

| symbol | name in code  | shape    | meaning                                                                        |
|--------|---------------|----------|--------------------------------------------------------------------------------|
| θ      | `log_theta`   | (N, V)   | the student's distribution at the sampling temperature, as log-probabilities   |
| t      | `log_teacher` | (N, V)   | the teacher's, likewise                                                        |
| ℓ      | `log_ratio`   | (N, V)   | log t − log θ, in nats                                                         |
| α      | `alpha`       | (N,)     | the weight of the teacher, in [alpha_min, alpha_max] ⊆ [0, 1]                  |
| q_α    | `log_q`       | (N, V)   | the mixture, geometric by default: q_α(v) = θ(v)^(1-α) t(v)^α / Z(α)           |
| N, V   |               |          | rows to sample; tokens that both vocabularies have                             |

q_α is the exponential family θ(v) e^(αℓ(v)) / Z(α), so that d/dα log Z = E_q[ℓ], which rises in α with slope
Var_q[ℓ] ≥ 0. Each method asks for one α in each row:

- `kl_symmetry`: KL(q‖θ) = KL(q‖t). Since KL(q‖θ) = αE_q[ℓ] − log Z and KL(q‖t) = (α−1)E_q[ℓ] − log Z, this is
  E_q[ℓ] = 0: the minimum of the convex log Z, the Chernoff point of θ and t.
- `ess_balance`: Σθ²/q = Σt²/q, equal effective sample sizes of the weights θ/q and t/q. As the two sums are
  Z·Σθe^(-αℓ) and Z·Σθe^((2-α)ℓ), the difference of their logarithms rises in α.
- `trust_region`: the largest α with KL(q‖θ) ≤ ε, a rising function of α with slope α·Var_q[ℓ]
  (Plyusov et al., "Trust-Region Behavior Blending for On-Policy Distillation", arXiv:2605.31159).
- `entropy`: α = H(θ) / (H(θ) + H(t)), a heuristic: the surer model weighs more.
- `fixed`: α = fixed_alpha.
- `entropy_gate`: α = min(1, H(θ)/γ) with γ = `entropy_scale`: the teacher enters where the student is unsure
  (MENTOR, arXiv:2510.04140, which mixes arithmetically).
- `top_k_swap`: α = 1 − θ(S), where S are the teacher's K = `swap_top_k` likeliest tokens (below).

A root is clamped to [alpha_min, alpha_max]. Where θ and t are the same distribution (their Jeffreys divergence,
E_t[ℓ] − E_θ[ℓ], is below 1e-9 nats, under which α would be rounding noise) every α is a solution of the first two: the
middle of the range is taken. α = 0 is the student alone and α = 1 the teacher alone, exactly. In between, a token
that either model gives no mass has none under q and takes no part in an expectation.

The form `arithmetic` is q_α = (1-α)θ + αt instead: a token that either model has, q has too. It is the mixture that
MiniLLM (arXiv:2306.08543) and MENTOR (arXiv:2510.04140) sample from. Its methods:

- `kl_symmetry`: E_q[ℓ] = (1-α)E_θ[ℓ] + αE_t[ℓ] = 0, so that α = KL(θ‖t) / (KL(θ‖t) + KL(t‖θ)). The sums are over the
  tokens that both models have.
- `trust_region`: KL(q‖θ) = Σ q log w with w = q/θ = 1 - α + αe^ℓ is convex in α and has the slope Σ (t-θ) log w. It is
  infinite for any α > 0 where the teacher has a token that the student has not.
- `entropy`, `fixed`, `entropy_gate`: as above.
- `ess_balance` is refused: Σ(θ²-t²)/q = 2Σ(θ-t) = 0 at α = 1/2, whatever the models.

The method `top_k_swap` has a q of its own. The student draws a token, which is kept where it is in S; otherwise the
teacher draws another one in its place (SKD, arXiv:2410.11325). So q(v) = θ(v)·1[v ∈ S] + α·t(v), where α = 1 − θ(S) is
the probability that a token is swapped. A token that ties with the K-th is in S, one that the teacher rules out never
is; where K is the vocabulary or more, S is all that the teacher has. q has no token that the teacher has not.
"""

from __future__ import annotations

from .folding import fold_eos
from .mixing import blend, has_kernels, log_distributions, mix, mix_at
from .settings import (
    CERTAIN_LOGIT,
    CHOICES,
    FIELDS,
    FORMS,
    METHODS,
    SAME_DIVERGENCE,
    SWAP,
    Mixture,
    MixtureRows,
    precision,
)
from .solver import solve_alpha

__all__ = [
    "CERTAIN_LOGIT",
    "CHOICES",
    "FIELDS",
    "FORMS",
    "METHODS",
    "SAME_DIVERGENCE",
    "SWAP",
    "Mixture",
    "MixtureRows",
    "blend",
    "fold_eos",
    "has_kernels",
    "log_distributions",
    "mix",
    "mix_at",
    "precision",
    "solve_alpha",
]
