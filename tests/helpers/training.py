"""Trainers on untrained pairs that speak the embedded task's tokens, and what the tests look at while they train."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import pair as embedded
from helpers.oracle import check_rollout
from optimal_sampling_trl import (
    DistillationConfig,
    DistillationTrainer,
    GRPOConfig,
    GRPOTrainer,
    Mixture,
    OptimalSamplingGenerator,
    RAFTConfig,
    RAFTTrainer,
    RLOOConfig,
    RLOOTrainer,
    Rollout,
)
from optimal_sampling_trl.pairing.source import EVERY_RANK
from optimal_sampling_trl.rollouts.rollout import RECORDS
from optimal_sampling_trl.trainers.records import loss_mask

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "grpo": (GRPOTrainer, GRPOConfig, {"num_generations": 4}),
    "rloo": (RLOOTrainer, RLOOConfig, {"num_generations": 4}),
    "divergence": (DistillationTrainer, DistillationConfig, {}),
    "dense": (DistillationTrainer, DistillationConfig, {"loss": "dense"}),
    "sampled_token": (DistillationTrainer, DistillationConfig, {"loss": "sampled_token"}),
    "raft": (RAFTTrainer, RAFTConfig, {}),
}
"""Each loss: its trainer, its configuration, and what the configuration needs."""

BASE: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": False,
    "max_completion_length": 10,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
TEXTS = ["31=", "2718=", "161803398874=", "5=", "1414213562=", "60221=", "299792458=", "662607=", "9=", "1729="]
"""Prompts of many lengths."""
PROMPTS = [f"{number}{text}" for number in range(4) for text in TEXTS]
TEACHER_PROMPTS = [f"{text[::-1]}{text}" if index % 2 else None for index, text in enumerate(PROMPTS)]
"""A column of what the teacher reads in place of them; None is the same."""


def make_untrained_pair(folder: Path, same_size: bool = False) -> tuple[str, str]:
    """Folders of a teacher and a student with random weights: they disagree, and end at many lengths.

    The teacher has 3 heads of attention, or the student's 2 where both have the `same_size`.
    """
    tokenizer, folders = embedded.make_tokenizer(), []
    for seed, role in enumerate(("teacher", "student")):
        with torch.random.fork_rng(devices=[]):
            config = embedded.build(embedded.RECIPES["student" if same_size else role]).config
            config.initializer_range = 0.12
            torch.manual_seed(10 + seed)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
        folders.append(str(folder / role))
    return folders[0], folders[1]


def digits(completion: str) -> float:
    """A reward that differs from completion to completion: the share of digits."""
    return sum(letter.isdigit() for letter in completion) / 10


def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    return [digits(text if isinstance(text, str) else text[0]["content"]) for text in completions]


def load(folder: str) -> PreTrainedModel:
    """A model whole on this rank, whatever splits the one that trains."""
    unset_hf_deepspeed_config()
    with patch.dict(os.environ, EVERY_RANK):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_trainer(
    kind: str,
    pair: tuple[str, str],
    folder: Path,
    *,
    generator: dict[str, Any] | None = None,
    config: type | None = None,
    mixin: type | None = None,
    trainer: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A trainer of one of `KINDS`.

    Args:
        pair: folders of the teacher and the student.
        generator: fields of the generator; by default the transformers backend.
        config: another class of configuration.
        mixin: goes before the trainer's class.
        trainer: further arguments of the trainer.
        settings: of the configuration.
    """
    trainer_class, own_config, needed = KINDS[kind]
    if mixin is not None:
        trainer_class = type(f"{mixin.__name__}{trainer_class.__name__}", (mixin, trainer_class), {})
    keywords: dict[str, Any] = {
        "model": pair[1],
        "generator": OptimalSamplingGenerator(**{"teacher": pair[0], "backend": "transformers"} | (generator or {})),
        "args": (config or own_config)(output_dir=str(folder), **BASE | needed | settings),
        "train_dataset": Dataset.from_dict({"prompt": PROMPTS}),
    }
    if kind in ("grpo", "rloo", "raft"):
        keywords["reward_funcs"] = reward
    return trainer_class(**keywords | (trainer or {}))


