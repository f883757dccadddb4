"""Check the families of models on this machine, on a GPU eager and with CUDA graphs. A table says what was seen.

    python tests/checks/check_families.py                             # every family, a process for each and each mode
    python tests/checks/check_families.py --only gemma2 qwen3_next --at-once 4 --limit 300 --out output/families
    python tests/checks/check_families.py --only gemma4-wrappers --refused # shared caches under a vLLM before 0.31

Each process starts the tiny pair that the tests of that family have in a live engine which is too small for its
requests: prompts are read in parts, two of each share their cached beginning where prefixes are kept, requests are
preempted, their settings differ. Each record of each token is compared with both models' in transformers, whole and
without a cache: at first, again from the cache, after a reload of every weight under each way of naming them, and,
where the engine has several tables of blocks, after sleep. A line of JSON for each is in `families.jsonl`; of a
process that was cut it says what had held. A log has a time for each step, and every two minutes where the process is.

The engine computes in float32 where its kernels do, else in bfloat16. Where this vLLM lacks its kernels that route
tokens to experts, torch stands in, and the line says so. Triton's kernels of linear attention take their smallest
configuration; `--tune` has them tuned as in any engine, which takes minutes of a processor for each number of heads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")  # its lines have the time
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # on a GPU; else Triton multiplies float32 in TF32
os.environ.setdefault("VLLM_USE_FUSED_MOE_GROUPED_TOPK", "0")  # torch has no stand-in for it, see helpers/routing.py
sys.path.insert(0, str(Path(__file__).parents[1]))  # where the helpers are, and the tests whose pairs these are

import torch

from backends.vllm import test_families as plain
from backends.vllm.worker import test_hybrid as hybrid
from helpers.children import end
from helpers.engines import ON_A_GPU, Oracle, counter, request, runner_of, start
from helpers.models import FAMILIES
from helpers.oracle import check_dense, expected_records, with_wishes
from helpers.paths import ROOT, python_path
from helpers.routing import stand_in
from helpers.tuning import take_smallest
from optimal_sampling_trl.backends.vllm import limits
from optimal_sampling_trl.backends.vllm.families import LATENT, OTHER_BACKEND
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.pairing.wrappers import WRAPPERS, text_name
from optimal_sampling_trl.rollouts.request import Request
from optimal_sampling_trl.rollouts.rollout import RECORDS, Rollout

CASES: dict[str, Any] = {**plain.CASES, **hybrid.CASES, **hybrid.ON_GPUS}
MODES = ("eager", "graphs") if ON_A_GPU else ("eager",)
BOUNDS = (
    {"float32": (1e-4, 1e-3), "bfloat16": (0.06, 0.5)}
    if ON_A_GPU
    else {"float32": (1e-4, 1e-4), "bfloat16": (0.06, 0.25)}
)
"""The mean and the largest error of a record, in nats and in α, that rounding explains over hundreds of tokens."""
CUT = "cut"
"""The result of a process that was ended before it came to one."""
FAR = 1e9
"""A bound that no error of finite numbers is beyond."""
MIXTURES = (Mixture(), Mixture.theta_only(), Mixture.teacher_only(), Mixture("trust_region"))
SETTINGS: tuple[dict[str, Any], ...] = ({"temperature": 0.8}, {"repetition_penalty": 1.3}, {"temperature": 0})
SIZES = [1, 2, 4, 8, 16, 32, 64]
"""Numbers of tokens of a step for which a CUDA graph is captured."""


def is_hybrid(case: Any) -> bool:
    return isinstance(case, hybrid.Case)


def dtype_of(case: Any) -> str:
    """What the engine computes in: vLLM has kernels of latent attention on a GPU, and of linear attention anywhere,
    for bfloat16 alone."""
    return "bfloat16" if is_hybrid(case) or (case.teacher in LATENT and ON_A_GPU) else "float32"


def fitted(case: Any, dtype: str) -> Any:
    """The pair as this machine's kernels take it: stored in the engine's type; with the sizes of heads of published
    models of latent attention; and, where rounding would choose other experts, with all of them in use."""
    if is_hybrid(case):
        return case
    further = dict(case.further)
    if case.teacher in LATENT and ON_A_GPU:
        sizes = (192, 256) if case.teacher == "glm4_moe_lite" else (128, 128)
        further |= {"qk_nope_head_dim": sizes[0], "v_head_dim": sizes[1]}
    if dtype == "bfloat16":
        further |= {"dtype": torch.bfloat16}
        if "num_experts_per_tok" in FAMILIES[case.teacher]:
            further |= {"num_experts_per_tok": 4}
    return replace(case, further=further, blocks=case.blocks or (32 if case.teacher in LATENT else 16))


def arguments(case: Any, dtype: str, mode: str) -> dict[str, Any]:
    """The engine's: few blocks, no more requests at once than a state each, and what the mode says."""
    found = case.arguments
    found = {**found, "dtype": dtype, "max_num_seqs": 12, "disable_log_stats": False, "enforce_eager": mode == "eager"}
    if mode == "graphs":
        found["compilation_config"] = {"cudagraph_capture_sizes": SIZES}
    if ON_A_GPU and case.teacher.startswith("qwen3_") and is_hybrid(case):
        found["gdn_prefill_backend"] = "triton"  # the other one is FlashInfer's, a package of its own
    if ON_A_GPU:  # its least share of a card that others use, too: the cache's size is given
        found |= {"gpu_memory_utilization": 0.02, "enable_sleep_mode": sleeps(case)}
    return found


