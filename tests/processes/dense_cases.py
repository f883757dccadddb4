"""The kernels of dense records against their definitions in float64, and against torch's selection.

Run by `test_kernels.py` beside `kernel_cases.py`: interpreted where there is no GPU, compiled where there is one.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from helpers.strategies import ADVERSARIAL, BROKEN, LogitPair, make_row, mixtures, pairs, random_pair, temperatures
from optimal_sampling_trl.mixture import Mixture, MixtureRows, dense, fold_eos, mix, mix_at
from optimal_sampling_trl.mixture.dense import SCALARS, Measured, measure
from optimal_sampling_trl.mixture.kernels.dense import measure_rows
from optimal_sampling_trl.mixture.kernels.launch import CHUNK
from optimal_sampling_trl.mixture.reference import reference, reference_dense

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SMALL = 64
"""Logits a program in these tests: small rows are in several chunks then, and chunks in several groups."""
WIDTHS = [(300, 317), (65, 64)] + ([(151_936, 152_064), (152_064, 151_936)] if GPU else [])
ENDS = [Mixture.theta_only(), Mixture.teacher_only()]
FORMS = [*(Mixture(form=form) for form in ("geometric", "arithmetic")), Mixture("top_k_swap", swap_top_k=5)]


def kernels(pair: LogitPair, mixed: Tensor | None, temperature: Tensor, top_k: int = 0, **more: Any) -> Measured:
    chunk = SMALL if pair.theta.shape[1] < 10_000 else CHUNK
    on_device = [None if one is None else one.to(DEVICE) for one in (*pair, mixed, temperature)]
    return Measured(*(one.cpu() for one in measure_rows(*on_device, top_k, chunk=chunk, **more)))  # type: ignore[arg-type]


def mixed_of(pair: LogitPair, rows: list[Mixture], temperature: Tensor) -> Tensor:
    """The mixed logits that an engine samples from, at α solved in float64."""
    V = min(side.shape[1] for side in pair)
    theta, teacher = (side[:, :V].float() for side in pair)
    alpha, _ = mix(theta, teacher, rows, temperature)
    return mix_at(theta, teacher, alpha, MixtureRows.of(rows), temperature)


def assert_scalars(got: Tensor, pair: LogitPair, rows: list[Mixture], temperature: Tensor) -> None:
    for n, mixture in enumerate(rows):
        one = LogitPair(*(side[n : n + 1] for side in pair))
        alpha = float(reference(*one, mixture, float(temperature[n]))[0])
        if alpha in (0, 1) or 1e-4 < alpha < 1 - 1e-4:  # others round to an end in float32; NaN has no numbers
            wanted = reference_dense(*one, mixture, float(temperature[n]))
            want = torch.stack([wanted[name][0] for name in SCALARS])
            torch.testing.assert_close(got[n].double(), want, rtol=1e-4, atol=1e-4)


@settings(max_examples=200 if GPU else 30, suppress_health_check=list(HealthCheck), deadline=None)
@given(pairs(("random", *ADVERSARIAL), least=2), mixtures(("kl_symmetry", "fixed", "entropy")), temperatures)
def test_scalars_are_their_definitions(pair: LogitPair, mixture: Mixture, temperature: float) -> None:
    rows, scale = [mixture] * len(pair.theta), torch.full((len(pair.theta),), temperature)
    got = kernels(pair, mixed_of(pair, rows, scale), scale)
    assert_scalars(got.scalars, pair, rows, scale.double())
    assert got.ids.shape == (len(rows), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("V_theta", "V_teacher"), WIDTHS)
def test_a_few_rows_of_padded_vocabularies_with_endings(V_theta: int, V_teacher: int, dtype: torch.dtype) -> None:
    """Rows of both forms and both ends, out of order, of which others are not read; one end's mass is moved."""
    base, noise = random_pair(6, max(V_theta, V_teacher), scale=3.0)
    pair = LogitPair((0.7 * base + noise / 2)[:, :V_theta].to(dtype), base[:, :V_teacher].to(dtype))
    pair.teacher[:, [7, 60]] = 9.0
    rows, asked = [ENDS[0], FORMS[0], ENDS[1], FORMS[1], FORMS[1], FORMS[0]], torch.tensor([3, 0, 5, 2])
    temperature = torch.tensor([1.0, 0.5, 2.0, 0.7, 1.0, 1.3])
    folded = LogitPair(pair.theta.float(), fold_eos(pair.teacher.float(), (7, 60), 20))
    mixed = mixed_of(folded, rows, temperature)
    mixed, broken = torch.nn.functional.pad(mixed, (0, 3), value=-torch.inf), torch.tensor([1, 4])
    for side in (*pair, mixed):
        side[broken] = math.nan
    got = kernels(pair, mixed, temperature, 40, rows=asked.to(DEVICE), stop=(20, 3), folded=(7, 60))
    kept = LogitPair(*(side[asked] for side in folded))
    assert_scalars(got.scalars, kept, [rows[n] for n in asked], temperature[asked])
    assert_likeliest(got, kept, temperature[asked], 40)