def whole(parameter: Tensor) -> Tensor:
    """A parameter's values; of one that FSDP or DeepSpeed splits all, which every rank has to ask for."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    values: Any = parameter.detach()
    return values.full_tensor() if hasattr(values, "full_tensor") else values


class Watch:
    """Goes before a trainer's class: keeps each generation's batch and rollouts, and each micro-batch of the loss.

    `micro_batches` holds the inputs of each call of the loss in training; `generations` holds, for each batch of
    rollouts, whether the trainer trained, TRL's output, and the rollouts; `weights` the parameters that sampled it.
    """

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        self.micro_batches: list[dict[str, Any]] = []
        self.generations: list[tuple[bool, dict[str, Any], Sequence[Rollout]]] = []
        self.weights: list[dict[str, Tensor]] = []
        super().__init__(*positional, **keywords)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.weights.append({name: whole(p).clone() for name, p in self.model.named_parameters()})
        output = super()._generate_and_score_completions(inputs)
        self.generations.append((self.model.training, dict(output), self.rollouts))
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        if self.model.training:
            self.micro_batches.append(inputs)
        return super()._compute_loss(model, inputs, *rest)


def one_batch(trainer: Any, prompts: Sequence[Any], seed: int = 0) -> dict[str, Any]:
    """Return what `_generate_and_score_completions` makes of the prompts, in training."""
    trainer.model.train()
    torch.manual_seed(seed)
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])


def rows_of(inputs: dict[str, Any]) -> list[tuple[list[int], list[int], dict[str, Tensor]]]:
    """Prompt ids, completion ids and records of each row of a batch, without padding."""
    rows = []
    for row in range(len(inputs["completion_ids"])):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
        valid = inputs["completion_mask"][row].bool()
        records = {name: inputs[name][row][valid] for name in RECORDS}
        for name in RECORDS:
            assert bool((inputs[name][row][~valid] == 0).all()), f"`{name}` is not 0 on padding"
        rows.append((prompt, inputs["completion_ids"][row][valid].tolist(), records))
    return rows


def has_log_teacher(trainer: Any, training: bool) -> bool:
    """Whether a batch's records hold log t: in training, and where the loss of an evaluation reads it."""
    return training or trainer.vllm_generation.plan.evaluation_reads_teacher or trainer._dense_wish() is not None


def check_batch(
    inputs: dict[str, Any], teacher: PreTrainedModel, theta: PreTrainedModel, mixture: Mixture,
    tolerance: float = 1e-5, has_teacher: bool = True,
) -> None:  # fmt: skip
    """Fail where a row's records are not what the oracle says of its own ids, prompt and completion."""
    assert len(inputs["mixture_rows"]) == len(inputs["completion_ids"])
    for (prompt, completion, records), mixed in zip(rows_of(inputs), inputs["mixture_rows"].tolist(), strict=True):
        asked = mixture if mixed else Mixture.theta_only()
        rollout = Rollout(prompt, prompt, completion, **records, text="", finish_reason="stop", mixture=asked)
        check_rollout(rollout, teacher, theta, tolerance=tolerance, has_teacher=has_teacher)


