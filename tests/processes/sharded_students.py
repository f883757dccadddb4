"""One rank of two that split a student by FSDP2, for `torchrun --nproc-per-node 2 FILE FOLDER ANSWERS NAME...`.

For each named one of `helpers.students.TIED` and `UNTIED`, the weights that the split student hands out are compared
with those of the whole one. Rank 0 writes the largest difference of each to ANSWERS/sharded.json. A rank fails where
a shard has changed meanwhile.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from helpers.students import TIED, UNTIED, load, stirred
from optimal_sampling_trl.trainers.engines.student import StudentWeights, tied_heads


def split(model: Any) -> None:
    """Split as accelerate does: each layer of the decoder, and the rest as a whole."""
    for layer in [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]:
        fully_shard(layer)
    fully_shard(model)


def difference(name: str, folder: str) -> float:
    """The largest difference between the weights of the whole student and those of the split one."""
    model = stirred((TIED | UNTIED)[name](load(folder)))
    wanted = {name: weight.clone() for name, weight in StudentWeights(model)}
    tied = tied_heads(model)
    split(model)
    assert tied_heads(model) == tied
    shards = {name: shard.to_local().clone() for name, shard in model.named_parameters()}  # type: ignore[operator]
    weights = StudentWeights(model, device=torch.device("cpu"))
    got = {name: weight.clone() for name, weight in weights}
    assert got.keys() == wanted.keys(), got.keys() ^ wanted.keys()
    for name, shard in model.named_parameters():
        assert torch.equal(shard.to_local(), shards[name]), name  # type: ignore[operator]
    return max(float((got[name] - weight).abs().max()) for name, weight in wanted.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("answers", type=Path)
    parser.add_argument("names", nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {name: difference(name, args.folder) for name in args.names}
    if dist.get_rank() == 0:
        (args.answers / "sharded.json").write_text(json.dumps(found))
    dist.destroy_process_group()
