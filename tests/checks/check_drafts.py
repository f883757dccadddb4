"""Check drafts in an engine over several GPUs, and behind the server: records, and the law of the mixture.

    torchrun --nproc-per-node 2 tests/checks/check_drafts.py ranks           # one engine over two GPUs
    python tests/checks/check_drafts.py server                               # a server on one GPU
    python tests/checks/check_drafts.py server --tensor-parallel-size 2      # a server over two

The demo's pair, in float32, where its teacher has a fourth head of zeros, so that two GPUs can share its heads. Each
prints the largest errors against the float32 oracle, before and after a reload, and the chi-square of the sequences
that `check_speculation.py` counts. In `ranks` all must draw the same tokens, from random numbers of their own.
`server` also sends a request with a grammar, which must be refused and leave the server up. `--k 0` is a control, and
runs on a CPU as well.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "recipes")]  # helpers, and pairs

import numpy as np
import requests as http
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

from checks.check_server import push
from checks.check_speculation import CASES, MIXTURES, OFTEN, Law, Z, accepted, chi_square, engine, prompts, requests
from helpers.engines import ON_A_GPU, TOLERANCE, Oracle
from helpers.servers import Server
from optimal_sampling_trl.backends.vllm.server.client import FusedServer
from optimal_sampling_trl.backends.vllm.speculation import AUTO
from optimal_sampling_trl.demo import pair as demo
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.rollouts.request import Request, Sampling
from optimal_sampling_trl.rollouts.rollout import Rollout
from processes.serve_from_files import FileClient

HEADS = 4
AT_ONCE = 400
"""Completions of one request of a server; vLLM's most are 16 384."""
SCALE = 0.9
"""Factor of the student's weights in the reload, so that old ones would be seen."""
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [8, 64, 256]}
ON_THE_GPU = ("--no-enforce-eager", "--compilation-config", json.dumps(GRAPHS), "--gpu-memory-utilization", "0.1")
"""Flags of a server on a GPU: small whole graphs, and what must be free of its memory."""


def with_heads(path: str, folder: str) -> str:
    """The same model with further heads that add nothing, since their weights are 0."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config = copy.deepcopy(model.config)
    config.num_attention_heads = config.num_key_value_heads = HEADS
    wider = AutoModelForCausalLM.from_config(config)
    shapes = {name: weight.shape for name, weight in wider.state_dict().items()}
    wider.load_state_dict({name: padded(weight, shapes[name]) for name, weight in model.state_dict().items()})
    wider.save_pretrained(folder)
    demo.make_tokenizer().save_pretrained(folder)
    return folder


def padded(weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A weight with zeros behind it, up to a shape."""
    further = [size - own for size, own in zip(shape, weight.shape, strict=True)]
    return nn.functional.pad(weight, [end for size in reversed(further) for end in (0, size)])


def check_law(oracle: Oracle, index: int, args: argparse.Namespace, rollouts: Sequence[Rollout]) -> None:
    """Hold completions of one prompt against the mixture's law.

    Raises:
        AssertionError: where they are too far from it.
    """
    name, sampling = CASES[index]
    law, least = Law(oracle.teacher, oracle.theta), OFTEN / args.sequences
    wanted = law.sequences(prompts(1)[0], MIXTURES[name], Sampling(**sampling), args.tokens, least)
    z, freedom = chi_square(Counter(tuple(one.completion_ids) for one in rollouts), wanted)
    print(f"{name} {sampling or ''}: z={z:+.2f} of {freedom} degrees, {len(rollouts)} sequences", flush=True)
    assert abs(z) < Z, f"{z:.1f} standard deviations off"


