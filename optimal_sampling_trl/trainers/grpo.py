"""GRPO with rollouts from the mixture."""

from __future__ import annotations

import warnings
from typing import Any

import trl

from ..losses import sampled_token_coefficients
from .config import GRPOConfig
from .policy_gradient import PolicyGradientMixin

VESPO = ("none", "token_truncate", "token_mask")
"""The corrections that the loss of this name can take: a weight of each token, and 1 on padding."""


class GRPOTrainer(PolicyGradientMixin, trl.GRPOTrainer):
    """TRL's `GRPOTrainer` with `generator=`: rollouts from the mixture of a teacher and the model.

    Takes all that TRL's takes. By default half of each group is sampled from the student, the other half from the
    mixture, with weight 1; they share the group's baseline, and a completion is trained on where its advantage is
    positive (`GRPOConfig.positive_only`). An evaluation samples from the student alone.

    Args:
        generator: where rollouts come from; see `OptimalSamplingGenerator`.
        args: our `GRPOConfig`, or TRL's, which gets the default correction.

    Example:
        ```python
        trainer = GRPOTrainer(
            model="small",
            generator=OptimalSamplingGenerator(teacher="large"),
            reward_funcs=reward,  # as TRL's: a function of completions, prompts and the dataset's columns
            train_dataset=dataset,
        )
        trainer.train()
        ```
    """

    args: Any
    config_class = GRPOConfig

    def _check_settings(self) -> None:
        super()._check_settings()
        if self.correction.name != "none" and not self.args.vllm_importance_sampling_correction:
            raise ValueError(
                f"`correction` is {self.correction.name!r} and `vllm_importance_sampling_correction` is False, with "
                "which TRL applies no weight. Leave the latter True, or set `correction='none'`."
            )
        if self.args.loss_type == "vespo":
            if self.correction.name not in VESPO:
                raise ValueError(
                    f"`correction` is {self.correction.name!r} and `loss_type` 'vespo', which multiplies the weights "
                    f"of a completion's tokens itself; wanted one of {', '.join(VESPO)}."
                )
            warnings.warn(
                "`loss_type='vespo'` on completions of the mixture: in a study of 4-digit addition it collapsed "
                "(exact match .045 -> .000), on the embedded pair (recipes/README.md) it did not (0.43). "
                "Watch the evaluation.",
                stacklevel=3,
            )
        if self.args.beta != 0 or self.args.off_policy_mask_threshold is not None:
            warnings.warn(
                f"`beta` is {self.args.beta} and `off_policy_mask_threshold` {self.args.off_policy_mask_threshold}: "
                "TRL computes both on the mixture's tokens as if they were the student's own. "
                "Leave them at 0 and None.",
                stacklevel=3,
            )

    def _correct(self, output: dict[str, Any]) -> None:
        mask = output["completion_mask"].float()
        if "importance_sampling_ratio" in output:  # (B, T) or (B, 1): TRL's own, of the trainer against the engine
            weights = self.correction.weights(output["log_theta"], output["log_q"], mask, output["mixture_rows"])
            output["importance_sampling_ratio"] = output["importance_sampling_ratio"] * weights
        output["advantages"] = self._advantages(output)
        if coefficient := getattr(self.args, "distillation_coefficient", 0.0):
            towards_teacher = sampled_token_coefficients(
                output["log_teacher"], output["log_theta"], mask, clip=self.args.distillation_clip
            )
            output["advantages"] = output["advantages"][:, None] + coefficient * towards_teacher  # (B, T)
