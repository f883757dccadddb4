"""The part that the trainers with rewards share: the reward of the student's completions and of the mixture's."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from .. import metrics
from .dense_term import DenseTermTrainer
from .overtaking import Overtaking
from .reward_functions import check_reward_funcs, checked
from .two_rounds import TwoRounds

logger = logging.getLogger(__name__)


class RewardedTrainer(TwoRounds, DenseTermTrainer):
    """Base of the trainers with rewards.

    Attributes:
        rewards: total reward (rows of all processes,) of the last batch; NaN where no function could score a row.
    """

    rewards: Tensor
    reward_funcs: Any
    """TRL's, each with its call and its result checked."""

    def __init__(self, **arguments: Any) -> None:
        self._overtaking = Overtaking()
        check_reward_funcs(arguments.get("reward_funcs"))
        super().__init__(**arguments)
        self.reward_funcs = [
            checked(function, name) for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]

    def _group_size(self) -> int:
        return self.args.num_generations

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """Compute TRL's rewards (rows of all processes, functions), and log them.

        The functions read prompts without the student's system prompt, as they stand in the dataset; in an environment
        they read TRL's, with what it added.
        """
        if "environment_factory" not in self.turn_makers:
            prompts = [example["prompt"] for example in self._dataset_rows]
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.rewards = self._totals(rewards)
        self._log_rewards()
        self._tell_of_overtaking()
        return rewards

    def _tell_of_overtaking(self) -> None:
        """Log a warning, once, where the student's completions have come to earn more than the mixture's.

        With `mixture_below` the two are not compared: the mixture's are for prompts where the student fails.
        """
        if not self.model.training or self._overtaking.told or self.generator.mixture_below is not None:
            return
        message = self._overtaking.add(self.rewards, self._theta_rows())
        if message is not None and self.accelerator.is_main_process:
            logger.warning(message)

    def _log_rewards(self) -> None:
        """Log the mean reward of each half of the groups in training; TRL logs that of all rows."""
        if self.model.training:
            self._append_metrics(metrics.of_rewards(self.rewards, self._theta_rows()))
            self._append_metrics(metrics.of_groups(self.rewards.view(-1, self.args.num_generations)))
