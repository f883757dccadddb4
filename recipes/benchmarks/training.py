# /// script
# dependencies = ["optimal-sampling-trl[vllm]"]
# ///
"""Measure a training step beside TRL's: seconds of its parts and memory, with the same models, prompts and tokens.

    python recipes/benchmarks/training.py --shapes 3b 0.5b --completions 64 --tokens 256     # on a GPU with 80 GB
    python recipes/benchmarks/training.py --completions 8 --tokens 8 --steps 2               # on a CPU, small models

Each arm is a process of its own, one after the other: TRL's trainers with vLLM in the same process (GRPO from the
student's rollouts; distillation with its teacher in the trainer), then this package's. The next process imports its
libraries meanwhile, then waits. TRL's need a GPU: vLLM on a CPU does not take new weights the way they send them.
Weights are random, both models have one vocabulary, no completion ends early, and every step counts from the second
on; `--first 256` shortens the completions of the first. `--json` keeps the seconds of each step, and those until the
trainer stood, as each arm ends. With `--profile` one more step says where the time of its update goes.

| column | what it says |
|---|---|
| `rollout` | s of a step in the engine |
| `sync` | s in which the student's weights come into the engine |
| `update` | s of forward and backward passes of the loss and of the optimizer |
| `other` | s of all else before the loss: log-probabilities, rewards, texts, a teacher's forward pass |
| `step` | s of the whole |
| `GiB` | the most memory in use in a step, without the engine's cache; on a CPU the process's, with it |
| `÷ TRL` | `step` over that of TRL's trainer of the same kind, and `GiB` likewise |
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import trl
import vllm

from random_pair import describe, make_random_pair, parser, processor
from training_arms import ARMS, BASES, ON_GPU, Arm, build
from training_profile import Profile
from training_tables import PARTS, line, profiled
from training_watch import TimeWatch, memory

HEAD = ("arm", *PARTS, "GiB", "step ÷ TRL", "GiB ÷ TRL")


def main() -> None:
    args = parse()
    if args.arm:
        input()  # waits for its turn; raises where the parent has ended
        print(json.dumps(measure(ARMS[args.arm], f"{args.home}/teacher", f"{args.home}/theta", args)))
        return
    print(describe(args, f"vLLM {vllm.__version__}, TRL {trl.__version__}"))
    print("| " + " | ".join(HEAD) + " |\n|---|" + "---:|" * (len(HEAD) - 1), flush=True)
    found: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    began = time.monotonic()
    with folder(args) as home:
        waiting = start(args.arms[0], home)
        if not Path(home, "theta", "tokenizer.json").exists():  # the last file of a pair
            make_random_pair(home, args)
        for name, following in zip(args.arms, [*args.arms[1:], None]):
            process = waiting
            if following:
                waiting = start(following, home)
            try:
                found[name] = run(name, process, min(args.limit, began + args.budget - time.monotonic()))
            except RuntimeError as error:
                failed.append(str(error))
                continue
            print(line(name, found[name], found.get(BASES[ARMS[name].kind], {})), flush=True)
            if args.json:
                args.json.write_text(json.dumps({"command": sys.argv, "device": processor(), "arms": found}, indent=1))
    for name in found if args.profile else ():
        print("\n" + "\n".join(profiled(name, found[name]["profile"])))
    if failed:
        raise SystemExit("\n\n".join(failed))


def parse() -> argparse.Namespace:
    flags = parser(__doc__)
    flags.set_defaults(one_vocabulary=True)  # TRL's distillation takes no pair of two
    here = [name for name, arm in ARMS.items() if ON_GPU or (arm.share is not None and not arm.drafts)]
    flags.add_argument("--arms", nargs="+", choices=ARMS, default=here, metavar="ARM", help=", ".join(ARMS))
    flags.add_argument("--completions", type=int, default=64, help="of a step")
    flags.add_argument("--micro-batch", type=int, default=8, help="completions of a forward pass")
    flags.add_argument("--group", type=int, default=8, help="completions of a prompt in GRPO")
    flags.add_argument("--steps", type=int, default=4, help="of which the first warms up")
    flags.add_argument("--first", type=int, help="tokens of a completion of the first step, all of them by default")
    flags.add_argument("--profile", action="store_true", help="record a further step's kernels, all but the rollout's")
    flags.add_argument("--limit", type=float, default=3600, help="seconds that an arm may take")
    flags.add_argument("--budget", type=float, default=86400, help="seconds that all of them may take")
    flags.add_argument("--memory", type=float, default=0.3, help="the engine's share of the GPU's memory")
    flags.add_argument("--folder", help="where the pair is written for a while, such as /dev/shm")
    flags.add_argument("--pair", help="where it is written to stay, and read by a later call of the same shapes")
    flags.add_argument("--json", type=Path, help="file for the numbers")
    flags.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)  # of a process that measures one
    flags.add_argument("--home", help=argparse.SUPPRESS)
    if ON_GPU:
        flags.set_defaults(prompt=128, tokens=256, dtype="bfloat16")
    return flags.parse_args()


def folder(args: argparse.Namespace) -> AbstractContextManager[str]:
    """Open the pair's folder: the one that stays, or one for a while."""
    if args.pair:
        return nullcontext(args.pair)
    return tempfile.TemporaryDirectory(prefix="training-", dir=args.folder)


def start(name: str, home: str) -> subprocess.Popen[str]:
    """Start the process of an arm: it imports what it needs, and waits for a line before it touches a GPU."""
    command = [sys.executable, __file__, *sys.argv[1:], "--arm", name, "--home", home]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def run(name: str, process: subprocess.Popen[str], limit: float) -> dict[str, Any]:
    """Let the process of an arm measure.

    Raises:
        RuntimeError: with the end of what it said, where it failed, or was ended after `limit` seconds.
    """
    try:
        output, errors = process.communicate("\n", max(limit, 0))
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        errors += f"\nended after {limit:.0f} s"
    if process.returncode != 0:
        raise RuntimeError(f"{name}: {errors[-3000:]}")
    return json.loads(output.strip().splitlines()[-1])


def measure(arm: Arm, teacher: str, theta: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps; the mean seconds of a step's parts, memory, and what the start and each step took."""
    began = time.perf_counter()
    args.steps += args.profile
    trainer = build(arm, teacher, theta, args)
    started = time.perf_counter() - began
    watch = Profile(trainer, args.first, args.steps) if args.profile else TimeWatch(trainer, args.first)
    trainer.add_callback(watch)
    trainer.train()
    found = watch.found() | {"GiB": memory(trainer), "started": started}
    trainer.accelerator.end_training()
    return found


if __name__ == "__main__":
    main()