def sleeps(case: Any) -> bool:
    """Tell whether the engine has caches of several kinds."""
    is_shared = "num_kv_shared_layers" in case.further
    return is_hybrid(case) or is_shared or len({each for each in case.windows if each}) > 1


def requests(case: Any) -> list[Request]:
    """Each prompt twice, of many mixtures and settings, as different rows of one batch."""
    if is_hybrid(case):
        return hybrid.asked(case.length)
    asked = [
        request(text, MIXTURES[i % 4], seed=i, max_tokens=case.tokens, **SETTINGS[i % len(SETTINGS)])
        for i, text in enumerate(case.texts)
    ]
    return with_wishes(asked)


class Seen:
    """What one process has seen so far: a line of JSON.

    Args:
        name: the case's.
        mode: eager or graphs.
        dtype: what the engine computes in.
    """

    def __init__(self, name: str, mode: str, dtype: str) -> None:
        self.bound, self.began = BOUNDS[dtype], time.perf_counter()
        self.found: dict[str, Any] = {"family": name, "mode": mode, "dtype": dtype, "result": CUT, "errors": {}}

    def tell(self, step: str) -> None:
        """Print what was seen up to this step."""
        self.found |= {"step": step, "seconds": round(time.perf_counter() - self.began)}
        print(json.dumps(self.found), flush=True)

    def compare(self, step: str, oracle: Oracle, rollouts: list[Rollout], asked: list[Request]) -> None:
        """Note the mean and the largest error of a step.

        Raises:
            AssertionError: above the bound.
        """
        mean, worst, tokens = errors(oracle, rollouts, asked, self.bound[1])
        self.found["errors"][step] = {"mean": mean, "worst": worst, "tokens": tokens}
        self.tell(step)
        assert mean <= self.bound[0], f"{step}: the mean error of a record is {mean:.2g}, beyond {self.bound[0]}"
        assert worst <= self.bound[1], f"{step}: a record is off by {worst:.2g}, beyond {self.bound[1]}"


def errors(oracle: Oracle, rollouts: list[Rollout], asked: list[Request], bound: float) -> tuple[float, float, int]:
    """The mean error of the worst record, the largest of any, and the number of tokens.

    Raises:
        AssertionError: where dense records are further off than the bound.
    """
    models = oracle.models["teacher"], oracle.models["theta"]
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in RECORDS}
    for rollout, one in zip(rollouts, asked, strict=True):
        wanted, _ = expected_records(rollout, *models, oracle.ending, one.sampling)
        for name in RECORDS:
            got = getattr(rollout, name).double()
            error = (got - wanted[name]).abs().masked_fill(got == wanted[name], 0.0)
            parts[name].append(error.nan_to_num(nan=torch.inf))
        check_dense(rollout, one.dense, *models, oracle.ending, bound)
    table = torch.stack([torch.cat(each) for each in parts.values()])
    return float(table.mean(1).max()), float(table.max()), table.shape[1]


