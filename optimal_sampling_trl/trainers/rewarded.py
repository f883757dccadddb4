"""The part that the trainers with rewards share: what the student, the mixture and the teacher earn."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers.trainer_utils import has_length

from .. import metrics
from ..losses import accept_rewards
from ..user_warnings import warn_user
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
        self._evaluated: list[Tensor] = []  # rewards (rows, functions) of the evaluation that runs
        self._evaluated_data: Any = None  # its data set
        self._teacher: dict[tuple[str, int], tuple[Any, Tensor]] = {}  # each evaluation's data set, and its rewards
        check_reward_funcs(arguments.get("reward_funcs"))
        super().__init__(**arguments)
        self.reward_funcs = [
            checked(function, name) for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]

    def _group_size(self) -> int:
        return self.args.num_generations

    def _check_settings(self) -> None:
        super()._check_settings()
        chosen_by = self.args.metric_for_best_model  # transformers sets 'loss' where a best checkpoint is asked for
        if chosen_by is not None and chosen_by.endswith("loss") and self.args.eval_strategy != "no":
            warn_user(
                f"`metric_for_best_model` is {chosen_by!r}, by which the checkpoint of `load_best_model_at_end` is "
                "chosen and training is stopped early: an evaluation's loss does not say what the student earns. "
                "RAFT's may rise as more completions are accepted, that of GRPO and RLOO is about 0, and a dense term "
                "lowers all as it fades. Set `metric_for_best_model='eval_accepted/theta'` or 'eval_reward' (of a "
                "dictionary of data sets 'eval_<name>_accepted/theta'), and `greater_is_better=True`."
            )

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """Compute TRL's rewards (rows of all processes, functions); log training's, keep an evaluation's.

        The functions read prompts without the student's system prompt, as they stand in the dataset; in an environment
        they read TRL's, with what it added.
        """
        if "environment_factory" not in self.turn_makers:
            prompts = [example["prompt"] for example in self._dataset_rows]
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.rewards = self._totals(rewards)
        if not self.model.training:
            self._evaluated.append(rewards)
            return rewards
        self._log_rewards()
        if not self.generator.two_rounds:  # else the mixture's are for prompts where the student fails
            self._tell(self._overtaking.add(self.rewards, self._theta_rows()))
        return rewards

    def _log_rewards(self) -> None:
        """Log rewards and acceptance of a training batch, of the student's completions and of the mixture's."""
        halves = self._halves()
        self._append_metrics(metrics.of_rewards(self.rewards, *halves))
        rows = (self.rewards, self._accepts(self.rewards), *halves)
        self._append_metrics(metrics.of_acceptance(*(values.view(-1, self.args.num_generations) for values in rows)))

    def _own_rows(self, of_all: Tensor) -> Tensor:
        """Return this process's part of a value for each row of all processes, which have equally many."""
        return of_all.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def _accepts(self, rewards: Tensor) -> Tensor:
        """Return True for each reward that accepts its completion."""
        return accept_rewards(rewards)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Do as transformers does, and keep the given data set: a loader may hold another object each time."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        self._evaluated_data = self.eval_dataset[data] if isinstance(data, str) else data
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        self._evaluated_data = test_dataset
        return super().get_test_dataloader(test_dataset)

    def evaluation_loop(self, dataloader: Any, *positional: Any, metric_key_prefix: str = "eval", **named: Any) -> Any:
        """Evaluate as TRL does, report what student and teacher earn alone, and tell whom the student has passed.

        Rewards and acceptance are means over all completions, where TRL takes one over batches, of which the last may
        be smaller.
        """
        self._evaluated.clear()
        output = super().evaluation_loop(dataloader, *positional, metric_key_prefix=metric_key_prefix, **named)
        if self._evaluated:
            rewards = self._evaluated_rewards(dataloader)
            student, teacher = self._totals(rewards), self._teacher_rewards(dataloader, metric_key_prefix)
            numbers = self._numbers_of_student(rewards, student)
            if teacher is not None:
                numbers |= metrics.of_teacher(teacher, self._accepts(teacher))
            self._report(output, metric_key_prefix, {name: [value] for name, value in numbers.items()})
            self._tell(self._overtaking.evaluate(student, teacher))
        return output

    def _evaluated_rewards(self, dataloader: Any) -> Tensor:
        """Return the rewards (rows, functions) of an evaluation, without the rows that processes sampled twice.

        accelerate fills the last batches of several processes with the first rows. Those of a stream, whose length is
        not known, stay.
        """
        rewards = torch.cat(self._evaluated)
        if not has_length(dataloader):
            return rewards
        return rewards[: self.num_examples(dataloader) * self.num_generations_eval]

    def _numbers_of_student(self, rewards: Tensor, totals: Tensor) -> dict[str, float]:
        """Return what the student earns in an evaluation.

        Args:
            rewards: of each function (rows, functions).
            totals: of each row (rows,).
        """
        every = torch.ones_like(totals, dtype=torch.bool)
        rows = (totals, self._accepts(totals), every, ~every)
        named = {"reward": totals}  # TRL's names; functions of one name share a number
        for name in self.reward_func_names:
            named[f"rewards/{name}/mean"] = rewards[:, [other == name for other in self.reward_func_names]]
        return {
            **{name: float(values.nanmean()) for name, values in named.items()},
            **metrics.of_acceptance(*(values.view(-1, self.num_generations_eval) for values in rows)),
        }

    def _teacher_rewards(self, dataloader: Any, name: str) -> Tensor | None:
        """Return the rewards of the teacher alone on the prompts of an evaluation, measured once for each data set.

        A teacher that is the student of the moment has none: they would be another model's by the next evaluation.

        Args:
            dataloader: of the evaluation.
            name: prefix of its metrics.
        """
        if not self.is_in_train or not self._setting("evaluate_teacher") or self.generator.is_the_student:
            return None
        data = self._evaluated_data
        key = name, id(data)  # of a data set that is kept, so that no other gets its id
        if key not in self._teacher:
            self._evaluated.clear()
            with self._teacher_alone():
                for inputs in dataloader:
                    self._generate_and_score_completions(inputs)
            self._teacher[key] = data, self._totals(self._evaluated_rewards(dataloader))
        return self._teacher[key][1]

    @contextmanager
    def _teacher_alone(self) -> Iterator[None]:
        """Let the teacher alone sample inside the block; logs, rewards, rollouts and random numbers stay."""
        engine, device = self.vllm_generation, self.accelerator.device
        plan, engine.plan = engine.plan, replace(engine.plan, teacher_alone=True)
        try:
            with (
                patch.dict(self._metrics, {"eval": defaultdict(list)}),
                patch.object(self, "_logs", copy.deepcopy(self._logs)),
                patch.object(self, "rewards", self.rewards),
                patch.object(self, "rollouts", self.rollouts),
                patch.object(self, "advantages", self.advantages),
                torch.random.fork_rng([device] if device.type == "cuda" else []),
            ):
                yield
        finally:
            engine.plan = plan

    def _tell(self, message: str | None) -> None:
        if message is not None and self.accelerator.is_main_process:
            logger.warning(message)
