"""Check the package on several GPUs: two or four of them, and some minutes. A table says what was seen.

    python tests/checks/check_gpus.py                          # all steps, each with a time of its own
    python tests/checks/check_gpus.py --only tensor nccl       # some of them
    python tests/checks/check_gpus.py --ranks 4                # `tensor`, `ddp`, `fsdp` and `zero` over four

| step | what is tried |
|---|---|
| `tensor` | one engine over the GPUs, started by torchrun as TRL colocates: records, equal tokens, reloads, sleep |
| `tensor_graphs` | the same in bfloat16 with vLLM's own choice of CUDA graphs |
| `serve` | `optimal-sampling-serve --tensor-parallel-size 2`: records of 200 requests at once, weights from a file |
| `nccl` | a server on one GPU, weights from a trainer on another over NCCL, three times; seconds of each |
| `server_trainers` | trainers of each loss on one GPU, their server on another, three steps: records of every batch |
| `nccl_tensor` | as `nccl`, into a server over two GPUs, where there is a third for the trainer |
| `server_fsdp` | GRPO under FSDP2 over two GPUs, its server over two others: records of every batch on every rank |
| `ddp` | GRPO and distillation under DDP, an engine on each GPU, three steps: records of every batch on every rank |
| `fsdp` | the same under FSDP2 (recipes/accelerate/fsdp2.yaml) |
| `zero` | GRPO under DeepSpeed's ZeRO 3 (recipes/accelerate/deepspeed_zero3.yaml); it takes `pip install deepspeed` |
| `ddp_tensor` | GRPO under DDP with one engine over each two GPUs |

Without GPUs `tensor`, `ddp`, `ddp_tensor` and, with its file alone, `serve` run on a CPU in float32, and the others
are not tried. Every step is tried, whatever became of those before.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")  # what TRL's client and vLLM tell each other to meet at
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "recipes")]  # helpers, and pairs

import torch

from checks.check_server import Report, Steps
from helpers.children import end
from helpers.engines import TOLERANCE
from helpers.models import make_model
from helpers.paths import PROCESSES, RECIPES, ROOT, python_path
from helpers.servers import Server
from helpers.training import KINDS as LOSSES
from helpers.training import make_untrained_pair

GPUS = torch.cuda.device_count()
KINDS = ("grpo", "divergence")
PATIENCE = 400
"""Seconds that a step may take."""


def need(count: int) -> None:
    """Say why a step is left out.

    Raises:
        RuntimeError: where there are fewer GPUs.
    """
    if count > GPUS:
        raise RuntimeError(f"not tried: it takes {count} GPUs, and here are {GPUS}")


def launch(how: str, ranks: int) -> tuple[str, ...]:
    """The command that starts a script as so many ranks: torchrun, or accelerate with one of the recipes' files."""
    if how == "torchrun":
        return (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    flags = ("--num_processes", str(ranks), "--mixed_precision", "no", "--main_process_port", "0")
    file = str(RECIPES / "accelerate" / f"{how}.yaml")
    return (sys.executable, "-m", "accelerate.commands.launch", *flags, "--config_file", file)


def start(home: Path, name: str, *command: str, **variables: str) -> None:
    """Run a script to its end; what it said is shown where it failed.

    Raises:
        RuntimeError: with the last error that it named.
    """
    log = home / f"{name}.log"
    with log.open("w") as output:
        environment = os.environ | variables | {"PYTHONPATH": python_path()}
        environment["PYTHONFAULTHANDLER"] = "1"
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True, cwd=ROOT
        )
        try:
            code: int | str = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = f"nothing after {PATIENCE} s"
            end(process, signal.SIGABRT)  # each says where it stands
        finally:
            end(process)
    text = log.read_text(errors="replace")
    if code != 0:
        print(text[-6000:])
        errors = [line for line in text.splitlines() if "Error" in line and "ChildFailed" not in line]
        raise RuntimeError(f"ended with {code}: {' / '.join(errors[-2:])}")
    print("\n".join(line for line in text.splitlines() if line.startswith(("oracle", "rank"))))


