"""Two prompts in the engine on a CPU: either is the shorter one, in chunks, preempted, with blocks that are shared."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from helpers.engines import Oracle, counter, start
from helpers.models import make_model, make_tokenizer
from helpers.oracle import with_wishes
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.rollouts.request import Request, Sampling

pytestmark = pytest.mark.engine
MIXTURES = (Mixture(), Mixture.theta_only(), Mixture("trust_region"), Mixture.teacher_only())
SMALL = {"max_num_batched_tokens": 64, "block_size": 32, "num_gpu_blocks_override": 16, "max_model_len": 256}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Oracle]]:
    root = tmp_path_factory.mktemp("streams")
    teacher = make_model(root / "teacher", "qwen3", 0, hidden=128, heads=4, kv_heads=2, vocab_size=320)
    theta = make_model(root / "theta", "qwen3", 1, tied=True)
    backend = start(teacher, theta, disable_log_stats=False, **SMALL)
    yield backend, Oracle(teacher, theta)
    backend.close()


def prompts(seed: int, *lengths: int) -> list[list[int]]:
    letters, tokenizer = random.Random(seed), make_tokenizer()
    texts = ("".join(letters.choice("abcdefgh ") for _ in range(length)) for length in lengths)
    return [list(tokenizer(text)["input_ids"]) for text in texts]


def test_either_prompt_is_the_shorter_one(live: tuple[Any, Oracle]) -> None:
    """In a batch with requests of one prompt; a long prompt takes several steps, of which the other reads none yet."""
    backend, oracle = live
    lengths = [(150, 3), (3, 150), (70, 69), (69, 70), (40, 40), (33, 1), (1, 33), (130, 66), (96, 64), (64, 96)]
    asked = []
    for index, pair in enumerate(lengths):
        teacher, theta = prompts(index, *pair)
        if index % 5 == 4:
            theta = teacher
        for sample in range(2):
            sampling = Sampling(max_tokens=50, ignore_eos=True, seed=10 * index + sample)
            asked.append(Request(teacher, theta, MIXTURES[(index + sample) % 4], sampling))
    asked = with_wishes(asked)
    before = counter(backend, "num_preemptions")
    oracle.check(backend.generate(asked), asked)
    assert counter(backend, "num_preemptions") > before


@pytest.mark.parametrize("longer", ["teacher", "student"])
def test_a_group_shares_its_prompts(live: tuple[Any, Oracle], longer: str) -> None:
    """Blocks of the prompts are shared, and no completion's; the shift leaves other remainders of a block."""
    backend, oracle = live
    before = counter(backend, "prefix_cache_hits")
    for length in (3, 32, 37, 95):
        pair = prompts(length, 100, length)
        teacher, theta = pair if longer == "teacher" else reversed(pair)
        samplings = [Sampling(max_tokens=40, ignore_eos=True, seed=seed) for seed in range(4)]
        asked = [Request(teacher, theta, Mixture(), sampling) for sampling in samplings]
        oracle.check(backend.generate(asked), asked)
    assert counter(backend, "prefix_cache_hits") > before


def test_two_prompts_give_other_records_than_one(live: tuple[Any, Oracle]) -> None:
    """The check means something: held against the student's prompt alone, the teacher's records are wrong."""
    backend, oracle = live
    teacher, theta = prompts(0, 60, 20)
    sampling = Sampling(max_tokens=20, ignore_eos=True, seed=0)
    (rollout,) = backend.generate([Request(teacher, theta, Mixture(), sampling)])
    with pytest.raises(AssertionError, match="off by"):
        oracle.check([replace(rollout, prompt_ids=theta)], [Request(theta, theta, Mixture(), sampling)])
