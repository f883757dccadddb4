"""RLOO with rollouts from the mixture."""

from __future__ import annotations

from typing import Any

import trl

from .config import RLOOConfig
from .policy_gradient import PolicyGradientMixin


class RLOOTrainer(PolicyGradientMixin, trl.RLOOTrainer):
    """TRL's `RLOOTrainer` with `generator=`: rollouts from the mixture of a teacher and the model.

    Takes all that TRL's takes, and samples as our `GRPOTrainer` does. RLOO's loss has one ratio for a completion and
    no place for a weight, so a correction scales the advantage, in which the clipped objective is homogeneous for
    weights of at least 0: only the corrections of the level `sequence` can be chosen.

    Args:
        generator: where rollouts come from; see `OptimalSamplingGenerator`.
        args: our `RLOOConfig`, or TRL's, which gets the default correction.

    Example:
        ```python
        trainer = RLOOTrainer(
            model="small",
            generator=OptimalSamplingGenerator(teacher="large"),
            reward_funcs=reward,
            train_dataset=dataset,
            args=RLOOConfig("output/rloo", num_generations=4, per_device_train_batch_size=4),
        )
        trainer.train()
        ```
    """

    config_class = RLOOConfig

    def _check_settings(self) -> None:
        super()._check_settings()
        if not self.correction.name.startswith(("none", "sequence")):
            raise ValueError(
                f"`correction` is {self.correction.name!r}; RLOO weighs whole completions, so wanted 'none' or one of "
                "the level 'sequence', for example 'sequence_truncate'."
            )

    def _correct(self, output: dict[str, Any]) -> None:
        weights = self.correction.weights(
            output["log_theta"], output["log_q"], output["completion_mask"].float(), output["mixture_rows"]
        )
        output["advantages"] = self._advantages(output) * weights[:, 0]  # equal along a completion
