"""The part that the trainers with rewards share: the reward of the student's completions and of the mixture's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import metrics
from .two_rounds import TwoRounds


class RewardedTrainer(TwoRounds):
    """Base of the trainers with rewards.

    Attributes:
        rewards: total reward (rows of all processes,) of the last batch; NaN where no function could score a row.
    """

    rewards: Tensor

    def _group_size(self) -> int:
        return self.args.num_generations

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """Compute TRL's rewards (rows of all processes, functions), and log them.

        The functions read prompts without the student's system prompt, as they stand in the dataset.
        """
        inputs = self._dataset_rows
        prompts = [example["prompt"] for example in inputs]
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.rewards = self._totals(rewards)
        self._log_rewards()
        return rewards

    def _log_rewards(self) -> None:
        """Log the mean reward of each half of the groups in training; TRL logs that of all rows."""
        if self.model.training:
            self._append_metrics(metrics.of_rewards(self.rewards, self._theta_rows()))
            self._append_metrics(metrics.of_groups(self.rewards.view(-1, self.args.num_generations)))
