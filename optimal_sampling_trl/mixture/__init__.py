"""The mixture of a student and a teacher that rollouts are sampled from, and the weight α that it gives the teacher.

| symbol | name in code  | shape    | meaning                                                                        |
|--------|---------------|----------|--------------------------------------------------------------------------------|
| θ      | `log_theta`   | (N, V)   | the student's distribution at the sampling temperature, as log-probabilities   |
| t      | `log_teacher` | (N, V)   | the teacher's, likewise                                                        |
| ℓ      | `log_ratio`   | (N, V)   | log t − log θ, in nats                                                         |
| α      | `alpha`       | (N,)     | the weight of the teacher, in [alpha_min, alpha_max] ⊆ [0, 1]                  |
| q_α    | `log_q`       | (N, V)   | the mixture: q_α(v) = θ(v)^(1-α) t(v)^α / Z(α)                                 |
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

A root is clamped to [alpha_min, alpha_max]. Where θ and t are the same distribution (their Jeffreys divergence,
E_t[ℓ] − E_θ[ℓ], is below 1e-9 nats, under which α would be rounding noise) every α is a solution of the first two: the
middle of the range is taken. α = 0 is the student alone and α = 1 the teacher alone, exactly. In between, a token
that either model gives no mass has none under q and takes no part in an expectation.
"""

from __future__ import annotations

from .mixing import blend, fold_eos, log_distributions, mix
from .settings import CERTAIN_LOGIT, FIELDS, METHODS, SAME_DIVERGENCE, Mixture, MixtureRows, precision
from .solver import solve_alpha

__all__ = [
    "CERTAIN_LOGIT",
    "FIELDS",
    "METHODS",
    "SAME_DIVERGENCE",
    "Mixture",
    "MixtureRows",
    "blend",
    "fold_eos",
    "log_distributions",
    "mix",
    "precision",
    "solve_alpha",
]
