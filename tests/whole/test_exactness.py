"""The small form of exactness.py: tokens are drawn from q, those of a stream and of neighbouring seeds independently.

A million tokens of each method and backend are drawn by the script itself, whose table is in docs/robustness.md.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from checks.exactness import (
    ENGINES,
    FALSE_ALARM,
    MIXTURES,
    make_walkers,
    of_pairs,
    of_transitions,
    places,
    rows_of_q,
    walk,
)
from optimal_sampling_trl.backends import make_backend

TESTS = 2 * 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_walkers(tmp_path_factory.mktemp("walkers"))


@pytest.mark.parametrize("name", ["transformers", pytest.param("vllm", marks=pytest.mark.engine)])
def test_streams(pair: tuple[str, str], name: str) -> None:
    """30 000 tokens of 300 seeds. A correct sampler fails for one in 10⁶ sets of seeds, shared out among the tests; a
    wrong α, tokens compared with themselves and streams of one seed fail by far more."""
    if name == "vllm":
        pytest.importorskip("vllm")
    arguments: dict[str, Any] = ENGINES[name] | ({"max_num_seqs": 512} if name == "vllm" else {})
    backend = make_backend(name, *pair, **arguments)
    try:
        mixture = MIXTURES["kl_symmetry"]
        alpha, q, of_theta, of_teacher = rows_of_q(pair, mixture)
        walks = walk(backend, mixture, 300)
        assert torch.equal(walks[5:9], walk(backend, mixture, 4, first_seed=5)), "seeds reproduce in any batch"
    finally:
        if name == "vllm":
            backend.close()
    u = places(walks, q)
    found = of_transitions(walks, q), of_pairs(u[:, 0:-1:2], u[:, 1::2]), of_pairs(u[0:-1:2], u[1::2])
    print({chi.freedom: chi.p for chi in found})
    assert min(chi.p for chi in found) > FALSE_ALARM / TESTS
    weight = (alpha - 0.1)[:, None]
    wrong = (((1 - weight) * of_theta + weight * of_teacher) / 0.25).softmax(1)
    assert of_transitions(walks, wrong).p < FALSE_ALARM**3
    assert of_pairs(u, u).p < FALSE_ALARM**3
