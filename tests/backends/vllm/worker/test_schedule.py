"""The same requests however vLLM schedules them: cached prefixes, chunked prefill, preemption, compiled models."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.engines import Oracle, counter, request, start
from helpers.models import PAD, make_model
from helpers.oracle import with_wishes
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.rollouts.request import Request
from optimal_sampling_trl.rollouts.rollout import RECORDS, Rollout

pytestmark = pytest.mark.engine
SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {"enable_prefix_caching": False, "enable_chunked_prefill": False, "max_num_batched_tokens": 2048},
    "prefix_caching": {"enable_prefix_caching": True, "block_size": 32},
    "chunked_prefill": {"enable_chunked_prefill": True, "max_num_batched_tokens": 64},
    "preemption": {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "block_size": 32}
    | {"num_gpu_blocks_override": 14, "max_model_len": 256},
    "compiled": {"enforce_eager": False},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A pair whose teacher ends with another token than its student."""
    root = tmp_path_factory.mktemp("schedule")
    teacher = make_model(root / "t", "qwen3", 0, hidden=128, heads=4, kv_heads=2, vocab_size=320, eos_token_id=PAD)
    return teacher, make_model(root / "s", "qwen3", 1, tied=True)


@pytest.fixture(scope="module")
def oracle(pair: tuple[str, str]) -> Oracle:
    return Oracle(*pair, folded=(PAD,))


def requests() -> list[Request]:
    """16 requests in groups of two that share a prompt, and all share a beginning of 70 tokens."""
    letters, mixtures = random.Random(0), (Mixture(), Mixture.theta_only(), Mixture("trust_region"))
    start = "".join(letters.choice("abcdefgh ") for _ in range(70))
    texts = [start + "".join(letters.choice("abcdefgh ") for _ in range(letters.randint(0, 60))) for _ in range(8)]
    return with_wishes([request(texts[i // 2], mixtures[i % 3], seed=i, max_tokens=40) for i in range(16)])


SEEN: dict[str, list[Rollout]] = {}


@pytest.fixture(scope="module", params=SCHEDULES)
def scheduled(request: pytest.FixtureRequest, pair: tuple[str, str]) -> Iterator[tuple[str, Any]]:
    backend = start(*pair, disable_log_stats=False, **SCHEDULES[request.param])
    yield request.param, backend
    backend.close()


def test_records(scheduled: tuple[str, Any], oracle: Oracle) -> None:
    name, backend = scheduled
    asked = requests()
    rollouts = backend.generate(asked)
    SEEN[name] = rollouts
    oracle.check(rollouts, asked)
    if name == "preemption":
        preemptions = counter(backend, "num_preemptions")
        print(f"{preemptions} preemptions")
        assert preemptions > 0
    if name == "prefix_caching":
        hits = counter(backend, "prefix_cache_hits")
        print(f"{hits} tokens from the cache")
        assert hits > 0


def test_the_schedule_changes_nothing(scheduled: tuple[str, Any]) -> None:
    """Seeded requests give the same tokens and the same records in each schedule, as in the first one that ran."""
    name, _ = scheduled
    if name == "compiled":
        pytest.skip("compiled kernels round otherwise, and a token on an edge may flip; the oracle has judged them")
    first = next(iter(SEEN.values()))
    for one, other in zip(first, SEEN[name]):
        assert one.completion_ids == other.completion_ids
        for record in RECORDS:
            assert torch.allclose(getattr(one, record), getattr(other, record), atol=1e-5)


def test_folded_ends(scheduled: tuple[str, Any], oracle: Oracle) -> None:
    """The teacher's mass on its own end counts for the student's: no completion of the mixture holds the former."""
    _, backend = scheduled
    assert backend.pair.ending.stop[0] == 256
    assert backend.pair.ending.folded == (PAD,)
    asked = [request("end", Mixture.teacher_only(), seed=i, temperature=2.0, max_tokens=4) for i in range(200)]
    asked = with_wishes(asked)
    rollouts = backend.generate(asked)
    assert all(PAD not in rollout.completion_ids for rollout in rollouts)
    oracle.check(rollouts[:20], asked[:20])


def test_nothing_is_left_behind(scheduled: tuple[str, Any], tmp_path: Path) -> None:
    _, backend = scheduled
    assert not backend.llm.llm_engine.has_unfinished_requests()
    assert backend.llm.reset_prefix_cache()