def check(case: Any, seen: Seen, mode: str, root: Path) -> None:
    """Start the engine, and hold what it returns against the oracle in all steps."""
    case = fitted(case, seen.found["dtype"])
    teacher, theta = case.make(root)
    oracle, asked = Oracle(teacher, theta), requests(case)
    seen.tell("starting")
    backend = start(teacher, theta, **arguments(case, seen.found["dtype"], mode))
    try:
        seen.found |= describe(runner_of(backend))
        seen.tell("started")
        seen.compare("first", oracle, backend.generate(asked), asked)
        again = backend.generate(asked)
        seen.compare("again", oracle, again, asked)
        assert len({tuple(one.completion_ids) for one in again[:2]}) == 2, "two samples of one prompt are equal"
        for name in ("num_preemptions", "prefix_cache_hits"):
            seen.found[name] = counter(backend, name)
        asked = asked[:4]  # one of each mixture tells the weights
        reload(case, seen, oracle, backend, asked, again[:4])
        if ON_A_GPU and sleeps(case):
            sleep_and_wake(backend)
            seen.compare("after sleep", oracle, backend.generate(asked), asked)
    finally:
        backend.close()


def describe(runner: Any) -> dict[str, Any]:
    """The runner's way of running: its state, its kernels of attention, the kinds of its groups of caches."""
    groups = [group for groups in runner.attn_groups for group in groups]
    return {
        "state": type(getattr(runner, "model_state", runner)).__name__,
        "kernels": sorted({group.backend.get_name() for group in groups}),
        "groups": [type(group.kv_cache_spec).__name__ for group in runner.kv_cache_config.kv_cache_groups],
        "streams": 2 if runner.model.side_stream is not None else 1,
    }


def sleep_and_wake(backend: Any) -> None:
    """Put the engine to sleep and wake it, beside other processes on the card, too.

    vLLM stops where the card has less memory free after it fell asleep than before: a tiny engine frees less than what
    a neighbour may take in that moment. By then it sleeps.
    """
    try:
        backend.sleep()
    except AssertionError as error:
        if "Memory usage increased" not in str(error):
            raise
        print("asleep; other processes took more of the card than was freed", flush=True)
        executor = backend.llm.llm_engine.model_executor
        executor.sleeping_tags = {"weights", "kv_cache"}
        if not executor.is_sleeping:  # vLLM 0.31 reads it from the tags
            executor.is_sleeping = True
    backend.wake_up()


def reload(case: Any, seen: Seen, oracle: Oracle, backend: Any, asked: list[Request], old: list[Rollout]) -> None:
    """Move every weight of the student, and push it under a trainer's names, then under those of a text class."""
    student = oracle.models["theta"]
    for kind, name_of in {"whole": str, "text": text_name}.items():
        if kind == "text" and case.theta not in WRAPPERS:
            continue
        with torch.no_grad():
            for weight in student.parameters():
                moved = weight + torch.randn_like(weight) * 0.02
                weight.copy_(moved.bfloat16() if seen.found["dtype"] == "bfloat16" else moved)
        assert errors(oracle, old, asked, FAR)[1] > seen.bound[1], "the bound does not tell old weights from new"
        pushed = [(name_of(name), weight) for name, weight in student.named_parameters()]
        backend.load_theta([(name, weight) for name, weight in pushed if name is not None])
        old = backend.generate(asked)
        seen.compare(f"reloaded, {kind} names", oracle, old, asked)


def tell_where() -> None:
    """Print every two minutes where the process is. faulthandler's timer reads frames without the interpreter's lock:
    a process that was compiling a kernel died while it did."""
    while True:
        time.sleep(120)
        traceback.print_stack(sys._current_frames()[threading.main_thread().ident or 0])