def asked_often(index: int, args: argparse.Namespace, group: int | None = None) -> list[Request]:
    """One prompt many times, without seeds, or in groups with a seed each."""
    name, sampling = CASES[index]
    prompt, given = prompts(1)[0], {"max_tokens": args.tokens, "ignore_eos": True} | sampling
    seeds = [None if group is None else i // group for i in range(args.sequences)]
    return [Request(prompt, prompt, MIXTURES[name], Sampling(seed=seed, **given)) for seed in seeds]


def mixed() -> list[Request]:
    """Requests of all mixtures in one batch."""
    return [one for mixture in MIXTURES.values() for one in requests(24, mixture)]


def scaled(oracle: Oracle) -> list[tuple[str, torch.Tensor]]:
    """The student's weights after the oracle's were scaled."""
    for weight in oracle.models["theta"].parameters():
        weight.data.mul_(SCALE)
    return list(oracle.models["theta"].named_parameters())


def ranks(oracle: Oracle, args: argparse.Namespace) -> None:
    """One engine over all ranks of this job."""
    size = int(os.environ["WORLD_SIZE"])
    if ON_A_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if ON_A_GPU else "gloo")
    rank, pair = dist.get_rank(), demo.PairFolders(oracle.teacher, oracle.theta)
    over = {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": size, "seed": args.seed}
    with engine(pair, args.k, **over | ({} if ON_A_GPU else {"enforce_eager": True})) as backend:
        np.random.seed(rank)
        torch.manual_seed(rank)

        def sample(asked: list[Request]) -> list[Rollout]:
            rollouts = backend.generate(asked)
            found = [list(one.completion_ids) for one in rollouts]
            everywhere: list[Any] = [None] * size
            dist.all_gather_object(everywhere, found)
            assert all(other == found for other in everywhere), "the ranks drew other tokens"
            return rollouts

        asked = mixed()
        print(f"rank {rank}, records {oracle.check(sample(asked), asked, TOLERANCE)}", flush=True)
        if args.k:
            share = accepted(backend, lambda: sample(requests(128, Mixture.theta_only())))[0]
            print(f"rank {rank}, kept at α = 0: {share:.3f}", flush=True)
            assert share > 0.98
        for index in args.cases:
            check_law(oracle, index, args, sample(asked_often(index, args)))
        backend.load_theta(scaled(oracle))
        print(f"rank {rank}, after a reload {oracle.check(sample(asked), asked, TOLERANCE)}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def server(oracle: Oracle, args: argparse.Namespace) -> None:
    """A server of the pair, whose weights come from a file."""
    flags = ("--max-model-len", "64", "--num-speculative-tokens", str(args.k), "--seed", str(args.seed))
    flags += ("--tensor-parallel-size", str(args.tensor_parallel_size), *(ON_THE_GPU if ON_A_GPU else ()))
    with tempfile.TemporaryDirectory() as home:
        log = Path(home) / "log"
        running = Server(oracle.teacher, oracle.theta, log, *flags)
        try:
            client = FileClient(base_url=running.url)
            client.folder = Path(home)
            served = FusedServer(client, oracle.teacher, demo.make_tokenizer())
            served.pushed = served._call_workers("theta_state")  # as if the weights on disk had been sent
            asked = mixed()
            print("records", oracle.check(served.sample(asked), asked, TOLERANCE), flush=True)
            if args.k:
                refuse_grammar(running)
            for index in args.cases:
                check_law(oracle, index, args, served.sample(asked_often(index, args, AT_ONCE)))
            scaled(oracle)
            push(served, oracle, "cpu", torch.float32)
            print("after a reload", oracle.check(served.sample(asked), asked, TOLERANCE), flush=True)
        except BaseException:
            print(log.read_text()[-3000:], flush=True)
            raise
        finally:
            running.stop()


def refuse_grammar(running: Server) -> None:
    """A request with a grammar gets status 400, and the server goes on.

    Raises:
        AssertionError: where it does not.
    """
    model = http.get(f"{running.url}/v1/models").json()["data"][0]["id"]
    body = {"model": model, "prompt": "3141592653=", "max_tokens": 3, "structured_outputs": {"regex": "[0-9]+"}}
    answer = http.post(f"{running.url}/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert running.is_up()
    print("a grammar:", answer.json()["error"]["message"], flush=True)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("where", choices=("ranks", "server"))
    flags.add_argument("--k", type=lambda text: text if text == AUTO else int(text), default=3)
    flags.add_argument("--tensor-parallel-size", type=int, default=1, help="of `server`")
    flags.add_argument("--cases", type=int, nargs="+", choices=range(len(CASES)), default=[0, 1], help="of the law")
    flags.add_argument("--sequences", type=int, default=20_000)
    flags.add_argument("--tokens", type=int, default=5, help="of a sequence")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--pair", type=Path, default=demo.DEFAULT, help="folder of the demo's pair, made if missing")
    args = flags.parse_args()
    pair = demo.make_pair(args.pair)
    with tempfile.TemporaryDirectory() as folder:
        oracle = Oracle(with_heads(pair.teacher, folder), pair.student, eos=demo.VOCABULARY.index(demo.EOS))
        {"ranks": ranks, "server": server}[args.where](oracle, args)


if __name__ == "__main__":
    main()