def answers(folder: Path, pattern: str, ranks: int) -> list[dict[str, Any]]:
    """Return what the ranks wrote.

    Raises:
        RuntimeError: where one wrote nothing.
    """
    seen = [json.loads(file.read_text()) for file in sorted(folder.glob(pattern))]
    if len(seen) != ranks:
        raise RuntimeError(f"{len(seen)} ranks wrote {pattern}; wanted {ranks}")
    return seen


def require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def tensor(home: Path, name: str, ranks: int, *flags: str) -> str:
    """One engine over as many GPUs, see two_engines.py; its numbers against the float32 oracle's."""
    if GPUS or flags:
        need(ranks)
    teacher = make_model(home / "teacher", "qwen2", 0, hidden=512, layers=4, heads=8, kv_heads=2, vocab_size=320)
    theta = make_model(home / "theta", "qwen2", 1, hidden=256, layers=3, heads=4, kv_heads=1, tied=True)
    command = (*launch("torchrun", ranks), str(PROCESSES / "two_engines.py"))
    start(home, name, *command, teacher, theta, str(home), *flags)
    one, *others = seen = answers(home, "[0-9].json", ranks)
    same = all(one["completions"] == other["completions"] for other in others)
    require(same, f"the ranks drew other tokens: {seen}")
    return f"(worst errors {[each['worst'] for each in seen]}; bound {one['bound']:g}; {one['seen']})"


def serve(home: Path, name: str, ranks: int) -> str:
    """A server over two GPUs, or two processes of a CPU."""
    if GPUS:
        need(2)
    steps = Steps(home, "bfloat16" if GPUS else "float32", "tiny", "--tensor-parallel-size", "2")
    try:
        steps.models()
        if not GPUS:
            steps.start_another()
            return steps.file()
        steps.start()
        seen = steps.records()
        steps.servers[0].stop()
        steps.start_another()
        return f"{seen}; after a reload from a file: {steps.file()}"
    finally:
        steps.stop()


def nccl(home: Path, name: str, ranks: int, gpus: int = 1) -> str:
    """A server on the first `gpus`, a trainer on the one behind them."""
    need(gpus + 1)
    server = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus))), "NCCL_DEBUG": "WARN"}
    trainer = {"CUDA_VISIBLE_DEVICES": str(gpus), "NCCL_DEBUG": "WARN"}
    flags = ("--tensor-parallel-size", str(gpus))
    steps = Steps(home, "bfloat16", "qwen" if gpus == 1 else "tiny", *flags, server=server, trainer=trainer)
    try:
        steps.models()
        steps.start()
        return f"{steps.nccl()}; the server afterwards: {steps.afterwards()}"
    finally:
        steps.stop()


def train(
    home: Path, name: str, ranks: int, how: str = "torchrun", kinds: tuple[str, ...] = KINDS, share: int = 1
) -> str:
    """Ranks that train, each `share` of them with one engine; see two_processes.py."""
    if GPUS or how != "torchrun":
        need(ranks)
    pair = make_untrained_pair(home, same_size=True)
    command = (*launch(how, ranks), str(PROCESSES / "two_processes.py"), *pair, str(home), *kinds)
    further = ("--backend", "vllm", "--tensor-parallel-size", str(share), "--steps", "3")
    start(home, name, *command, *further, "--tolerance", str(TOLERANCE))
    return "; ".join(trained(answers(home, f"{kind}-[0-9].json", ranks), kind) for kind in kinds)


