"""The part that GRPO and RLOO share: advantages that make use of the records."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import metrics
from ..losses import keep_positive
from ..user_warnings import warn_user
from . import columns
from .rewarded import RewardedTrainer


class PolicyGradientTrainer(RewardedTrainer):
    """Base of GRPO and RLOO: the advantages of the mixture's completions."""

    default_theta_fraction = 0.5

    def _check_settings(self) -> None:
        super()._check_settings()
        level = self.correction.name.split("_")[0]
        if level in ("prefix", "sequence"):
            warn_user(
                f"`correction={self.correction.name!r}`: on the embedded pair (recipes/studies/README.md) sequence "
                "ratios took the student to an exact match of 0.00 at every learning rate and prefix ratios to 0.13 "
                "at most; weight 1 reached 0.51. Use 'none' or the level 'token'.",
            )
        elif level == "token" and self._theta_count() == 0 and self._setting("positive_only") == "none":
            warn_user(
                f"`correction={self.correction.name!r}` on groups that come from the mixture alone, negatives kept: "
                "on the embedded pair (recipes/studies/README.md) this reached an exact match of 0.14, without "
                "them 0.44. Leave `positive_only` at 'all'.",
            )

    def _log_rewards(self) -> None:
        """Log the share of the groups whose rewards differ as well."""
        super()._log_rewards()
        rewards = self.rewards
        if (bounds := getattr(self.args, "reward_clip_range", None)) is not None:  # RLOO's, before its advantages
            rewards = rewards.clamp(*bounds)
        self._append_metrics(metrics.of_groups(rewards.view(-1, self.args.num_generations)))

    def _advantages(self, output: dict[str, Any]) -> Tensor:
        """Return TRL's advantages (B,), those below 0 set to 0 where `positive_only` asks for it."""
        advantages, mixed = output["advantages"], output[columns.MIXTURE_ROWS]
        positive_only = self._setting("positive_only")
        if positive_only == "none":
            return advantages
        return keep_positive(advantages, mixed if positive_only == "mixture" else torch.ones_like(mixed))
