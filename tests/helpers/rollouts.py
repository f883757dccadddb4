"""Rollouts by hand, for the tests of what is made of rollouts."""

from __future__ import annotations

import math
from typing import Any

import torch

from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.rollouts.rollout import RECORDS, Rollout

LOG = {share: math.log(share) for share in (0.1, 0.2, 0.25, 0.4, 0.5, 0.8)}


def rollout(**fields: Any) -> Rollout:
    """Three tokens with θ = (0.2, 0.25, 0.4), t = (0.8, 0.25, 0.1) and q = (0.4, 0.25, 0.2)."""
    values: dict[str, Any] = {
        "prompt_ids": [5, 6],
        "theta_prompt_ids": [7],
        "completion_ids": [1, 2, 3],
        "alpha": torch.tensor([0.5, 0.0, 1.0]),
        "log_q": torch.tensor([LOG[0.4], LOG[0.25], LOG[0.2]]),
        "log_theta": torch.tensor([LOG[0.2], LOG[0.25], LOG[0.4]]),
        "log_teacher": torch.tensor([LOG[0.8], LOG[0.25], LOG[0.1]]),
        "text": "abc",
        "finish_reason": "stop",
        "mixture": Mixture(),
    }
    return Rollout(**(values | fields))


def empty() -> Rollout:
    return rollout(completion_ids=[], text="", **{name: torch.zeros(0) for name in RECORDS})