def server_of(pair: tuple[str, str], home: Path, gpus: int) -> Server:
    """A server of the pair over the first `gpus`."""
    program = ("-m", "optimal_sampling_trl.backends.vllm.server.serve")
    flags = ("--dtype", "float32", "--max-model-len", "128", "--gpu-memory-utilization", "0.1")
    over = ("--tensor-parallel-size", str(gpus))
    on_first = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}
    began = time.perf_counter()
    server = Server(*pair, home / "server.log", *flags, *over, program=program, environment=on_first)
    print(f"the server is up after {time.perf_counter() - began:.0f} s", flush=True)
    return server


def server_trainers(home: Path, name: str, ranks: int) -> str:
    """A trainer of each loss, one after the other, each in a process of its own, on one server."""
    need(2)
    pair = make_untrained_pair(home, same_size=True)
    server, seen = server_of(pair, home, 1), []
    try:
        for kind in LOSSES:
            command = (sys.executable, str(PROCESSES / "two_processes.py"), *pair, str(home), kind, "--steps", "3")
            flags = ("--server", server.url, "--tolerance", str(TOLERANCE))
            start(home, f"{name}-{kind}", *command, *flags, CUDA_VISIBLE_DEVICES="1")
            seen.append(trained(answers(home, f"{kind}-0.json", ranks=1), kind))
    finally:
        server.stop()
    return "; ".join(seen)


def server_fsdp(home: Path, name: str, ranks: int) -> str:
    """A trainer under FSDP2 over two GPUs, whose server is over two others."""
    need(4)
    pair = make_untrained_pair(home, same_size=True)
    server = server_of(pair, home, 2)
    command = (*launch("fsdp2", 2), str(PROCESSES / "two_processes.py"), *pair, str(home), "grpo", "--steps", "3")
    flags = ("--server", server.url, "--tolerance", str(TOLERANCE))
    try:
        start(home, name, *command, *flags, CUDA_VISIBLE_DEVICES="2,3")
        return trained(answers(home, "grpo-[0-9].json", 2), "grpo")
    finally:
        server.stop()


def trained(ranks: list[dict[str, Any]], kind: str) -> str:
    """Return what a run of a kind came to."""
    require({rank["processes"] for rank in ranks} == {len(ranks)}, f"{kind}: not {len(ranks)} processes")
    require(len({rank["parameters"] for rank in ranks}) == 1, f"{kind}: the ranks have other weights")
    require(all(len(rank["generations"]) == 3 for rank in ranks), f"{kind}: not three batches")
    apart = [log.get("engine/log_theta_difference", 0.0) for log in ranks[0]["log"]]
    require(max(apart) < TOLERANCE, f"{kind}: the engine's log theta is not the trainer's: {apart}")
    worst = ", ".join(f"{rank['worst']:.1e}" for rank in ranks)
    return f"{kind} under {ranks[0]['kind']}: worst errors {worst} (bound {TOLERANCE:g}), log theta apart {apart}"


STEPS: Mapping[str, Any] = {
    "tensor": tensor,
    "nccl": nccl,
    "fsdp": partial(train, how="fsdp2"),
    "ddp": train,
    "tensor_graphs": lambda home, name, ranks: tensor(home, name, ranks, "graphs"),
    "serve": serve,
    "server_trainers": server_trainers,
    "ddp_tensor": partial(train, kinds=KINDS[:1], share=2),
    "nccl_tensor": partial(nccl, gpus=2),
    "server_fsdp": server_fsdp,
    "zero": partial(train, how="deepspeed_zero3", kinds=KINDS[:1]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--ranks", type=int, default=2, help="processes of `tensor`, `ddp`, `fsdp` and `zero`")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))  # so that servers do not outlive it
    names = [torch.cuda.get_device_name(index) for index in range(GPUS)]
    print(f"{GPUS} GPUs {sorted(set(names))}, torch {torch.__version__}", flush=True)
    report = Report(budget=PATIENCE * len(args.only))
    for name in args.only:
        with tempfile.TemporaryDirectory(prefix=f"check-gpus-{name}-") as home:
            report.step(name, partial(STEPS[name], Path(home), name, args.ranks))
    print(report.table())


if __name__ == "__main__":
    main()
