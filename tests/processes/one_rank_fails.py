"""One rank of a run of two in which one fails, for `torchrun --nproc-per-node 2 FILE TEACHER STUDENT FOLDER`.

Writes to FOLDER/<rank>.json how training ended here. A rank that waits for the other writes nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from helpers.training import make_trainer
from optimal_sampling_trl.files import Lock


def end_of(trainer: Any) -> str:
    try:
        trainer.train()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


if __name__ == "__main__":
    torch.set_num_threads(1)
    teacher, student, folder = sys.argv[1:]
    state, seen = PartialState(), {}
    settings = {"per_device_train_batch_size": 3, "max_steps": 2, "ddp_backend": "gloo"}
    trainer = make_trainer("grpo", (teacher, student), Path(folder) / "nan", **settings)
    if state.process_index == 1:
        with torch.no_grad():
            next(trainer.vllm_generation.backend.teacher.parameters()).fill_(torch.nan)
    seen["nan"] = end_of(trainer)
    trainer = make_trainer("grpo", (teacher, student), Path(folder) / "held", **settings)
    if state.is_main_process:
        (Path(folder) / "held").mkdir(exist_ok=True)
        with Lock(Path(folder) / "held" / "_training.lock", "the folder"):
            seen["folder"] = end_of(trainer)
    else:
        seen["folder"] = end_of(trainer)
    (Path(folder) / f"{state.process_index}.json").write_text(json.dumps(seen))
    state.wait_for_everyone()
    state.destroy_process_group()
