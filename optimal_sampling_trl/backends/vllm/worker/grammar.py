"""A grammar's mask, which vLLM writes into the logits that it was handed: the teacher's alone."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def rule_out(
    theta: Float[Tensor, "N V_theta"], teacher: Float[Tensor, "N V_engine"], masked: Bool[Tensor, "N 1"]
) -> Float[Tensor, "N V"]:
    """Return the student's raw logits over the common vocabulary with the grammar's mask on them, too.

    α is then that of both models under the grammar, and no token that it rules out has mass at any α. What the teacher
    had on these tokens is lost, so that its log-probabilities are not those of a record. Waits for no device.

    Args:
        theta: the student's raw logits.
        teacher: the teacher's, with the mask of the grammar: -inf on what it rules out.
        masked: the rows of requests with a grammar.
    """
    V = min(theta.shape[1], teacher.shape[1])
    return theta[:, :V].masked_fill(masked & teacher[:, :V].isneginf(), -torch.inf)
