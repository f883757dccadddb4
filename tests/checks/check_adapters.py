"""Train a LoRA adapter on a student of every family, with the fused engine of this machine. A table says how it went.

    python tests/checks/check_adapters.py                                     # every family, a process for each
    python tests/checks/check_adapters.py --only qwen3_5-states lfm2-states --at-once 4 --out output/adapters

Each process trains the tiny pair of tests/trainers/engines/test_colocated.py for three steps of GRPO. The trainer
computes in float32 on the processor; the engine, on a GPU where there is one, takes its weights with the adapter
merged at each step. The table has the largest mean difference between both log θ in a batch. A line of JSON for
each family is in `adapters.jsonl`, beside a log.

As in check_families.py, the engine computes in bfloat16 where its kernels do, torch may choose the experts, and tuned
kernels take their smallest configuration.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "recipes")]  # the tests, and pairs

from backends.vllm.test_families import Case
from checks.check_families import dtype_of, fitted, last_printed  # sets what vLLM reads from the environment first
from helpers.engines import ON_A_GPU, TOLERANCE
from helpers.paths import ROOT
from helpers.routing import stand_in
from helpers.tuning import take_smallest
from trainers.engines import test_colocated as colocated

SHARED = colocated.WINDOWS | {
    "layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 1,
}
"""Of models whose last layer reads the cache of an earlier one."""
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{family: (family, *rest) for family, *rest in colocated.STUDENTS.values()},
    "gemma4-shared": ("gemma4", SHARED, {"target_modules": r".*language_model.*\.(q|down)_proj"}),
    **{f"{name}-states": (name, had, {"target_modules": at}) for name, (had, at) in colocated.STATES.items()},
}
"""Family, settings of both models, where the adapter goes."""


def train(name: str, root: Path) -> dict[str, Any]:
    """Train a case, and return its line."""
    family, settings, places = CASES[name]
    case = Case(family, family, further=settings)
    dtype = "bfloat16" if name.endswith("-states") else dtype_of(case)
    arguments: dict[str, Any] = {"dtype": dtype}
    if ON_A_GPU:
        arguments |= {"gpu_memory_utilization": 0.02}
        if family in ("qwen3_next", "qwen3_5", "qwen3_5_text"):
            arguments["gdn_prefill_backend"] = "triton"  # the other one is FlashInfer's, a package of its own
    if not name.endswith("-states"):
        settings = fitted(case, dtype).further
    line = {"family": name, "dtype": dtype, "routing": "torch" if stand_in() else "vllm"}
    if ON_A_GPU:
        take_smallest()
    line["difference"] = colocated.train_adapter(root, family, settings, places, **arguments)
    bound = TOLERANCE if dtype == "float32" else colocated.ROUNDING
    return line | {"result": "ok" if line["difference"] < bound else f"beyond {bound}"}


def one(name: str) -> None:
    """Train one case in this process, and print its line."""
    began, line = time.perf_counter(), {"family": name}
    try:
        with TemporaryDirectory() as root:
            os.environ["VLLM_CACHE_ROOT"] = f"{root}/cache"
            line = train(name, Path(root))
    except BaseException as error:
        traceback.print_exc()
        line["result"] = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
    print(json.dumps(line | {"seconds": round(time.perf_counter() - began)}), flush=True)
    os._exit(0)  # past whatever a broken engine left running


def in_a_process(name: str, limit: float, out: Path) -> dict[str, Any]:
    """The line of one case, from a process that may crash or hang."""
    line, ended = last_printed([sys.executable, __file__, "--case", name], out / f"{name}.log", limit)
    return line or {"family": name, "result": ended}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--at-once", type=int, default=1, help="processes at the same time")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a process may take")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "adapters")
    parser.add_argument("--case", choices=tuple(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        one(args.case)
    args.out.mkdir(parents=True, exist_ok=True)

    def work(name: str) -> dict[str, Any]:
        line = in_a_process(name, args.limit, args.out)
        with (args.out / "adapters.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        return line

    with ThreadPoolExecutor(args.at_once) as pool:
        lines = list(pool.map(work, args.only))
    print("\n| family | engine | log θ apart by | result |\n|---|---|--:|---|")
    for line in lines:
        apart = f"{line['difference']:.0e}" if "difference" in line else ""
        print(f"| {line['family']} | {line.get('dtype', '')} | {apart} | {line['result'][:160]} |")
    sys.exit(any(line["result"] != "ok" for line in lines))


if __name__ == "__main__":
    main()
