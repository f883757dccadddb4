"""One rank of a job of two, for `torchrun --nproc-per-node 2 tests/two_engines.py TEACHER STUDENT FOLDER`.

First each rank has an engine of its own, then both have one together (tensor parallelism). Writes what was sampled,
and what the ranks sum over the job's group once the engines are closed, to FOLDER/<rank>.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from engines import TINY, Oracle, request

from optimal_sampling_trl import Mixture
from optimal_sampling_trl.backends.vllm.engine import VLLMBackend

ASKED = [
    request("without a seed", seed=None),
    request("the student alone", Mixture.theta_only(), seed=None, temperature=0.7),
    request("with a seed", Mixture("trust_region", epsilon=0.1)),
]


def in_one_engine(teacher: str, theta: str, rank: int) -> dict[str, Any]:
    """What this rank of an engine over two sees, before and after a reload; its own random numbers are another's."""
    backend = VLLMBackend(
        teacher, theta, distributed_executor_backend="external_launcher", tensor_parallel_size=2, **TINY
    )
    oracle, completions = Oracle(teacher, theta), []
    for scale in (1.0, 0.8):
        for weight in oracle.models["theta"].parameters():
            weight.data.mul_(scale)
        if scale != 1.0:
            backend.load_theta(list(oracle.models["theta"].named_parameters()))
        np.random.seed(rank)
        torch.manual_seed(rank)
        rollouts = backend.generate(ASKED)
        oracle.check(rollouts, ASKED)
        completions.append([rollout.completion_ids for rollout in rollouts])
    backend.close()
    return {"completions": completions}


if __name__ == "__main__":
    teacher, theta, folder = sys.argv[1:]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    backend = VLLMBackend(teacher, theta, distributed_executor_backend="external_launcher", **TINY)
    (rollout,) = backend.generate([request("hello", max_tokens=3)])
    backend.close()
    seen = {"tokens": len(rollout.completion_ids), **in_one_engine(teacher, theta, rank)}
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seen | {"sum": total.item()}))
    dist.barrier()
    dist.destroy_process_group()
