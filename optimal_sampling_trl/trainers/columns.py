"""The columns that these trainers add to TRL's batch of B completions of at most T tokens.

TRL shuffles and splits a column that has a row for each completion, and hands on a single number as it is.
"""

from __future__ import annotations

from ..rollouts.rollout import RECORDS

ALPHA, LOG_Q, LOG_THETA, LOG_TEACHER = RECORDS
"""The records (B, T), under the names that a rollout has for them; 0 where no token was sampled."""
MIXTURE_ROWS = "mixture_rows"
"""True (B,) where the mixture sampled the completion."""
DENSE_IDS = "dense_ids"
"""The likely tokens (B, T, K) of the dense records, the student's K/2 before the teacher's."""
DENSE_LOG_TEACHER = "dense_log_teacher"
"""Their log-probabilities (B, T, K) under the teacher."""
DENSE_TOKENS = "dense_tokens"
"""The number of tokens of all processes that the dense term is a mean over."""
DENSE_WEIGHTS = "dense_weights"
"""The weight (B, T) of each token in the dense term; without it each has 1."""
CORRECTION_WEIGHTS = "weights"
"""The correction's weights (B, T) in distillation; an evaluation has none."""
MEAN_LOG_RATIO = "mean_log_ratio"
"""The mean of log t − log θ (B,) that the loss `"sampled_token"` is centred by, the same in each row."""
IMITATION_WEIGHTS = "imitation_weights"
"""RAFT's weight (B,) of each completion, 0 where it is not accepted."""


def dense_scalar(name: str) -> str:
    """Return the column (B, T) of one of the scalars of dense records."""
    return f"dense_{name}"
