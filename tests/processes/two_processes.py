"""One rank of a training run, for `torchrun --nproc-per-node 2 FILE TEACHER STUDENT FOLDER KIND...`.

Trains a few steps of each kind and writes what this rank saw to FOLDER/<kind>-<rank>.json: a run is judged by these
files, since torch may abort at exit after all work was done. A rank has six rows of groups of four: the second spans.
`two_prompts_server` and `two_prompts_engine` sample where both ranks' prompts go to one engine; there, and in
`two_prompts`, every other row has a prompt of the teacher's own. In `two_rounds` and `by_success` a rank has two whole
groups; in the second both ranks' prompts go to one engine. In `evaluation` the teacher and the student each sample
four prompts after the last step.
On GPUs each rank trains on its own; with `--backend vllm` it has an engine, or a share of one
(`--tensor-parallel-size`). With `--server URL` a server of the pair samples, and where one process trains, all rows
of a batch are its own.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from accelerate import PartialState
from datasets import Dataset

from helpers.local_engines import LocalServer, LocalTensorParallel
from helpers.oracle import check_rollout
from helpers.training import PROMPTS, TEACHER_PROMPTS, Watch, digits, load, make_trainer, rows_of, whole
from optimal_sampling_trl import GRPOTrainer, Mixture
from optimal_sampling_trl.rollouts.rollout import Rollout
from optimal_sampling_trl.trainers import mixture_trainer


class Case(NamedTuple):
    """One of `helpers.training.KINDS`, what is set of it, and what stands for the engine of both ranks."""

    kind: str
    settings: Mapping[str, Any] = MappingProxyType({})
    engine: Callable[..., Any] | None = None


CASES = {
    "self_normalise": Case("grpo", {"correction": "token_truncate", "correction_self_normalise": True}),
    "dense_term": Case("raft", {"accept": 2.0, "dense_coefficient": 1.0, "dense_top_k": 40}),
    "two_prompts": Case("raft"),
    "two_rounds": Case("grpo", {"per_device_train_batch_size": 4}),
    "by_success": Case("rloo", {"per_device_train_batch_size": 4, "vllm_mode": "server"}, LocalServer),
    "evaluation": Case("raft", {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}),
    "two_prompts_server": Case("sampled_token", {"vllm_mode": "server"}, LocalServer),
    "two_prompts_engine": Case("grpo", {"vllm_tensor_parallel_size": 2}, LocalTensorParallel),
}
BELOW = 0.35
"""The reward that a group's own rows have to reach, in `two_rounds` and `by_success`."""
SYSTEM_PROMPT = "sort"
"""The teacher's, in the cases of two prompts."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("folder", type=Path)
    parser.add_argument("kinds", nargs="+")
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--server", help="where rollouts come from")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of a record, in nats and in α")
    return parser.parse_args()


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Of the trainer: where it trains, and what samples."""
    on_gpu = torch.cuda.is_available()
    given: dict[str, Any] = {"use_cpu": not on_gpu} | ({} if on_gpu else {"ddp_backend": "gloo"})
    generator: dict[str, Any] = {"theta_fraction": 0.5, "backend": args.backend}
    if args.backend == "vllm":
        cache = {"dtype": "float32", "kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}
        generator["engine_arguments"] = cache
        given |= {"vllm_tensor_parallel_size": args.tensor_parallel_size, "vllm_gpu_memory_utilization": 0.1}
    if args.server:
        generator["backend"] = "auto"
        given |= {"vllm_mode": "server", "vllm_server_base_url": args.server}
    rows = 6 if args.server and os.environ.get("WORLD_SIZE", "1") == "1" else 3
    return given | {"generator": generator, "per_device_train_batch_size": rows, "max_steps": args.steps}


def worst_error(trainer: Any, args: argparse.Namespace) -> float:
    """The largest error of this rank's records, each batch against the student of its moment."""
    teacher, theta, worst = load(args.teacher), load(args.student), 0.0
    for weights, (training, own, rollouts) in zip(trainer.weights, trainer.generations, strict=True):
        theta.load_state_dict({name: weight.cpu() for name, weight in weights.items()}, strict=False)
        mixed_rows = own["mixture_rows"].tolist()
        for (prompt, ids, records), mixed, sampled in zip(rows_of(own), mixed_rows, rollouts, strict=True):
            of_mixture = Mixture() if training else Mixture.teacher_only()  # an evaluation has the teacher's rows, too
            if trainer.generator.alpha_by_success is not None:
                of_mixture = sampled.mixture  # which the test holds against the group's successes
            mixture = of_mixture if mixed else Mixture.theta_only()
            on_host = {name: record.cpu() for name, record in records.items()}
            rollout = Rollout(
                sampled.prompt_ids, prompt, ids, **on_host, text="", finish_reason="stop", mixture=mixture
            )
            errors = check_rollout(rollout, teacher, theta, tolerance=args.tolerance, has_teacher=training or mixed)
            worst = max(worst, *errors.values())
    return worst


def build(name: str, args: argparse.Namespace) -> Any:
    """The trainer of a case, or of a kind."""
    case = CASES.get(name, Case(name))
    given = settings(args) | dict(case.settings)
    pair, engine = (args.teacher, args.student), case.engine
    if name == "two_rounds":
        given["generator"] |= {"mixture_below": BELOW}
    if name == "by_success":
        given["generator"] |= {"alpha_by_success": BELOW, "mixture": Mixture("fixed", fixed_alpha=1.0)}
    if name.startswith("two_prompts"):
        data = Dataset.from_dict({"prompt": PROMPTS, "teacher_prompt": TEACHER_PROMPTS})
        given["trainer"] = {"train_dataset": data}
        given["generator"] |= {"teacher_system_prompt": SYSTEM_PROMPT}
    if name == "evaluation":
        given["trainer"] = {"eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:3]})}
    if engine is None:
        return make_trainer(case.kind, pair, args.folder, mixin=Watch, **given)
    given["generator"] |= {"backend": "auto"}
    with patch.object(mixture_trainer, "build_generation", lambda plan, teacher, **trl: engine(plan, **trl)):
        return make_trainer(case.kind, pair, args.folder, mixin=Watch, **given)


def run(kind: str, args: argparse.Namespace) -> None:
    trainer = build(kind, args)
    trainer.train()
    accelerator = trainer.accelerator
    decode, is_grpo = trainer.processing_class.decode, isinstance(trainer, GRPOTrainer)
    seen = {
        "processes": accelerator.num_processes,
        "kind": accelerator.distributed_type.value,
        "worst": worst_error(trainer, args),
        "generations": [
            {
                "rows": [
                    {
                        "prompt": decode(prompt),
                        "teacher_prompt": decode(rollout.prompt_ids),
                        "ratios": output["importance_sampling_ratio"][row, : len(ids)].tolist() if is_grpo else None,
                        "reward": digits(decode(ids, skip_special_tokens=True)),
                        "mixed": mixed,
                        **{name: record.tolist() for name, record in records.items()},
                    }
                    for row, ((prompt, ids, records), mixed, rollout) in enumerate(
                        zip(rows_of(output), output["mixture_rows"].tolist(), rollouts)
                    )
                ],
                "advantages": output["advantages"].tolist() if "advantages" in output else None,
                "weights": output["imitation_weights"].tolist() if "imitation_weights" in output else None,
            }
            for _, output, rollouts in trainer.generations
        ],
        "log": [entry for entry in trainer.state.log_history if "alpha/mean" in entry],
        "evaluations": [entry for entry in trainer.state.log_history if "eval_reward" in entry],
        "parameters": float(sum(whole(p).double().abs().sum() for p in trainer.model.parameters())),
    }
    (args.folder / f"{kind}-{accelerator.process_index}.json").write_text(json.dumps(seen))
    trainer.vllm_generation.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    args = parse()
    for kind in args.kinds:
        run(kind, args)
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
