"""Check trainers whose teacher is the student, and completions that call tools, on one GPU: a table of what was seen.

    python tests/checks/check_self_teacher.py                           # all cases, about a minute each
    python tests/checks/check_self_teacher.py --only "GRPO, sleeping"   # some of them

Each case is a process of its own, since vLLM lets one hold a single engine that sleeps. A trainer makes three steps
with large changes of its weights. The records of every token of each batch, of each turn where tools are called, are
held against the trainer's model of that moment in transformers: it reads the student's prompt as the student, and the
teacher's prompt as the teacher. The same check must fail where the teacher is given the student's prompt. Without a
GPU the cases that sleep do not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # on a GPU; else Triton multiplies float32 in TF32
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "recipes")]  # helpers, and pairs

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor

from checks.check_server import Report
from helpers.engines import NOISE, ON_A_GPU, TOLERANCE  # the engine's environment is set before vLLM is imported
from helpers.oracle import expected_records
from helpers.paths import python_path
from helpers.speakers import PROMPTS as CHATS
from helpers.speakers import add, make_speakers, repeat
from helpers.training import PROMPTS, Watch, load, make_trainer, make_untrained_pair
from optimal_sampling_trl import Rollout
from optimal_sampling_trl.rollouts.rollout import RECORDS

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
PATIENCE = 240
"""Seconds that a case may take."""
EAGER, GRAPHS = {"enforce_eager": True, "dtype": "float32"}, {"enforce_eager": False, "dtype": "bfloat16"}


class Case(NamedTuple):
    """A trainer.

    Args:
        kind: of `helpers.training.KINDS`.
        generator: fields of its generator.
        adapter: whether the student is trained through an adapter.
        sleeps: whether the engine sleeps while the trainer learns.
        engine: arguments of the engine.
        tools: whether completions call tools, and go on.
        settings: of the configuration.
    """

    kind: str
    generator: dict[str, Any] = {}  # noqa: RUF012
    adapter: bool = False
    sleeps: bool = False
    engine: dict[str, Any] = EAGER
    tools: bool = False
    settings: dict[str, Any] = {}  # noqa: RUF012


NEVER, OFF = {"teacher_refresh": "never"}, {"teacher_adapter": False}
CUT = {"max_completion_length": 22}
"""A second turn does not fit."""
CASES = {
    "GRPO, sleeping": Case("grpo", sleeps=True),
    "RAFT": Case("raft"),
    "RLOO, teacher as at the start, sleeping": Case("rloo", NEVER, sleeps=True),
    "Distillation": Case("dense"),
    "Distillation by sampled tokens, adapter off, sleeping": Case("sampled_token", OFF, adapter=True, sleeps=True),
    "GRPO, adapter on": Case("grpo", adapter=True),
    "RAFT, adapter, teacher as at the start": Case("raft", NEVER, adapter=True),
    "GRPO, bfloat16, graphs, sleeping": Case("grpo", sleeps=True, engine=GRAPHS),
    "tools, GRPO, sleeping": Case("grpo", sleeps=True, tools=True),
    "tools, RAFT, bfloat16, graphs": Case("raft", engine=GRAPHS, tools=True),
    "tools that are cut, GRPO": Case("grpo", tools=True, settings=CUT),
    "tools, distillation, another teacher": Case("sampled_token", {"teacher": "pair"}, tools=True),
    "tools, GRPO, another teacher, sleeping": Case("grpo", {"teacher": "pair"}, sleeps=True, tools=True),
}


def said(completions: Iterable[Any], **columns: Any) -> list[float]:
    """A reward that differs from chat to chat."""
    return [sum(len(message["content"]) for message in chat) / 100 for chat in completions]


def build(case: Case, home: Path) -> tuple[Any, tuple[str, str]]:
    """The trainer of a case, and the folders of the pair that its student is of."""
    pair = make_speakers(home) if case.tools else make_untrained_pair(home)
    prompts: list[Any] = CHATS * 8 if case.tools else PROMPTS
    told = [tell(prompt) for prompt in prompts]
    trainer: dict[str, Any] = {"train_dataset": Dataset.from_dict({"prompt": prompts, "teacher_prompt": told})}
    settings: dict[str, Any] = {"use_cpu": not ON_A_GPU, "vllm_enable_sleep_mode": case.sleeps and ON_A_GPU}
    settings |= {"vllm_gpu_memory_utilization": 0.1} if ON_A_GPU else {}
    if case.adapter:
        trainer["peft_config"] = LORA
    if case.tools:
        trainer["tools"] = [add, repeat]
        settings |= {"max_completion_length": 72, "max_tool_calling_iterations": 3, "learning_rate": 1e-3}
        settings["per_device_train_batch_size"] = 16
        if case.kind in ("grpo", "raft"):
            trainer["reward_funcs"] = said
            settings["num_generations_eval"] = 1
    engine = {"kv_cache_memory_bytes": 256 << 20} | case.engine
    generator = {"teacher": "student", "backend": "vllm", "engine_arguments": engine} | case.generator
    if generator["teacher"] == "pair":
        generator["teacher"] = pair[0]
    further = settings | case.settings
    made = make_trainer(case.kind, pair, home / "run", generator=generator, mixin=Watch, trainer=trainer, **further)
    return made, pair


def tell(prompt: Any) -> Any:
    """What the teacher reads in place of a prompt; every other time something shorter, where it is a text."""
    if isinstance(prompt, list):
        return [{"role": "user", "content": "hint "}, *prompt]
    return f"{prompt[::-1]}{prompt}" if len(prompt) % 2 else prompt[1:] or "7="


def models_at(case: Case, trainer: Any, pair: tuple[str, str], step: int) -> tuple[Any, Any]:
    """The teacher and the student of a batch, with weights as the engine holds them."""
    dtype = getattr(torch, case.engine["dtype"])

    def student(at: int, adapter: bool = True) -> Any:
        model = load(pair[1])
        if case.adapter:
            model = get_peft_model(model, LORA)
        model.load_state_dict(trainer.weights[at], strict=False)
        if case.adapter:
            model = model.merge_and_unload() if adapter else model.unload()
        return model.to(dtype).float().eval()

    if case.generator.get("teacher") == "pair":
        return load(pair[0]).to(dtype).float(), student(step)
    at = 0 if case.generator.get("teacher_refresh") == "never" else step
    return student(at, case.generator.get("teacher_adapter", True)), student(step)


def errors(rollouts: Iterable[Rollout], teacher: Any, theta: Any) -> Tensor:
    """How far each record of each token is from the oracle's (N,), in nats and in α."""
    parts = []
    for rollout in rollouts:
        expected, _ = expected_records(rollout, teacher, theta)
        parts += [(getattr(rollout, name).double() - expected[name]).abs() for name in RECORDS]
    return torch.cat(parts)


