"""A run of ten steps that goes on from its last whole checkpoint, for tests that kill it.

python tests/processes/train_and_resume.py TEACHER STUDENT FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from helpers.training import make_trainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    teacher, student, folder = sys.argv[1:]
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 10}
    trainer = make_trainer("grpo", (teacher, student), Path(folder), **settings)
    states = list(Path(folder).glob("checkpoint-*/trainer_state.json"))
    trainer.train(resume_from_checkpoint=bool(states))