def one(name: str, mode: str, dtype: str | None, is_tuned: bool, takes_refused: bool) -> None:
    """Check one case in this process, and print its line."""
    case = CASES[name]
    seen = Seen(name, mode, dtype or dtype_of(case))
    threading.Thread(target=tell_where, daemon=True).start()
    try:
        if stand_in():
            seen.found["routing"] = "torch"
        if ON_A_GPU and not is_tuned:
            take_smallest()
        if takes_refused:
            limits.check_shared_caches = lambda *_, **__: None  # type: ignore[assignment]
        with TemporaryDirectory() as root:
            os.environ["VLLM_CACHE_ROOT"] = f"{root}/cache"
            check(case, seen, mode, Path(root))
        seen.found["result"] = "ok" if seen.found["num_preemptions"] else "ok, but no request was preempted"
    except BaseException as error:
        traceback.print_exc()
        seen.found["result"] = "refused" if OTHER_BACKEND in str(error) else "failed"
        seen.found["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
    seen.tell("end")
    os._exit(0)  # past whatever a broken engine left running


def last_printed(command: Sequence[str], log: Path, limit: float) -> tuple[dict[str, Any] | None, str]:
    """Run a case in a process that may crash or hang; return the last line that it printed of itself, and its end."""
    environment = os.environ | {"PYTHONPATH": python_path(), "PYTHONFAULTHANDLER": "1"}
    environment.pop("MASTER_PORT", None)  # cases at once would share it; without one a trainer takes a free one
    with log.open("w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT, start_new_session=True)
        try:
            code: int | str = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"nothing after {limit:.0f} s"
        finally:
            end(child)
    lines = log.read_text(errors="replace").splitlines()
    found = [json.loads(line) for line in lines if line.startswith('{"family"')]
    return found[-1] if found else None, f"ended: {code}; {' / '.join(lines[-3:])[-400:]}"


def in_a_process(name: str, mode: str, limit: float, out: Path, flags: list[str]) -> dict[str, Any]:
    """The line of one case: the last that its process printed."""
    command = [sys.executable, __file__, "--case", name, "--mode", mode, *flags]
    line, ended = last_printed(command, out / f"{name}-{mode}.log", limit)
    line = line or {"family": name, "mode": mode, "dtype": dtype_of(CASES[name]), "result": CUT, "errors": {}}
    return line | ({"reason": ended} if line["result"] == CUT else {})


def row(line: dict[str, Any]) -> str:
    """A line as a row of the table."""
    steps = line.get("errors", {})
    worst = max((step["worst"] for step in steps.values()), default=None)
    seen = "" if worst is None else f"{worst:.0e} in {sum(step['tokens'] for step in steps.values())}"
    kernels = ", ".join(line.get("kernels", [])) + ("; torch routes" if "routing" in line else "")
    counts = f"{line.get('num_preemptions', '')} | {line.get('prefix_cache_hits', '')}"
    words = line["result"] if line["result"] == "ok" else f"{line['result']}: {line.get('reason', '')[:160]}"
    return f"| {line['family']} | {line['dtype']}, {line['mode']} | {seen} | {counts} | {kernels} | {words} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--modes", nargs="+", choices=("eager", "graphs"), default=list(MODES))
    parser.add_argument("--at-once", type=int, default=1, help="processes at the same time")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a process may take")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "families")
    parser.add_argument("--dtype", choices=BOUNDS, help="what the engine computes in, where its kernels do")
    parser.add_argument("--tune", action="store_true", help="let Triton tune the kernels of linear attention")
    parser.add_argument("--refused", action="store_true", help="also what shares caches under an older vLLM")
    parser.add_argument("--case", choices=tuple(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        one(args.case, args.mode, args.dtype, args.tune, args.refused)
    flags = [f"--{name}" for name in ("tune", "refused") if getattr(args, name)]
    flags += ["--dtype", args.dtype] if args.dtype else []
    args.out.mkdir(parents=True, exist_ok=True)

    def work(name: str, mode: str) -> dict[str, Any]:
        line = in_a_process(name, mode, args.limit, args.out, flags)
        with (args.out / "families.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        return line

    with ThreadPoolExecutor(args.at_once) as pool:
        lines = list(pool.map(work, *zip(*[(name, mode) for name in args.only for mode in args.modes])))
    head = [
        "| family | run | worst error in tokens | preempted | hits | kernels | result |",
        "|---|---|--:|--:|--:|---|---|",
    ]
    print("\n".join(["", *head, *map(row, lines)]))
    sys.exit(any(line["result"] != "ok" for line in lines))


if __name__ == "__main__":
    main()
