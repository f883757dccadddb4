"""GRPO with rollouts from the mixture."""

from __future__ import annotations

import warnings
from typing import Any

import trl

from ..losses import keep_positive
from .config import GRPOConfig
from .mixin import MixtureTrainerMixin


class GRPOTrainer(MixtureTrainerMixin, trl.GRPOTrainer):
    """TRL's `GRPOTrainer` with `generator=`: rollouts from the mixture of a teacher and the model.

    Takes all that TRL's takes. By default half of each group is sampled from the student and trained on as TRL does;
    the other half comes from the mixture, shares the group's baseline, and is trained on with weight 1 where its
    advantage is positive. An evaluation samples from the student alone.

    Args:
        generator: where rollouts come from; see `OptimalSamplingGenerator`.
        args: our `GRPOConfig`, or TRL's, which gets the default correction.

    Example:
        ```python
        from optimal_sampling_trl import GRPOTrainer, OptimalSamplingGenerator

        trainer = GRPOTrainer(
            model="small", generator=OptimalSamplingGenerator(teacher="large"), reward_funcs=reward, train_dataset=data
        )
        trainer.train()
        ```
    """

    _name = "GRPO"
    config_class = GRPOConfig
    default_theta_fraction = 0.5

    def _check_settings(self) -> None:
        super()._check_settings()
        corrected = self.correction.name != "none"
        if corrected and not self.vllm_importance_sampling_correction:
            raise ValueError(
                f"`correction` is {self.correction.name!r} and `vllm_importance_sampling_correction` is False, with "
                "which TRL applies no weight. Leave the latter True, or set `correction='none'`."
            )
        alone = self.generator.theta_count(self._group_size(), self.default_theta_fraction)
        if corrected and alone == 0:
            warnings.warn(
                f"`correction={self.correction.name!r}` with groups that come from the mixture alone: in a study of "
                "4-digit addition every ratio theta/q on such groups collapsed (exact match .045 -> .002 with "
                "token_truncate, .000 with a mask, .09 on-policy). Leave `theta_fraction` at 0.5.",
                stacklevel=4,
            )
        if self.loss_type == "vespo":
            warnings.warn(
                "`loss_type='vespo'` on completions of the mixture: in a study of 4-digit addition it collapsed "
                "(exact match .045 -> .000). Use TRL's default loss.",
                stacklevel=4,
            )

    def _correct(self, output: dict[str, Any]) -> None:
        rows = output["mixture_rows"]
        if "importance_sampling_ratio" in output:  # (B, T) or (B, 1): TRL's own, of the trainer against the engine
            weights = self.correction.weights(
                output["log_theta"], output["log_q"], output["completion_mask"].float(), rows
            )
            output["importance_sampling_ratio"] = output["importance_sampling_ratio"] * weights
        if getattr(self.args, "positive_only", True):
            output["advantages"] = keep_positive(output["advantages"], rows)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        """TRL's rewards (all rows, functions); logs the mean of each half of the groups."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.model.training:
            total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
            group = self._group_size()
            alone = self.generator.theta_count(group, self.default_theta_fraction)
            grouped = total.view(-1, group)
            for name, half in (("theta", grouped[:, :alone]), ("mixture", grouped[:, alone:])):
                if half.numel():
                    self._metrics["train"][f"mixture/reward_{name}"].append(float(half.mean()))
        return rewards
