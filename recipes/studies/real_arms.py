"""The arms of real_text.py, and their trainers on an engine that a process starts once."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer

import optimal_sampling_trl
from optimal_sampling_trl import Mixture, OptimalSamplingGenerator
from optimal_sampling_trl.trainers.presets import PRESETS
from presets_arms import NAMES, SIZES
from real_tasks import Task

GROUP, GROUPED = 8, ("GRPO", "RLOO")
"""Completions of a prompt, and the trainers that compare them."""
REWARDED, IMITATED = 3e-5, 1e-4
"""Learning rates: of GRPO the best on the pruned model of recover.py, with and without a mixture; of imitation the
better of two on the sums."""
ENGINE = {
    "dtype": "bfloat16", "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2 << 30, "max_model_len": 640,
    "max_num_seqs": 256, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
                                                "cudagraph_capture_sizes": [1, 8, 32, 64, 128, 256]},
}  # fmt: skip
"""On a GPU: no compiler, and graphs of decoding alone, which take seconds to start."""
ALONE, TEACHER = {"theta_fraction": 1.0}, {"mixture": Mixture.teacher_only(), "theta_fraction": 0.0}
MIXED = {"theta_fraction": 0.0}


class Arm(NamedTuple):
    """A way to train: a trainer, its middle learning rate, fields of its configuration and of the generator.

    Without a generator it is TRL's own trainer, with an engine of the student alone.
    """

    trainer: str
    learning_rate: float
    settings: dict[str, Any] = {}  # noqa: RUF012
    generator: dict[str, Any] | None = {}  # noqa: RUF012
    size: int = GROUP

    @property
    def group(self) -> int:
        """Completions of a prompt."""
        return self.size if self.trainer in GROUPED else 1

    def budget(self, batch: int, steps: int) -> tuple[int, int]:
        """The batch in whole groups, and the updates that take as many completions in all, or nearly."""
        whole = max(batch // self.group, 1) * self.group
        return whole, round(steps * batch / whole)

    @property
    def library(self) -> ModuleType:
        """The package that the trainer is of."""
        return trl if self.generator is None else optimal_sampling_trl


FILTER = {"accept": 0.5}
FADED = {"dense_coefficient": 1.0, "dense_fade": 0.5}
"""Distillation that gives way to the reward: the dense term falls to 0 over the first half of the training."""
STUDY = {
    "RAFT, mixture": Arm("RAFT", IMITATED, FILTER, MIXED),
    "GRPO, half mixture": Arm("GRPO", REWARDED),
    "Distillation": Arm("Distillation", IMITATED, {}, ALONE),
    "RAFT, own": Arm("RAFT", IMITATED, FILTER, ALONE),
    "GRPO": Arm("GRPO", REWARDED, {"positive_only": "none"}, ALONE),
    "Sampled tokens, mixture": Arm("Distillation", IMITATED, {"loss": "sampled_token"}, MIXED),
    "RAFT, mixture + dense 0.1": Arm("RAFT", IMITATED, {**FILTER, "dense_coefficient": 0.1}, MIXED),
    "RAFT, teacher": Arm("RAFT", IMITATED, FILTER, TEACHER),
    "RAFT, mixture + dense 1 faded": Arm("RAFT", IMITATED, FILTER | FADED, MIXED),
    "RAFT, own + dense 1 faded": Arm("RAFT", IMITATED, FILTER | FADED, ALONE),
    "GRPO, half mixture + dense 1 faded": Arm("GRPO", REWARDED, FADED),
    "GRPO, own + dense 1 faded": Arm("GRPO", REWARDED, FADED | {"positive_only": "none"}, ALONE),
    "RAFT, half": Arm("RAFT", IMITATED, FILTER, {"theta_fraction": 0.5}),
    "RAFT, fixed 0.5": Arm("RAFT", IMITATED, FILTER, MIXED | {"mixture": Mixture("fixed", fixed_alpha=0.5)}),
}
"""Those of the study, the most important first."""
PUBLISHED = {
    NAMES[name]: Arm(
        preset.trainer.removesuffix("Config"),
        REWARDED if preset.trainer == "GRPOConfig" else IMITATED,
        {"preset": name},
        size=SIZES.get(name, GROUP),
    )
    for name, preset in ((name, PRESETS[name]) for name in NAMES)
}
"""Published mixtures, each by its preset."""
ARMS = (
    STUDY
    | PUBLISHED
    | {
        "SFT, teacher": Arm("RAFT", IMITATED, {"accept": 0.0}, TEACHER),  # takes any
        "Distillation, mixture": Arm("Distillation", IMITATED, {}, MIXED),
        "Sampled tokens": Arm("Distillation", IMITATED, {"loss": "sampled_token"}, ALONE),
        "Dense records": Arm("Distillation", IMITATED, {"loss": "dense"}, ALONE),
        "TRL, GRPO": Arm("GRPO", REWARDED, {}, None),
        "TRL, distillation": Arm("Distillation", IMITATED, {}, None),
        "RLOO, half mixture": Arm("RLOO", REWARDED),
        "Dense records, mixture": Arm("Distillation", IMITATED, {"loss": "dense"}, MIXED),
    }
)


def trainer_of(arm: Arm) -> tuple[type, type] | None:
    """The trainer of an arm and its configuration; None where this version has none, or not all of the fields."""
    found = [getattr(arm.library, f"{arm.trainer}{part}", None) for part in ("Trainer", "Config")]
    if None in found or any(name not in found[1].__dataclass_fields__ for name in arm.settings):
        return None
    return found[0], found[1]


def trl_engine(cpu: bool) -> dict[str, Any]:
    """Fields of TRL's configurations: vLLM in the trainer's process, or transformers' `generate`."""
    share, length = ENGINE["gpu_memory_utilization"], ENGINE["max_model_len"]
    vllm = {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": share, "vllm_max_model_length": length}
    return {"use_vllm": False} if cpu else {"use_vllm": True} | vllm


def like_ours() -> Any:
    """Start TRL's engine in the block with this study's settings of one, its cache among them.

    vLLM takes the cache from what is free otherwise, and the other jobs of the GPU change that meanwhile.
    """
    from trl.generation import vllm_generation

    settings = {name: ENGINE[name] for name in ("dtype", "kv_cache_memory_bytes", "compilation_config")}
    return patch.object(vllm_generation, "LLM", partial(vllm_generation.LLM, **settings))


@cache
def shared_engine(teacher: str, student: str) -> Any:
    """The fused engine of this process: a trainer loads its own weights into the student before it samples."""
    from optimal_sampling_trl.backends.vllm.backend import VLLMBackend

    return VLLMBackend(teacher, student, **ENGINE)


def build(arm: Arm, task: Task, models: tuple[str, str], settings: dict[str, Any], cpu: bool, watch: Any) -> Any:
    """The trainer of a run, on the engine of the process where there is one.

    Args:
        models: the folders of the teacher and the student.
        settings: of the configuration, which the arm's add to.
    """
    found, (teacher, student) = trainer_of(arm), models
    assert found is not None
    settings = settings | {
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5, "gradient_accumulation_steps": 1,
        "max_completion_length": task.length, "temperature": 1.0, "save_strategy": "no", "report_to": "none",
        "logging_steps": 5, "bf16": not cpu, "use_cpu": cpu, "gradient_checkpointing": False, "disable_tqdm": True,
        "log_level": "error",
    } | ({"num_generations": arm.group} if arm.trainer in GROUPED else {}) | arm.settings  # fmt: skip
    prompts = settings["max_steps"] * settings["per_device_train_batch_size"] // arm.group
    arguments = {
        "processing_class": AutoTokenizer.from_pretrained(student, padding_side="left"),
        "train_dataset": task.dataset("train", prompts, settings["seed"]),
        "callbacks": [watch],
    } | ({} if arm.trainer == "Distillation" else {"reward_funcs": task.reward})
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    if arm.generator is None:
        taught = {"teacher_model": teacher} if arm.trainer == "Distillation" else {}
        with nullcontext() if cpu else like_ours():
            return found[0](model, args=found[1](**settings | trl_engine(cpu)), **arguments, **taught)
    backend = "transformers" if cpu else "vllm"
    arguments |= {
        "args": found[1](**settings),
        "generator": OptimalSamplingGenerator(teacher, backend=backend, **arm.generator),
    }
    if cpu:
        return found[0](model, **arguments)
    engine = shared_engine(teacher, student)
    with patch("optimal_sampling_trl.backends.vllm.backend.VLLMBackend", lambda *models, **settings: engine):
        return found[0](model, **arguments)
