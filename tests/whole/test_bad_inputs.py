"""Bad input is refused with words: what, what was got, what was wanted, what to do. Nothing stays behind."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.bad_inputs import CASES, Room
from helpers.paths import ROOT
from helpers.strategies import assert_same, mixtures, rollouts
from optimal_sampling_trl import DistillationConfig, GRPOConfig, Mixture, OptimalSamplingGenerator, Rollout, Sampling
from optimal_sampling_trl import mix as solve
from optimal_sampling_trl.losses import Correction
from optimal_sampling_trl.rollouts.dataset import from_dataset
from optimal_sampling_trl.rollouts.folder import Key, RolloutFolder
from optimal_sampling_trl.trainers.config import correction_of


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    room = Room(tmp_path_factory.mktemp("room"))
    room.generate()  # what starts with the first sampling, such as torch's threads
    return room


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_there_are_sixty() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_refused_with_words_and_nothing_stays(room: Room, name: str) -> None:
    attempt, words = CASES[name]
    before = psutil.Process().children(), threading.active_count(), files(room.root)
    with pytest.raises((ValueError, TypeError)) as error:
        attempt(room)
    assert [part for part in words if part not in str(error.value)] == [], str(error.value)
    assert (psutil.Process().children(), threading.active_count(), files(room.root)) == before


def test_a_vllm_that_is_hidden_is_named() -> None:
    """Without vLLM, `backend='vllm'` says what to install; in a process of its own, as imports stay."""
    script = "import sys; sys.modules['vllm'] = None; import optimal_sampling_trl as o; "
    script += "o.OptimalSamplingV1('teacher', 'theta', backend='vllm')"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode != 0
    assert re.search(r"(ImportError|ValueError|ModuleNotFoundError): .*[vV]LLM", process.stderr), process.stderr[-500:]


# Fuzzing: any value for any field gives what works, or a ValueError.

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2**63, 2**64, 10**400, -(10**400)]),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.complex_numbers(),
    st.just(torch.zeros(2)),
    st.just(object()),
)


def fields_of(kind: type, **known: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Some fields of a dataclass with any values, or now and then good ones."""
    names = kind.__dataclass_fields__
    return st.fixed_dictionaries({}, optional={name: st.one_of(ANYTHING, *known.get(name, ())) for name in names})


METHODS = (
    st.sampled_from(
        ["kl_symmetry", "ess_balance", "trust_region", "entropy", "fixed", "entropy_gate", "top_k_swap"],
    ),
)
SHARE = (st.floats(0, 1),)


@settings(max_examples=400)
@given(fields_of(Mixture, method=METHODS, alpha_min=SHARE, alpha_max=SHARE, fixed_alpha=SHARE, epsilon=SHARE))
def test_any_mixture_is_refused_or_solves(values: dict[str, Any]) -> None:
    try:
        mixture = Mixture(**values)
    except ValueError:
        return
    assert Mixture.from_dict(mixture.to_dict()) == mixture
    generator = torch.Generator().manual_seed(0)
    alpha, log_q = solve(*torch.randn(2, 3, 7, generator=generator), mixture)
    assert bool(((alpha >= mixture.alpha_min - 1e-6) & (alpha <= mixture.alpha_max + 1e-6)).all())
    assert torch.allclose(log_q.exp().sum(1), torch.ones(3), atol=1e-5)


@settings(max_examples=60)
@given(values=fields_of(Sampling, max_tokens=(st.integers(1, 3),), temperature=SHARE, top_p=SHARE, seed=(st.none(),)))
def test_any_sampling_is_refused_or_samples(room: Room, values: dict[str, Any]) -> None:
    from optimal_sampling_trl.rollouts.request import Request

    try:
        sampling = Sampling(**{"max_tokens": 2, **values})
    except ValueError:
        return
    if sampling.max_tokens > 3:
        return
    (rollout,) = room.sampler.backend.generate([Request([65], [65], Mixture(), sampling)])
    assert 1 <= len(rollout.completion_ids) <= sampling.max_tokens


@settings(max_examples=300)
@given(fields_of(Correction, name=(st.sampled_from(["none", "token_mask", "prefix_luffy"]),), clip_max=SHARE))
def test_any_correction_is_refused_or_weighs(values: dict[str, Any]) -> None:
    try:
        correction = Correction(**values)
    except ValueError:
        return
    log = -torch.rand(2, 2, 4, generator=torch.Generator().manual_seed(0))
    weights = correction.weights(log[0], log[1], torch.ones(2, 4), torch.tensor([True, False]))
    assert bool(weights.isfinite().all())


@settings(max_examples=300)
@given(fields_of(OptimalSamplingGenerator, mixture=(mixtures(),), backend=(st.just("auto"),)))
def test_any_generator_is_refused_or_anneals(values: dict[str, Any]) -> None:
    try:
        generator = OptimalSamplingGenerator(**{"teacher": "t", **values})
    except ValueError:
        return
    assert isinstance(generator.current_mixture(0.5), Mixture)


@settings(max_examples=40)
@given(fields_of(Correction), st.sampled_from([GRPOConfig, DistillationConfig]))
def test_any_correction_of_a_configuration_is_refused_or_taken(values: dict[str, Any], kind: Any) -> None:
    """A configuration is checked when its trainer is built, before anything is loaded."""
    named = {("correction" if name == "name" else f"correction_{name}"): value for name, value in values.items()}
    args = kind("output", use_cpu=True, bf16=False, report_to="none")
    for name, value in named.items():
        setattr(args, name, value)
    try:
        correction = correction_of(args)
    except ValueError:
        return
    assert isinstance(correction, Correction)


@settings(max_examples=40)
@given(st.lists(rollouts(), min_size=1, max_size=4), st.data())
def test_any_rollouts_come_back_from_a_shard(
    tmp_path_factory: Any, wanted: list[Rollout], data: st.DataObject
) -> None:
    """Through Parquet on the disk, bit for bit, beside the names of those that failed."""
    keys = [Key(index, data.draw(st.integers(0, 2**40))) for index in range(len(wanted))]
    failed = data.draw(st.dictionaries(st.builds(Key, st.integers(10, 20), st.integers(0, 3)), st.text(), max_size=2))
    with RolloutFolder(tmp_path_factory.mktemp("fuzz") / "run") as store:
        store.write_shard(0, dict(zip(keys, wanted, strict=True)), failed)
    (path,) = store.shards()
    assert store.keys(path) == keys
    assert store.failed(path) == failed
    for got, want in zip(from_dataset(store.read_shard(path).to_pylist()), wanted, strict=True):
        assert_same(got, want)