def assert_likeliest(got: Measured, pair: LogitPair, temperature: Tensor, top_k: int) -> None:
    """The tokens have the largest logits in falling order, each once; among equal ones any may stand."""
    V = min(side.shape[1] for side in pair)
    both = [torch.log_softmax(side[:, :V].double() / temperature[:, None], -1) for side in pair]
    assert 0 <= int(got.ids.min()) <= int(got.ids.max()) < V
    for log_p, ids in zip(both, got.ids.split(top_k, 1), strict=True):
        assert all(len(set(row)) == top_k for row in ids.tolist())
        assert log_p.gather(1, ids).equal(log_p.sort(-1, descending=True).values[:, :top_k])
    for log_p, found in zip(both, (got.log_theta, got.log_teacher), strict=True):
        torch.testing.assert_close(found.double(), log_p.gather(1, got.ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 5, 150, 300])
def test_likeliest_tokens_with_ties_and_tokens_without_mass(top_k: int, dtype: torch.dtype) -> None:
    """Rounded logits tie often; of a row with three tokens the others are still named, each once."""
    theta, teacher = random_pair(5, 300)
    pair, temperature = LogitPair(theta.round().to(dtype), teacher.to(dtype)), torch.tensor([1.0, 0.5, 2.0, 0.7, 1.0])
    pair.theta[1, 3:], pair.teacher[2, :-3] = -torch.inf, -torch.inf
    pair.theta[3], pair.theta[4, 100:] = 1.0, -1e30
    assert_likeliest(kernels(pair, None, temperature, top_k), pair, temperature, top_k)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_has_no_numbers_and_spoils_no_other(kind: str) -> None:
    pair, temperature = random_pair(3, 150), torch.ones(3)
    clean = kernels(pair, pair.theta, temperature, 4)
    pair.theta[1], pair.teacher[1] = make_row(kind, 150, 1.0, torch.Generator().manual_seed(2))
    got = kernels(pair, pair.theta.nan_to_num(0.0, 0.0, 0.0), temperature, 4)
    assert got.scalars[1, 0].isnan()
    assert got.scalars[1, SCALARS.index("overlap")].isnan()
    assert 0 <= int(got.ids[1].min()) <= int(got.ids[1].max()) < 150
    assert all(one[[0, 2]].equal(other[[0, 2]]) for one, other in zip(clean, got))


def test_the_mixture_is_the_one_that_is_drawn_from() -> None:
    """Under a grammar q has fewer tokens than the models: what was drawn from counts, not what α says."""
    pair, temperature = random_pair(2, 200), torch.tensor([1.0, 0.6])
    mixed = pair.theta.masked_fill(torch.arange(200) % 3 > 0, -torch.inf)
    want = measure(*pair, mixed, temperature, SCALARS, 0)
    torch.testing.assert_close(kernels(pair, mixed, temperature).scalars, want.scalars, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", [("overlap", "kl_q_theta"), (), SCALARS])
def test_measure_takes_the_kernels(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    pair, rows = random_pair(4, 300), torch.tensor([2, 1])
    arguments = (names, 3, rows.to(DEVICE), (5,), (9,))
    want = measure(*pair, pair.theta, 0.7, names, 3, rows, (5,), (9,))
    monkeypatch.setattr(dense, "has_kernels", lambda _: True)
    got = measure(*(side.to(DEVICE) for side in (*pair, pair.theta)), 0.7, *arguments)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)


def test_no_rows_and_bad_rows() -> None:
    got = kernels(random_pair(0, 30), torch.zeros(0, 30), torch.ones(0), 2)
    assert [tuple(one.shape) for one in got] == [(0, 7), (0, 4), (0, 4), (0, 4)]
    with pytest.raises(ValueError, match="measure_rows: 4 rows of the student's logits, 3 of the teacher's"):
        kernels(LogitPair(torch.zeros(4, 9), torch.zeros(3, 9)), None, torch.ones(4), 2)


@pytest.mark.skipif(not GPU, reason="a CUDA graph needs a GPU")
def test_a_graph_replays_on_other_logits() -> None:
    """No step waits for the host: a capture would refuse it."""
    theta, teacher = (side.to(DEVICE) for side in random_pair(4, 5000))
    rows, temperature = torch.tensor([3, 0], device=DEVICE), torch.ones(4, device=DEVICE)

    def run() -> Any:
        return measure_rows(theta, teacher, theta, temperature, 32, rows, (3,), (5,))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in (1, 2):
        for side, new in zip((theta, teacher), random_pair(4, 5000, seed=seed)):
            side.copy_(new)
        graph.replay()
        for got, want in zip(out, run()):
            assert torch.equal(got, want)