def hold(case: Case, trainer: Any, pair: tuple[str, str]) -> str:
    """Hold each batch against the models of its moment; returns what was seen."""
    dtype = getattr(torch, case.engine["dtype"])
    bound = TOLERANCE if dtype == torch.float32 else NOISE[dtype][1]
    seen, blind, turns = [], [], 0
    assert len(trainer.generations) == 3
    for step, (_, batch, rollouts) in enumerate(trainer.generations):
        models = models_at(case, trainer, pair, step)
        assert all(one.prompt_ids != one.theta_prompt_ids for one in rollouts)
        seen.append(errors(rollouts, *models))
        mixed = [replace(one, prompt_ids=one.theta_prompt_ids) for one in rollouts if not one.mixture.is_theta_only]
        blind.append(errors(mixed, *models))
        turns += len(rollouts) - len(batch["completion_ids"])
    right, wrong = torch.cat(seen), torch.cat(blind)
    found = f"mean {right.mean():.1e}, worst {right.max():.1e} over {len(right) // len(RECORDS)} tokens"
    found += f" (mean {wrong.mean():.1e} with the student's prompt for the teacher)"
    assert right.max() < bound, found
    assert right.mean() < min(NOISE[dtype][0], wrong.mean() / 5), found
    found += f", one model: {trainer.vllm_generation.pair.one_model}"
    return found + (f", {tool_calls(case, trainer, turns)}" if case.tools else "")


def tool_calls(case: Case, trainer: Any, later: int) -> str:
    """What became of the calls of tools; some failed, and some rows went on after one."""
    logs = [log for log in trainer.state.log_history if "tools/call_frequency" in log]
    failed = max(log["tools/failure_frequency"] for log in logs)
    ends = [one.finish_reason for _, _, rollouts in trainer.generations for one in rollouts]
    assert later > 0
    assert failed > 0
    assert "length" in ends or case.settings != CUT
    return f"{later} later turns, {failed:.2f} of calls failed, {ends.count('length')} turns cut"


def run(name: str) -> None:
    """A case in this process."""
    case = CASES[name]
    with TemporaryDirectory() as home:
        trainer, pair = build(case, Path(home))
        weights = trainer.vllm_generation.pair
        assert weights.one_model == (not case.generator)
        trainer.train()
        print("SEEN", hold(case, trainer, pair), flush=True)
        trainer.close()


def start(name: str) -> str:
    """Run a case in a process of its own, and return what it saw.

    Raises:
        RuntimeError: where it failed; its output is shown.
    """
    command = [sys.executable, __file__, "--case", name]
    environment = os.environ | {"PYTHONPATH": python_path()}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE, check=False)
    found = [line for line in ran.stdout.splitlines() if line.startswith("SEEN ")]
    if ran.returncode or not found:
        print(ran.stdout[-2000:], ran.stderr[-5000:], sep="\n")
        raise RuntimeError(f"ended with {ran.returncode}: {ran.stderr.strip().splitlines()[-1:]}")
    return found[0].removeprefix("SEEN ")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    flags.add_argument("--case", choices=list(CASES), metavar="CASE", help="run one in this process")
    args = flags.parse_args()
    if args.case:
        run(args.case)
        return
    report = Report(budget=3600)
    for name in args.only:
        report.step(name, lambda name=name: start(name))
        print(report.rows[-1], flush=True)
    print(report.table())


if __name__ == "__main__":
    main()
