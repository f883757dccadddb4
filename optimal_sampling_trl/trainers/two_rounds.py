"""Rows of the mixture by what the student can do alone: its own rows of a group are sampled and scored first.

With `mixture_below` the others are the mixture's where none of these is good enough, and the student's elsewhere. With
`alpha_by_success` they are sampled from the mixture annealed to the student by the share of these that are.
A batch takes two calls of the engine, each as long as its longest completion. Reward functions run once for each
completion, in two calls a batch: the first reads the student's own rows of each group, the second all others. A
function that compares the completions of a group sees only a part of it at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import metrics
from ..losses import REWARD_TOLERANCE, reaches
from ..rollouts.rollout import Rollout
from .mixture_trainer import MixtureTrainer
from .reward_functions import check_totals

CLIPPED_RATIO = "completions/clipped_ratio"
"""TRL's name of the share of completions that did not end."""
CALLS, FAILURES = "tools/call_frequency", "tools/failure_frequency"
"""TRL's names of the calls of tools for each completion, and of the share of them that failed."""


class Round(NamedTuple):
    """A round of sampling: what TRL's `_generate` returned, the turns of its rows, and the seconds of the engine."""

    output: Any
    turns: list[list[Rollout]]
    seconds: float


class TwoRounds(MixtureTrainer):
    """Base of the trainers with rewards: samples a batch in two rounds where the generator asks for it."""

    _first_rewards: Tensor | None = None
    """Of the first round, all processes' (rows, functions), until the second is scored."""

    def _check_settings(self) -> None:
        super()._check_settings()
        if not self.generator.two_rounds:
            return
        setting = self.generator.two_rounds_setting()
        group, alone = self.args.num_generations, self._theta_count()
        rows = self.args.per_device_train_batch_size * self.args.steps_per_generation
        if group < 2 or not 0 < alone < group:
            raise ValueError(
                f"{setting}, and of a group of {group} the student samples {alone} alone; wanted some of each kind: "
                "the first are looked at, the others follow. Set `theta_fraction`, and `num_generations` to at least "
                "2."
            )
        if rows % group:
            raise ValueError(
                f"{setting}, and a process samples {rows} completions at a time, no whole number of groups of "
                f"{group}: a group's first rows would be scored in another process. Set "
                "`per_device_train_batch_size` times `steps_per_generation` to a multiple of `num_generations`."
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Do as TRL does; afterwards the plan says again who samples which row."""
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            if self.vllm_generation.plan.annealed is not None:
                self._first_rewards = None
                self._anneal(None)

    def _generate(self, prompts: list[Any]) -> Any:
        """Sample as TRL does, the rows that the student samples alone first, and score these.

        Returns:
            what TRL's returns of all rows.
        """
        if not self.generator.two_rounds or not self.model.training:
            return super()._generate(prompts)
        first, second = self._rounds(len(prompts))
        if not second:  # once `mixture_weight_steps` are over, all rows are the student's
            return super()._generate(prompts)
        processes = self.accelerator.num_processes
        one = self._sample_round(prompts, first, [1.0] * (len(first) * processes))
        self._first_rewards = self._score(first, one.output)
        by_group = self._shares(self._first_rewards).view(processes, -1)
        shares = by_group.repeat_interleave(len(second) // by_group.shape[1], 1)  # of the second round's rows
        other = self._sample_round(prompts, second, shares.flatten().tolist())
        engine = self.vllm_generation
        engine.turns = interleave(one.turns, other.turns, first, second)
        engine.seconds = one.seconds + other.seconds
        self._merge_numbers(len(first) / len(prompts))
        of_all = by_group.new_ones(processes, len(prompts))
        of_all[:, second] = shares
        self._anneal(of_all.flatten().tolist())
        self._append_metrics(metrics.of_own_rows(by_group, self.generator.alpha_by_success is not None))
        return tuple(interleave(*parts, first, second) for parts in zip(one.output, other.output, strict=True))

    def _rounds(self, rows: int) -> tuple[list[int], list[int]]:
        """Return the rows of this process that are sampled first, and the others."""
        group, alone = self._group_size(), self._theta_count()
        return [i for i in range(rows) if i % group < alone], [i for i in range(rows) if i % group >= alone]

    def _halves(self) -> tuple[Tensor, Tensor]:
        """Return True in the rows of all processes (rows,) that stand for the student, and in those of the mixture.

        Of two rounds the first stands for the student: in the second it has the prompts that it solved in the first.
        """
        student_rows = theta_rows = self._theta_rows()
        if self.generator.two_rounds and self.model.training:
            first, _ = self._rounds(len(theta_rows))  # each process's rows are whole groups
            student_rows = torch.zeros_like(theta_rows)
            student_rows[first] = True
        return student_rows, ~theta_rows

    def _anneal(self, shares: Sequence[float] | None) -> None:
        """Anneal the mixture of each row of all processes in the next call; None leaves it to the plan."""
        self.vllm_generation.plan = replace(self.vllm_generation.plan, annealed=shares)

    def _sample_round(self, prompts: list[Any], rows: list[int], shares: Sequence[float]) -> Round:
        """Sample some rows of this process; `shares` say how near the student each row of all processes is sampled."""
        engine = self.vllm_generation
        of_teacher = engine.teacher_prompts
        self._anneal(shares)
        engine.teacher_prompts = None if of_teacher is None else [of_teacher[row] for row in rows]
        output = super()._generate([prompts[row] for row in rows])
        engine.teacher_prompts = of_teacher
        return Round(output, engine.pop_turns(), engine.seconds)

    def _score(self, rows: list[int], output: Any) -> Tensor:
        """Return TRL's rewards (rows of all processes, functions) of what its `_generate` returned."""
        inputs = [self._dataset_rows[row] for row in rows]
        completions = output[3 if len(output) > 3 else 2]  # GRPO's, RLOO's
        return super()._calculate_rewards(inputs, [one["prompt"] for one in inputs], completions, output[1])

    def _shares(self, rewards: Tensor) -> Tensor:
        """Return how near the student the other rows of each group (groups,) are sampled, by those of the first round.

        1 is the student alone, 0 the mixture as it is. A row that no function could score is no success.
        """
        totals = self._totals(rewards).view(-1, self._theta_count()).cpu()
        below, success = self.generator.mixture_below, self.generator.alpha_by_success
        if success is not None:
            return reaches(totals, success).double().mean(dim=1)
        assert below is not None
        return reaches(totals, below).any(dim=1).double()

    def _totals(self, rewards: Tensor) -> Tensor:
        """Return the total reward of each row; NaN where no function could score it, as in TRL.

        A total that is 0 but for the rounding of what cancels in it is 0: else the default would accept it.

        Raises:
            ValueError: where one is not finite.
        """
        parts = rewards * self.reward_weights.to(rewards.device)
        totals = parts.nansum(dim=1)
        check_totals(rewards, self.reward_weights, totals, self.reward_func_names)
        cancels = totals.abs() <= REWARD_TOLERANCE * parts.abs().nansum(dim=1)
        return totals.masked_fill(cancels, 0.0).masked_fill(rewards.isnan().all(dim=1), torch.nan)

    def _merge_numbers(self, share: float) -> None:
        """Make TRL's numbers of both rounds those of one; the first had this share of the rows."""
        of_rounds = ("completions/", "tools/")
        columns = {name: column for name, column in self._metrics["train"].items() if name.startswith(of_rounds)}
        second, first = ({name: column.pop() for name, column in columns.items()} for _ in range(2))
        for name, value in merge_numbers(first, second, share).items():
            columns[name].append(value)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """Return the rewards of all rows (rows of all processes, functions); the first round is not scored again."""
        if self._first_rewards is None:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        rounds = first, second = self._rounds(len(prompts))
        columns = ([column[row] for row in second] for column in (inputs, prompts, completions, completion_ids_list))
        processes = self.accelerator.num_processes
        rewards = self._first_rewards.new_empty(processes, len(prompts), self._first_rewards.shape[1])
        for rows, part in zip(rounds, (self._first_rewards, super()._calculate_rewards(*columns)), strict=True):
            rewards[:, rows] = part.view(processes, len(rows), -1)
        for name, values in self._pending_extra_logs.items():  # a reward function's columns of TRL's table
            if len(values) == len(prompts):
                whole = interleave(values[: len(first)], values[len(first) :], first, second)
                self._pending_extra_logs[name] = whole
        return rewards.flatten(0, 1)


def interleave(one: Any, other: Any, first: Sequence[int], second: Sequence[int]) -> Any:
    """Put two lists of rows together, in the order of the batch; what is no list of rows is returned as it is.

    Args:
        one: of the rows `first`.
        other: of the rows `second`.
        first: numbers of rows in the batch.
        second: all others.
    """
    if not isinstance(one, list) or len(one) != len(first):
        return one
    rows = dict(zip([*first, *second], [*one, *other], strict=True))
    return [rows[row] for row in range(len(rows))]


def merge_numbers(first: Mapping[str, float], second: Mapping[str, float], share: float) -> dict[str, float]:
    """Merge TRL's numbers of the completions in two rounds, their lengths and calls of tools, into those of all rows.

    TRL writes 0 for the lengths of the completions that ended where none did, and for the share of the calls that
    failed where there were none. That round then has no part in them.

    Args:
        first: numbers of the first round by TRL's names; lengths are in tokens.
        second: those of the second round.
        share: share of the rows in the first round, strictly between 0 and 1.
    """
    rounds = ((share, first), (1 - share, second))
    rows = (share, 1 - share)
    ended = tuple(part * (1 - numbers[CLIPPED_RATIO]) for part, numbers in rounds)
    calls = tuple(part * numbers.get(CALLS, 0.0) for part, numbers in rounds)
    merged = {}
    for name in first:
        weights = ended if "_terminated_" in name else calls if name == FAILURES else rows
        parts = [(weight, numbers[name]) for weight, numbers in zip(weights, (first, second)) if weight > 0]
        values = [value for _, value in parts]
        if "/min_" in name or "/max_" in name:
            merged[name] = (min if "/min_" in name else max)(values, default=0.0)
        else:
            merged[name] = sum(weight * value for weight, value in parts) / (sum(weights) or 1.0)
    return merged
