"""The teacher is the student itself: the weights are in memory once, the caches are two, and a reload reaches both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.engines import TEXTS, Oracle, request, runner_of, start
from helpers.models import make_model
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.pairing import STUDENT
from optimal_sampling_trl.rollouts.request import Request

pytestmark = pytest.mark.engine
STUDENTS: dict[str, dict[str, Any]] = {
    "tied": {"family": "qwen3", "tied": True},
    "biases": {"family": "qwen2"},
    "experts": {"family": "qwen3_moe"},
    "inside of a wrapper": {"family": "qwen3_vl"},
}


class Live:
    """An engine on one model, and the oracle in which teacher and student are one, too."""

    def __init__(self, folder: Path, family: str, **settings: Any) -> None:
        self.path = make_model(folder, family, 1, **settings)
        self.backend: Any = start(STUDENT, self.path)
        self.oracle = Oracle(self.path, self.path)
        self.oracle.models["teacher"] = self.oracle.models["theta"]

    @property
    def fused(self) -> Any:
        return runner_of(self.backend).model

    def check(self) -> None:
        """Requests in which the teacher reads more than the student, less, or the same."""
        ids = [request(text).prompt_ids for text in TEXTS]
        pairs = [(a + b, b) for a, b in zip(ids, reversed(ids))] + [(b, a + b) for a, b in zip(ids, ids)]
        asked = [
            Request(teacher, theta, Mixture(), request("", seed=seed).sampling)
            for seed, (teacher, theta) in enumerate([*pairs, (ids[0], ids[0])])
        ]
        self.oracle.check(self.backend.generate(asked), asked)


@pytest.fixture(scope="module", params=STUDENTS)
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    live = Live(tmp_path_factory.mktemp("shared") / "theta", **STUDENTS[request.param])
    yield live
    live.backend.close()


def storages(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}


def test_the_weights_are_in_memory_once(live: Live) -> None:
    theta, teacher = live.fused.theta, live.fused.teacher
    assert dict(theta.named_parameters()).keys() == dict(teacher.named_parameters()).keys()
    assert storages(theta) == storages(teacher)
    assert not any(tensor.is_meta for tensor in (*theta.parameters(), *theta.buffers()))


def test_each_has_its_own_caches(live: Live) -> None:
    """Layers without a cache, such as experts, are found under both models' names."""
    layers = live.backend.llm.llm_engine.vllm_config.compilation_config.static_forward_context
    caches = [
        {layers[name].kv_cache.data_ptr() for name in names if hasattr(layers[name], "kv_cache")}
        for names in (live.fused.theta_layers, live.fused.teacher_layers)
    ]
    assert len(caches[0]) == len(caches[1]) == 2  # layers
    assert not caches[0] & caches[1]
    rest = [name for name in live.fused.teacher_layers if not hasattr(layers[name], "kv_cache")]
    assert all(layers[f"theta.{name}"] is layers[name] for name in rest)
    assert bool(rest) == ("moe" in type(live.fused.teacher).__name__.lower())


def test_records_and_a_reload_of_every_weight(live: Live) -> None:
    """Each model reads its own prompt, before and after; the teacher's digest is the student's."""
    live.check()
    assert live.backend.weight_digest("teacher") is None  # the files'
    before = storages(live.fused)
    model = live.oracle.models["theta"]
    for _ in range(2):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.02)
        live.backend.load_theta(list(model.named_parameters()))
        live.check()
    assert live.backend.weight_digest("teacher") == live.backend.weight_digest("theta") is not None
    assert storages(live.fused.theta) == storages(live.fused.teacher)
    assert len(storages(live.fused)) == len(before)
