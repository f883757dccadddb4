# /// script
# dependencies = ["optimal-sampling-trl[vllm]"]
# ///
"""Measure whether the fused engine is as fast as that of an older commit: both live on one device and take turns.

    mkdir -p output/before && git archive COMMIT optimal_sampling_trl | tar -x -C output/before
    python recipes/benchmarks/two_versions.py --before output/before --shapes 3b 0.5b

Each engine is a process of its own, with its own version of the package; models, requests and flags are the same. A
round asks the one and then the other for a batch, so that whatever slows the machine slows both; on a CPU the
processor's seconds count, which other processes do not take. The table has the median round of each, and the median
and the range of what a round of this version took ÷ what the older one took.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from random_pair import describe, make_random_pair, make_requests, parser, shapes, synchronize

HERE = Path(__file__).parents[2]
NAMES = ("before", "now")


def main() -> None:
    args = parse()
    if args.pair:
        answer(args)
        return
    if not (Path(args.before) / "optimal_sampling_trl").is_dir():
        raise SystemExit(f"No folder optimal_sampling_trl in {args.before!r}; wanted another commit's, see --help.")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as home:
        pair = make_random_pair(home, args)
        engines = [start(root, pair, f"{home}/{name}") for root, name in zip((Path(args.before), HERE), NAMES)]
        try:
            for name, engine in zip(NAMES, engines):
                print(f"{name}: {read(engine)}")
            print(describe(args, f"two engines, {args.rounds} rounds in turn"))
            print("| batch | before, tok/s | now, tok/s | now ÷ before, time | range |\n|--:|--:|--:|--:|--:|")
            for batch in args.batches:
                print(row(batch, engines, args), flush=True)
        finally:
            for engine in engines:
                engine.kill()
                engine.wait()


def parse() -> argparse.Namespace:
    flags = parser(__doc__)
    flags.add_argument("--before", required=True, metavar="FOLDER", help="with another commit's optimal_sampling_trl")
    flags.add_argument("--pair", nargs=2, help=argparse.SUPPRESS)
    flags.set_defaults(rounds=5)
    if torch.cuda.is_available():
        flags.set_defaults(batches=(8, 32, 128), prompt=128, tokens=192, dtype="bfloat16")
    return flags.parse_args()


def start(root: Path, pair: tuple[str, str], cache: str) -> subprocess.Popen[str]:
    """Start an engine of the package in a folder, with a cache of compiled code of its own."""
    path = os.pathsep.join([str(root.resolve()), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--pair", *pair],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "VLLM_CACHE_ROOT": cache},
    )


def read(engine: Any) -> str:
    """The next line that an engine says to this script.

    Raises:
        RuntimeError: where its process has ended.
    """
    for line in engine.stdout:
        if line.startswith("says "):
            return line.removeprefix("says ").strip()
    raise RuntimeError("An engine has ended; its error is above.")


def row(batch: int, engines: list[Any], args: argparse.Namespace) -> str:
    """The table's line of a batch; the first round warms up."""
    rounds = []
    for _ in range(args.rounds + 1):
        took = []
        for engine in engines:
            engine.stdin.write(f"{batch}\n")
            engine.stdin.flush()
            took.append(float(read(engine)))
        rounds.append(took)
    before, now = zip(*rounds[1:])
    ratios = [new / old for new, old in zip(now, before)]
    speeds = [batch * args.tokens / statistics.median(each) for each in (before, now)]
    return (
        f"| {batch} | {speeds[0]:.1f} | {speeds[1]:.1f} | {statistics.median(ratios):.3f} | "
        f"{min(ratios):.3f} to {max(ratios):.3f} |"
    )


def answer(args: argparse.Namespace) -> None:
    """Be one of the engines: sample each batch whose size comes in, and say how many seconds it took."""
    import optimal_sampling_trl
    from optimal_sampling_trl.backends.vllm.backend import VLLMBackend

    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    backend = VLLMBackend(*args.pair, **arguments(args))
    print(f"says {Path(optimal_sampling_trl.__file__).parent}", flush=True)
    for line in sys.stdin:
        requests = make_requests(int(line), args)
        synchronize()
        began = clock()
        backend.generate(requests)
        synchronize()
        print(f"says {clock() - began}", flush=True)
    backend.close()


def arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return those of both engines, with a cache for the largest batch."""
    tokens, length = max(args.batches) * (args.prompt + args.tokens + 32), args.prompt + args.tokens + 1
    numbers = sum(shape.cached for shape in shapes(args).values())
    given: dict[str, Any] = {
        "dtype": args.dtype,
        "enable_prefix_caching": False,
        "max_model_len": max(512, length),
        "max_num_seqs": max(args.batches),
        "kv_cache_memory_bytes": max(1 << 28, numbers * getattr(torch, args.dtype).itemsize * tokens),
        "enforce_eager": not torch.cuda.is_available(),
    }
    return given | ({"gpu_memory_utilization": 0.1} if torch.cuda.is_available() else {})


if __name__ == "__main__":
    main()
