"""One rank of a run whose completions call tools, for `torchrun --nproc-per-node 2 FILE TEACHER STUDENT FOLDER`.

Each engine that ranks may have or share is trained with: one that reads the live student, a server that both ask, and
one of two ranks. Completions of the first rank have one turn, those of the other several. A rank writes to
FOLDER/<engine>-<rank>.json the largest number of turns in each batch, the rows of the mixture, and the largest error
of its records.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from datasets import Dataset

from helpers.local_engines import LocalServer, LocalTensorParallel
from helpers.oracle import check_rollout
from helpers.speakers import PROMPTS, add, repeat
from helpers.training import Watch, load, make_trainer
from optimal_sampling_trl.trainers import mixture_trainer
from optimal_sampling_trl.trainers.records import loss_mask

ENGINES: dict[str, tuple[dict[str, Any], Any]] = {
    "live": ({}, None),
    "server": ({"vllm_mode": "server"}, LocalServer),
    "shared": ({"vllm_tensor_parallel_size": 2}, LocalTensorParallel),
}
SETTINGS: dict[str, Any] = {
    "num_generations": 4,
    "per_device_train_batch_size": 2,
    "max_completion_length": 64,
    "learning_rate": 1e-3,
    "ddp_backend": "gloo",
    "max_steps": 2,
}


def build(name: str, pair: tuple[str, str], folder: Path) -> Any:
    """A trainer with the engine of that name."""
    given, engine = ENGINES[name]
    data = Dataset.from_dict({"prompt": PROMPTS})
    built = {"trainer": {"train_dataset": data, "tools": [add, repeat], "reward_funcs": length}}
    if engine is None:
        return make_trainer("grpo", pair, folder, mixin=Watch, **built, **SETTINGS, **given)
    built["generator"] = {"backend": "auto"}
    with patch.object(mixture_trainer, "build_generation", lambda plan, teacher, **trl: engine(plan, **trl)):
        return make_trainer("grpo", pair, folder, mixin=Watch, **built, **SETTINGS, **given)


def length(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that differs from completion to completion."""
    return [float(len(chat[0]["content"])) for chat in completions]


def most_turns(batch: dict[str, Any]) -> int:
    """The number of turns of the completion that has most: of the runs of sampled tokens in a row."""
    mask = loss_mask(batch)
    return 1 + int((mask.diff(dim=1) == 1).sum(1).max())


def run(name: str, pair: tuple[str, str], folder: Path) -> None:
    trainer = build(name, pair, folder)
    rank = trainer.accelerator.process_index
    trainer.max_tool_calling_iterations = 3 * rank
    trainer.train()
    teacher, theta, worst, turns = load(pair[0]), load(pair[1]), 0.0, []
    for weights, (_, batch, rollouts) in zip(trainer.weights, trainer.generations, strict=True):
        theta.load_state_dict(weights, strict=False)
        for rollout in rollouts:
            worst = max(worst, *check_rollout(rollout, teacher, theta).values())
        turns.append(most_turns(batch))
    mixed = [batch["mixture_rows"].tolist() for _, batch, _ in trainer.generations]
    (folder / f"{name}-{rank}.json").write_text(json.dumps({"worst": worst, "turns": turns, "mixed": mixed}))
    trainer.vllm_generation.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    teacher, student, folder = sys.argv[1:]
    for name in ENGINES:
        run(name, (teacher, student), Path(folder))
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
