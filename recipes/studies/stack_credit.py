"""Credit of single tokens from the records log θ and log t, as three papers have it.

- `evidence`: RLSD, arXiv:2604.03128, §4.1. Read in a translation of §1 to §4, and in its code, iie-ycx/RLSD@93e46f7:
  verl/workers/actor/dp_opsd_actor.py:221-239, examples/visual_rl/rlsd_train.sh (λ = 0.5, clip 0.2).
- `wrong_*`: SRPO, arXiv:2604.02288v1, §3, Table 3 and Appendix B.5. Read in the text of the paper.
- `anchored`: RLAD, arXiv:2602.22495v2: `optimal_sampling_trl.losses.anchor_factor`. Read in the text of the paper.

In all three the rollouts are the student's. RLSD's and SRPO's teacher is the student itself with an answer in its
prompt, and SRPO leaves groups in which nobody is right to the reward, since it has no answer for them; here a better
model is the teacher, of every completion. One update follows each batch, so that θ is the policy that is improved.

Shapes as in `stack.py`; `log_ratio` is log t − log θ of the sampled token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimal_sampling_trl.losses import confidence

EVIDENCE_CLIP = 0.2


def evidence_factor(advantages: Tensor, log_ratio: Tensor, share: Tensor) -> Tensor:
    """RLSD's factor of each advantage: 1 − λ + λ·clip((t/θ)^sign(A), 0.8, 1.2), λ the `share`.

    The reward says whether a token becomes likelier, the teacher how much.
    """
    weight = torch.exp(advantages.sign() * log_ratio).clamp(1 - EVIDENCE_CLIP, 1 + EVIDENCE_CLIP)
    return 1 + share * (weight - 1)


def routed_weights(log_teacher: Tensor, routed: Tensor) -> Tensor:
    """SRPO's weight (S, B, T) of each token that the teacher teaches: exp(−H(t)), with a mean of 1 over those.

    Args:
        log_teacher: log t over the vocabulary, (S, B, T, V).
        routed: 1 on those tokens, (S, B, T).
    """
    weight = confidence(-(log_teacher.exp() * log_teacher).sum(-1), routed)
    total, count = weight.sum((1, 2), keepdim=True), routed.sum((1, 2), keepdim=True)
    return weight * count / total.clamp(min=1e-9)
