"""Models of one family that end with different tokens, as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def fold_eos(teacher_logits: Float[Tensor, "N V"], teacher_eos: Sequence[int], theta_eos: int) -> Float[Tensor, "N V"]:
    """Move the mass of the teacher's end-of-sequence tokens to the student's.

    Models of one family may end with different tokens (Qwen3 and Qwen3-Base). Unfolded, the two distributions never
    agree that a sequence is over. The function acts on raw logits, before the temperature.

    Args:
        teacher_logits: the teacher's raw logits.
        teacher_eos: the teacher's end-of-sequence ids that the student does not end with. Those beyond V, which are
            never drawn, are left out.
        theta_eos: the student's end-of-sequence id, which takes their mass.

    Returns:
        The folded logits, -inf at `teacher_eos`; the given tensor itself where there is nothing to fold.
    """
    teacher_eos = [id for id in teacher_eos if id < teacher_logits.shape[1]]
    if not teacher_eos:
        return teacher_logits
    folded = teacher_logits.clone()
    # Columns one by one: a list of them would be copied to the device, and a step would wait.
    ends = torch.stack([teacher_logits[:, id] for id in (theta_eos, *teacher_eos)], dim=-1)
    folded[:, theta_eos] = torch.logsumexp(ends, dim=-1)
    for id in teacher_eos:
        folded[:, id] = -torch.inf
    return folded
