"""An engine is built in the caller's process, and leaves the caller's random generators alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.engines import TEXTS, request, start
from helpers.models import make_model

pytestmark = pytest.mark.engine


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def draws() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(1).item()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root: Path = tmp_path_factory.mktemp("pair")
    return make_model(root / "teacher", "qwen2", 0), make_model(root / "theta", "qwen2", 1)


def test_a_seed_from_before_the_engine_holds_after_it(pair: tuple[str, str]) -> None:
    """Requests without a seed draw from torch's global generator, which is where the program left it."""
    asked = [request(text, seed=None) for text in TEXTS]
    seed_all(7)
    wanted = draws()
    seed_all(7)
    engine = start(*pair)
    try:
        assert draws() == wanted

        def sample(seed: int) -> list[list[int]]:
            torch.manual_seed(seed)
            return [rollout.completion_ids for rollout in engine.generate(asked)]

        first = sample(1)
        assert sample(1) == first
        assert sample(2) != first
        torch.manual_seed(1)
        seeded = engine.generate([replace(one, sampling=replace(one.sampling, seed=3)) for one in asked])
        torch.manual_seed(2)
        again = engine.generate([replace(one, sampling=replace(one.sampling, seed=3)) for one in asked])
        assert [one.completion_ids for one in seeded] == [one.completion_ids for one in again]
    finally:
        engine.close()


def test_an_engine_that_is_given_a_seed_seeds_the_process(pair: tuple[str, str]) -> None:
    torch.manual_seed(7)
    start(*pair, seed=3).close()
    assert torch.initial_seed() == 3