def check_successes(
    trainer: Any, pair: tuple[str, str], mixtures: Sequence[Mixture], tolerance: float
) -> list[list[float]]:
    """Hold the batches of a trainer with `alpha_by_success` and our reward against the successes and the oracle.

    Args:
        mixtures: what each batch is sampled from where the student has no success.

    Returns:
        for each batch the share of the own rows of each group that are right, counted from the texts.
    """
    teacher, theta, counted = load(pair[0]), load(pair[1]), list[list[float]]()
    size, own = trainer._group_size(), trainer._theta_count()
    decode, enough = trainer.processing_class.decode, trainer.generator.alpha_by_success
    batches = zip(trainer.weights, trainer.generations, mixtures, strict=True)
    for weights, (_, output, rollouts), mixture in batches:
        theta.load_state_dict(weights, strict=False)
        right = [digits(decode(one.completion_ids, skip_special_tokens=True)) >= enough for one in rollouts]
        shares = [sum(right[start : start + own]) / own for start in range(0, len(rollouts), size)]
        for row, rollout in enumerate(rollouts):
            share = 1.0 if row % size < own else shares[row // size]
            assert rollout.mixture == (Mixture.theta_only() if share == 1 else mixture.anneal(share))
            assert bool(output["mixture_rows"][row]) == (share < 1)
            check_rollout(rollout, teacher, theta, tolerance=tolerance)
            if mixture.method == "fixed":
                assert (rollout.alpha - mixture.fixed_alpha * (1 - share)).abs().max() < 1e-6
            if share == 1:  # the student's own sample, and recorded as one
                assert (rollout.log_q - rollout.log_theta).abs().max() < 1e-5
        counted.append(shares)
    return counted


def check_turns(trainer: Any, pair: tuple[str, str], tolerance: float) -> None:
    """Hold every turn of each batch against the oracle with the weights of its moment; some row has a second turn."""
    teacher, theta, later = load(pair[0]), load(pair[1]), 0
    for weights, (_, batch, rollouts) in zip(trainer.weights, trainer.generations, strict=True):
        theta.load_state_dict(weights, strict=False)
        for rollout in rollouts:
            check_rollout(rollout, teacher, theta, tolerance=tolerance)
        mask = loss_mask(batch).bool()
        assert torch.cat([rollout.log_q for rollout in rollouts]).equal(batch["log_q"][mask])
        later += len(rollouts) - len(mask)
    assert later > 0, "no completion has a second turn"


MEASURED: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "max_steps": 2,
    "gradient_accumulation_steps": 1,
}
"""Settings of `BASE` for two steps with an evaluation after each, of which the first measures the teacher."""


def check_measure(trainer: Any, pair: tuple[str, str], tolerance: float) -> None:
    """Train by `MEASURED` and hold who sampled each batch, its records and the teacher's mean reward in the logs."""
    trainer.train()
    asked = [Mixture(), Mixture.theta_only(), Mixture.teacher_only(), Mixture(), Mixture.theta_only()]
    assert [training for training, _, _ in trainer.generations] == [True, False, False, True, False]
    teacher, theta = load(pair[0]), load(pair[1])
    for weights, (training, _, rollouts), mixture in zip(trainer.weights, trainer.generations, asked, strict=True):
        theta.load_state_dict(weights, strict=False)
        for rollout in rollouts:
            assert rollout.mixture == mixture
            has_teacher = training or not mixture.is_theta_only
            check_rollout(rollout, teacher, theta, tolerance=tolerance, has_teacher=has_teacher)
    logs = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    rewards = [digits(rollout.text) for rollout in trainer.generations[2][2]]
    assert [log["eval_mixture/reward_teacher"] for log in logs] == pytest.approx([sum(rewards) / len(rewards)] * 2)


def train_and_check(trainer: Any, pair: tuple[str, str], theta: Any, tolerance: float) -> None:
    """Train, evaluate, and hold each batch of rollouts against the oracle with the weights of its moment."""
    teacher = load(pair[0])
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    trainer.evaluate()
    for name, parameter in trainer.model.named_parameters():
        assert name not in before or not torch.equal(parameter, before[name]), f"{name} did not move"
    modes = [training for training, _, _ in trainer.generations]
    assert modes == [True] * 3 + [False] * (len(modes) - 3)
    assert len(modes) > 3
    for step, (training, output, _) in enumerate(trainer.generations):
        theta.load_state_dict(trainer.weights[step], strict=False)
        has_teacher = has_log_teacher(trainer, training)
        check_batch(output, teacher, theta, Mixture(), tolerance, has_teacher)
        assert bool(output["mixture_rows"].any()) == training
        if step in (1, 2):  # the check means something: with the weights of the step before, it fails
            theta.load_state_dict(trainer.weights[step - 1], strict=False)
            with pytest.raises(AssertionError, match="off by"):
                check_batch(output, teacher, theta, Mixture(), tolerance=tolerance)
    logs = [log for log in trainer.state.log_history if "alpha/mean" in log]
    assert len(logs) == 3
    for log in logs:
        assert log["mixture/tokens_per_second"] > 0
        assert log.get("engine/log_theta_difference", 0.0) < tolerance
