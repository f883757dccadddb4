"""One rank of two that split students, for `torchrun --nproc-per-node 2 FILE {fsdp2,zero3} ANSWERS` and, for each
folder of a student, `--of FOLDER NAME...`.

For each named one of `helpers.students.TIED` and `UNTIED`, the weights that the split student hands out are compared
with those of the whole one. Rank 0 writes the largest difference of each to ANSWERS/split.json, a list for each
folder. A rank fails where a second handing out gives other weights, or where a shard has changed meanwhile.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from helpers.students import TIED, UNTIED, load, stirred
from optimal_sampling_trl.trainers.engines.student import StudentWeights, held_here, tied_heads


def split_by_fsdp2(model: Any) -> StudentWeights:
    """Split as accelerate does: each layer of the decoder, and the rest as a whole."""
    for layer in [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]:
        fully_shard(layer)
    fully_shard(model)
    return StudentWeights(model, device=torch.device("cpu"))


def split_by_zero3(model: Any) -> StudentWeights:
    """Split by DeepSpeed; on a CPU set `DS_ACCELERATOR=cpu`."""
    import deepspeed

    settings = {
        "train_batch_size": dist.get_world_size(),
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    deepspeed.initialize(model=model, config=settings, model_parameters=trained)
    return StudentWeights(model, deepspeed.zero.GatheredParameters)


SPLIT = {"fsdp2": split_by_fsdp2, "zero3": split_by_zero3}


def copies(weights: StudentWeights) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in weights}


def difference(by: str, name: str, folder: str) -> float:
    """The largest difference between the weights of the whole student and those of the split one."""
    model = stirred((TIED | UNTIED)[name](load(folder)))
    wanted, tied = copies(StudentWeights(model)), tied_heads(model)
    weights = SPLIT[by](model)
    assert tied_heads(model) == tied
    shards = {name: held_here(parameter).clone() for name, parameter in model.named_parameters()}
    got, again = copies(weights), copies(weights)
    for name, parameter in model.named_parameters():
        assert torch.equal(held_here(parameter), shards[name]), name
    assert got.keys() == again.keys() == wanted.keys()
    assert all(torch.equal(got[name], again[name]) for name in got)
    return max(float((got[name] - weight).abs().max()) for name, weight in wanted.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("by", choices=SPLIT)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--of", nargs="+", action="append", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = [{name: difference(args.by, name, folder) for name in names} for folder, *names in args.of]
    if dist.get_rank() == 0:
        (args.answers / "split.json").write_text(json.dumps(found))
    dist.destroy_process_group()
