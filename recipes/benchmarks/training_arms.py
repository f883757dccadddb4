"""The trainers that `training.py` compares, TRL's and this package's: one pair, the same prompts and lengths."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import trl
from datasets import Dataset

from optimal_sampling_trl import (
    DistillationConfig,
    DistillationTrainer,
    GRPOConfig,
    GRPOTrainer,
    OptimalSamplingGenerator,
    RAFTConfig,
    RAFTTrainer,
)
from optimal_sampling_trl.trainers.engines.colocated import take_port
from random_pair import LETTERS

ON_GPU = torch.cuda.is_available()


class Arm(NamedTuple):
    """A trainer and its settings; `share` is of the student's rollouts, None for TRL's own; `drafts` take a GPU."""

    kind: str
    trainer: Any
    config: Any
    share: float | None = None
    settings: Mapping[str, Any] = MappingProxyType({})
    drafts: int | str = 0


ARMS = {
    "TRL, GRPO": Arm("reward", trl.GRPOTrainer, trl.GRPOConfig),
    "GRPO, half mixture": Arm("reward", GRPOTrainer, GRPOConfig, 0.5),
    "GRPO, half mixture, drafts": Arm("reward", GRPOTrainer, GRPOConfig, 0.5, drafts=3),
    "GRPO, half mixture, as pay": Arm("reward", GRPOTrainer, GRPOConfig, 0.5, drafts="auto"),
    "RAFT, mixture": Arm("reward", RAFTTrainer, RAFTConfig, 0.0),
    "TRL, distillation": Arm("teacher", trl.DistillationTrainer, trl.DistillationConfig),
    "divergence, own": Arm("teacher", DistillationTrainer, DistillationConfig, 1.0),
    "divergence, mixture": Arm("teacher", DistillationTrainer, DistillationConfig, 0.0),
    "dense, own": Arm("teacher", DistillationTrainer, DistillationConfig, 1.0, {"loss": "dense"}),
    "dense, mixture": Arm("teacher", DistillationTrainer, DistillationConfig, 0.0, {"loss": "dense"}),
    "sampled token, own": Arm("teacher", DistillationTrainer, DistillationConfig, 1.0, {"loss": "sampled_token"}),
    "sampled token, mixture": Arm("teacher", DistillationTrainer, DistillationConfig, 0.0, {"loss": "sampled_token"}),
}
BASES = {"reward": "TRL, GRPO", "teacher": "TRL, distillation"}
"""The arm of TRL's that those of a kind are compared with."""


def build(arm: Arm, teacher: str, theta: str, args: argparse.Namespace) -> Any:
    """The trainer of an arm, with a port of its own."""
    take_port()  # also of TRL's arms, and whatever the environment names: calls may begin at once
    settings = {
        "output_dir": tempfile.mkdtemp(prefix="training-"),
        "per_device_train_batch_size": args.micro_batch,
        "gradient_accumulation_steps": args.completions // args.micro_batch,
        "max_steps": args.steps,
        "max_completion_length": args.tokens,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": args.memory,
        "vllm_max_model_length": args.prompt + args.tokens + 1,
        "generation_kwargs": {"ignore_eos": True},
        "gradient_checkpointing": ON_GPU,
        "bf16": ON_GPU,
        "use_cpu": not ON_GPU,
        "learning_rate": 1e-6,
        "logging_steps": args.steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32"},
    } | dict(arm.settings)
    given: dict[str, Any] = {"model": theta, "train_dataset": prompts(args)}
    if arm.kind == "reward":
        given["reward_funcs"] = odd_length
        settings["num_generations"] = 1 if arm.trainer is RAFTTrainer else args.group
    if arm.share is None:
        settings["use_vllm"] = True
        given |= {"teacher_model": teacher} if arm.kind == "teacher" else {}
    else:
        engine: dict[str, Any] = {"dtype": args.dtype, "num_speculative_tokens": arm.drafts}
        engine |= {} if ON_GPU else {"kv_cache_memory_bytes": 1 << 28}
        given["generator"] = OptimalSamplingGenerator(
            teacher=teacher, theta_fraction=arm.share, backend="vllm", engine_arguments=engine
        )
    return arm.trainer(args=arm.config(**settings), **given)


def prompts(args: argparse.Namespace) -> Dataset:
    """Prompts of random letters, each of which is a token."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(LETTERS), (args.completions * args.steps, args.prompt), generator=generator).tolist()
    return Dataset.from_dict({"prompt": ["".join(LETTERS[letter] for letter in row) for row in rows]})


def odd_length(completions: list[str], **columns: Any) -> list[float]:
    """A reward that random completions get half of the time."""
    return [float(len(text) % 2) for text in completions]
