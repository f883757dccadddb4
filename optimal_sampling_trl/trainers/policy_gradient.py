"""What GRPO and RLOO share: groups with a reward, whose advantages make use of the records."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..losses import keep_positive
from .config import PolicyGradientConfig
from .mixin import MixtureTrainerMixin


class PolicyGradientMixin(MixtureTrainerMixin):
    """Advantages of the mixture's completions, and the reward of each half of the groups."""

    default_theta_fraction = 0.5

    def _group_size(self) -> int:
        return self.args.num_generations

    def _check_settings(self) -> None:
        super()._check_settings()
        level = self.correction.name.split("_")[0]
        if level in ("prefix", "sequence"):
            warnings.warn(
                f"`correction={self.correction.name!r}`: on the embedded pair (recipes/README.md) sequence ratios "
                "took the student to an exact match of 0.00 at every learning rate and prefix ratios to 0.13 at most; "
                "weight 1 reached 0.51. Use 'none' or the level 'token'.",
                stacklevel=4,
            )
        elif level == "token" and self._theta_count() == 0 and self._positive_only == "none":
            warnings.warn(
                f"`correction={self.correction.name!r}` on groups that come from the mixture alone, negatives kept: "
                "on the embedded pair (recipes/README.md) this reached an exact match of 0.14, without "
                "them 0.44. Leave `positive_only` at 'all'.",
                stacklevel=4,
            )

    @property
    def _positive_only(self) -> str:
        return getattr(self.args, "positive_only", PolicyGradientConfig.positive_only)  # TRL's own has none

    def _advantages(self, output: dict[str, Any]) -> Tensor:
        """TRL's advantages (B,), those below 0 set to 0 where `positive_only` says so."""
        advantages, mixed = output["advantages"], output["mixture_rows"]
        if self._positive_only == "none":
            return advantages
        return keep_positive(advantages, mixed if self._positive_only == "mixture" else torch.ones_like(mixed))

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's rewards (rows of all processes, functions); logs the mean of each half of the groups."""
        inputs = self._own_inputs  # without the student's system prompt, as the dataset has them
        prompts = [example["prompt"] for example in inputs]
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.model.training:
            log, alone = self._metrics["train"], self._theta_count()
            totals = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
            totals = totals.masked_fill(rewards.isnan().all(dim=1), torch.nan)  # no function could score it, as in TRL
            grouped = totals.view(-1, self._group_size())
            differ = grouped.nan_to_num(nan=-torch.inf).amax(1) > grouped.nan_to_num(nan=torch.inf).amin(1)
            log["mixture/groups_with_signal"].append(float(differ.float().mean()))
            for name, half in (("theta", grouped[:, :alone]), ("mixture", grouped[:, alone:])):
                if half.numel():
                    log[f"mixture/reward_{name}"].append(float(half.nanmean()))
        return rewards
