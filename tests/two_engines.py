"""One rank of a job of two with an engine each, for `torchrun --nproc-per-node 2 tests/two_engines.py TEACHER STUDENT
FOLDER`: samples, closes the engine, and writes what the ranks then sum over the job's group to FOLDER/<rank>.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from engines import TINY, request

from optimal_sampling_trl.backends.vllm.engine import VLLMBackend

if __name__ == "__main__":
    teacher, theta, folder = sys.argv[1:]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    backend = VLLMBackend(teacher, theta, distributed_executor_backend="external_launcher", **TINY)
    (rollout,) = backend.generate([request("hello", max_tokens=3)])
    backend.close()
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    seen = {"tokens": len(rollout.completion_ids), "sum": total.item()}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()
