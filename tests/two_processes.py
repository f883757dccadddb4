"""One rank of a run of two, for `torchrun --nproc-per-node 2 tests/two_processes.py TEACHER STUDENT FOLDER KIND...`.

Trains two steps of each kind and writes what this rank saw to FOLDER/<kind>-<rank>.json: a run is judged by these
files, since torch may abort at exit after all work was done. A rank has six rows of groups of four: the second spans.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from oracle import check_rollout
from training import Watch, digits, load, make_trainer, rows_of

from optimal_sampling_trl import Mixture
from optimal_sampling_trl.rollout import Rollout


def run(kind: str, teacher: str, student: str, folder: str) -> None:
    trainer = make_trainer(
        kind,
        (teacher, student),
        Path(folder),
        mixin=Watch,
        generator={"theta_fraction": 0.5},
        per_device_train_batch_size=3,
        max_steps=2,
        ddp_backend="gloo",
    )
    trainer.train()
    accelerator = trainer.accelerator
    models, worst = (load(teacher), load(student)), 0.0
    own = trainer.generations[0][1]  # before any step: the student is the one on disk
    for (prompt, ids, records), mixed in zip(rows_of(own), own["mixture_rows"].tolist(), strict=True):
        mixture = Mixture() if mixed else Mixture.theta_only()
        rollout = Rollout(prompt, prompt, ids, **records, text="", finish_reason="stop", mixture=mixture)
        worst = max(worst, *check_rollout(rollout, *models).values())
    decode = trainer.processing_class.decode
    seen = {
        "processes": accelerator.num_processes,
        "worst": worst,
        "generations": [
            {
                "rows": [
                    {
                        "prompt": decode(prompt),
                        "reward": digits(decode(ids, skip_special_tokens=True)),
                        "mixed": mixed,
                        **{name: record.tolist() for name, record in records.items()},
                    }
                    for (prompt, ids, records), mixed in zip(rows_of(output), output["mixture_rows"].tolist())
                ],
                "advantages": output["advantages"].tolist() if "advantages" in output else None,
            }
            for _, output, _ in trainer.generations
        ],
        "log": [entry for entry in trainer.state.log_history if "alpha/mean" in entry],
        "parameters": float(sum(p.double().abs().sum() for p in trainer.model.parameters())),
    }
    (Path(folder) / f"{kind}-{accelerator.process_index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    teacher, student, folder, *kinds = sys.argv[1:]
    for kind in kinds:
        run(kind, teacher, student, folder)
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
