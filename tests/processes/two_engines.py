"""One rank of a job of several, for `torchrun --nproc-per-node 2 FILE TEACHER STUDENT FOLDER [graphs]`.

First each rank has an engine of its own, then all have one together (tensor parallelism). Writes what was sampled,
and what the ranks sum over the job's group once the engines are closed, to FOLDER/<rank>.json.
With `graphs` the shared engine is in bfloat16, with vLLM's own choice of CUDA graphs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from helpers.engines import NOISE, ON_A_GPU, TINY, TOLERANCE, Oracle, request, runner_of
from optimal_sampling_trl import Mixture
from optimal_sampling_trl.backends.vllm.backend import VLLMBackend

ASKED = [
    request("without a seed", seed=None),
    request("the student alone", Mixture.theta_only(), seed=None, temperature=0.7),
    request("with a seed", Mixture("trust_region", epsilon=0.1)),
]


def in_one_engine(teacher: str, theta: str, rank: int, graphs: bool) -> dict[str, Any]:
    """Return what this rank of an engine over all sees: at first, after each of two reloads, and where it slept.

    Its random numbers are another's."""
    sleeps = {"enable_sleep_mode": True} if ON_A_GPU else {}
    both = {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": dist.get_world_size()}
    mode = {"dtype": "bfloat16", "enforce_eager": False} if graphs else {}
    backend = VLLMBackend(teacher, theta, **TINY | both | sleeps | mode)
    bound = NOISE[torch.bfloat16][1] if graphs else TOLERANCE
    oracle, completions, worst = Oracle(teacher, theta), [], []
    for scale in (1.0, 0.8, 0.9):
        for role, model in oracle.models.items():
            for weight in model.parameters():
                weight.data.mul_(scale if role == "theta" else 1.0)
                weight.data = weight.data.bfloat16().float() if graphs else weight.data
        if scale != 1.0:
            backend.load_theta(list(oracle.models["theta"].named_parameters()))
        backend.sleep()
        backend.wake_up()
        np.random.seed(rank)
        torch.manual_seed(rank)
        rollouts = backend.generate(ASKED)
        worst.append(max(oracle.check(rollouts, ASKED, bound).values()))
        completions.append([rollout.completion_ids for rollout in rollouts])
    runner = runner_of(backend)
    stream = runner.model.side_stream is not None
    seen = f"{type(runner).__module__}, second stream: {stream}, logits {tuple(runner.model.theta_logits.shape)}"
    backend.close()
    return {"completions": completions, "worst": [f"{error:.1e}" for error in worst], "bound": bound, "seen": seen}


if __name__ == "__main__":
    teacher, theta, folder, *mode = sys.argv[1:]
    if ON_A_GPU:  # as accelerate does before an engine is built
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if ON_A_GPU else "gloo")
    rank = dist.get_rank()
    backend = VLLMBackend(teacher, theta, distributed_executor_backend="external_launcher", **TINY)
    (rollout,) = backend.generate([request("hello", max_tokens=3)])
    backend.close()
    seen = {"tokens": len(rollout.completion_ids), **in_one_engine(teacher, theta, rank, mode == ["graphs"])}
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seen | {"sum": total.item()}))
    dist.barrier()
    dist.destroy_process_group()
