"""The Triton kernels against the float64 reference and against the step that the engine makes without them.

Run by `test_kernels.py` in a process of its own: interpreted where there is no GPU, on small rows; compiled where
there is one, at the sizes of real vocabularies too.

α is within 1e-4 of the reference. Where the equation is flat, the two mixtures must be one distribution: a total
variation below 1e-5.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.models import make_tokenizer
from helpers.strategies import (
    BROKEN,
    RANGED,
    ROOTS,
    LogitPair,
    inside,
    make_row,
    mixtures,
    pairs,
    random_pair,
    temperatures,
)
from optimal_sampling_trl import pairing
from optimal_sampling_trl.backends.transformers import decoding
from optimal_sampling_trl.backends.vllm.worker.grammar import rule_out
from optimal_sampling_trl.mixture import (
    FORMS,
    METHODS,
    SAME_DIVERGENCE,
    Mixture,
    MixtureRows,
    fold_eos,
    log_distributions,
    mix,
    mix_at,
)
from optimal_sampling_trl.mixture.kernels.launch import CHUNK, MixedLogits, mix_logits
from optimal_sampling_trl.mixture.reference import reference
from optimal_sampling_trl.pairing import Ending
from optimal_sampling_trl.rollouts.request import Request, Sampling

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SMALL = 64
"""Logits a program in these tests: small rows are in several chunks then."""
WIDTHS = [(300, 317), (317, 300), (64, 64), (65, 65)] + ([(151_936, 152_064), (152_064, 151_936)] if GPU else [])
ALPHA_TOLERANCE = 1e-4
VARIATION_TOLERANCE = 1e-5
ARITHMETIC = [Mixture(method, form="arithmetic") for method in RANGED if method != "ess_balance"]
SWAPS = [Mixture("top_k_swap", swap_top_k=K) for K in (1, 3, 60, 1000)]
ENDS = [Mixture.theta_only(), Mixture.teacher_only()]
MASKED = torch.tensor([[True], [False], [True]])
"""Rows with a grammar."""


def run(
    pair: LogitPair, rows: list[Mixture], temperature: list[float] | None = None, chunk: int = SMALL, **more: Any
) -> MixedLogits:
    if temperature is not None:
        more["temperature"] = torch.tensor(temperature, device=DEVICE)
    chunk = chunk if pair.theta.shape[1] < 10_000 else CHUNK
    out = mix_logits(*(side.to(DEVICE) for side in pair), MixtureRows.of(rows, DEVICE), chunk=chunk, **more)
    return MixedLogits(*(value.cpu() for value in out))


def assert_rows(pair: LogitPair, rows: list[Mixture], temperature: list[float], got: MixedLogits) -> None:
    V = min(pair.theta.shape[1], pair.teacher.shape[1])
    log_theta, log_teacher = log_distributions(*pair, torch.tensor(temperature))
    assert got.logits.shape == pair.teacher.shape
    assert bool((got.logits[:, V:] == -torch.inf).all())
    for n, mixture in enumerate(rows):
        one = slice(n, n + 1)
        exact = float(torch.tensor(temperature[n]))
        want, _ = reference(pair.theta[one], pair.teacher[one], mixture, exact)
        alpha = got.alpha[one].double()
        if want.isnan():
            assert alpha.isnan(), f"alpha {alpha} of a row without a solution, {mixture}"
            continue
        assert mixture.alpha_min - 1e-7 <= alpha <= mixture.alpha_max + 1e-7, f"{alpha} outside the range of {mixture}"
        sides = (side[one, :V].float() for side in pair)
        row = MixtureRows.of([mixture])
        assert torch.equal(got.logits[one, :V].isneginf(), mix_at(*sides, alpha.float(), row, exact).isneginf())
        q, want_q = (inside(log_theta[one], log_teacher[one], weight, mixture.form).exp() for weight in (alpha, want))
        variation = float((q - want_q).abs().sum() / 2)
        if not (
            (alpha - want).abs() <= ALPHA_TOLERANCE or (mixture.method in ROOTS and variation <= VARIATION_TOLERANCE)
        ):
            raise AssertionError(f"alpha {alpha} against {want}, variation {variation}, {mixture}, T {temperature[n]}")
        assert_logits(got.logits[one, :V], pair, one, V, alpha, row, exact)


def assert_each_as_alone(pair: LogitPair, rows: list[Mixture]) -> None:
    together = run(pair, rows)
    for n, mixture in enumerate(rows):
        alone = run(LogitPair(*(side[n : n + 1] for side in pair)), [mixture])
        assert torch.allclose(alone.alpha, together.alpha[n : n + 1], rtol=0, atol=1e-6)
        assert torch.allclose(alone.logits, together.logits[n : n + 1], rtol=0, atol=1e-5)


def assert_logits(
    logits: Tensor, pair: LogitPair, one: slice, V: int, alpha: Tensor, row: MixtureRows, temperature: float
) -> None:
    """The mixed logits in float64, to float32's rounding; of the arithmetic form, to that of its terms too."""
    theta, teacher = (side[one, :V].double() for side in pair)
    want = mix_at(theta, teacher, alpha, row, temperature)
    both = want.isfinite()
    size = theta.abs().masked_fill(~theta.isfinite(), 0) + teacher.abs().masked_fill(~teacher.isfinite(), 0) + 1
    if row.methods("arithmetic") or row.most_swapped:
        size = size + size.amax() + temperature + want.abs().masked_fill(~both, 0)  # log α is −103 for the least α
    assert bool(((logits.double() - want)[both].abs() <= 4e-7 * size[both]).all())
    if float(alpha) in (0.0, 1.0) and not row.most_swapped:
        assert torch.equal(logits.double(), want)


@settings(max_examples=300 if GPU else 40, suppress_health_check=list(HealthCheck))
@given(pairs(), st.data())
def test_every_row_meets_the_reference(pair: LogitPair, data: st.DataObject) -> None:
    N = len(pair.theta)
    rows = data.draw(st.lists(mixtures(), min_size=N, max_size=N))
    temperature = data.draw(st.lists(temperatures, min_size=N, max_size=N))
    assert_rows(pair, rows, temperature, run(pair, rows, temperature))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("V_theta", "V_teacher"), WIDTHS)
def test_every_method_at_once_in_wide_rows(V_theta: int, V_teacher: int, dtype: torch.dtype) -> None:
    rows = [*map(Mixture, METHODS), *ARITHMETIC, *SWAPS]
    base, noise = random_pair(len(rows), max(V_theta, V_teacher), scale=3.0)
    pair = LogitPair((0.7 * base + noise / 2)[:, :V_theta].to(dtype), base[:, :V_teacher].to(dtype))
    for temperature in (1.0, 0.3, 2.0):
        assert_rows(pair, rows, [temperature] * len(rows), run(pair, rows, [temperature] * len(rows)))


def wide_row(kind: str, V: int, spread: float, generator: torch.Generator) -> LogitPair:
    theta = 3 * torch.randn(V, generator=generator)
    noise = torch.randn(V, generator=generator)
    if kind == "near":
        return LogitPair(theta, theta + spread * noise)
    if kind == "near, a multiple apart":
        return LogitPair(theta, theta + spread * noise + 40.0)
    if kind == "peaked":  # both are sure of one token; the rest decides
        theta[V // 2] = 12 + 10 * spread
        teacher = theta + 2 * noise
        teacher[V // 2] = theta[V // 2] + spread
        return LogitPair(theta, teacher)
    if kind == "peaked apart":
        teacher = theta + noise
        teacher[V // 3], theta[V // 2] = 25.0, 20.0
        return LogitPair(theta, teacher)
    if kind == "grammar":  # nearly all of the student's mass is ruled out
        allowed = torch.rand(V, generator=generator) < 0.05
        return LogitPair(theta, (theta + noise).masked_fill(~allowed, -torch.inf))
    return make_row(kind, V, 20 * spread + 1, generator)


WIDE = ("near", "near, a multiple apart", "peaked", "peaked apart", "grammar", "equal", "one_hot", "gaps", "masked")


@pytest.mark.parametrize("V", [200] + ([151_936] if GPU else []))
@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize(
    ("method", "form", "dtype"),
    [(method, "geometric", dtype) for method in ROOTS for dtype in (torch.float32, torch.bfloat16)]
    + [(method, "arithmetic", torch.float32) for method in ("kl_symmetry", "trust_region")],
)
def test_hard_rows(method: str, form: str, kind: str, V: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    spreads = (1e-4, 1e-3, 1e-2, 0.1, 1.0) if GPU else (1e-3, 0.1, 1.0)  # interpreted, each takes its time
    pair = LogitPair(
        *(torch.stack(side).to(dtype) for side in zip(*(wide_row(kind, V, s, generator) for s in spreads)))
    )
    settings = ({}, {"epsilon": 1e-5}, {"alpha_min": 0.2, "alpha_max": 0.7})
    ranges = [Mixture(method, form=form, **one) for one in settings]
    for temperature, mixture in zip((1.0, 0.3, 2.0), ranges):
        rows = [mixture] * len(spreads)
        assert_rows(pair, rows, [temperature] * len(rows), run(pair, rows, [temperature] * len(rows)))


@pytest.mark.parametrize("gap", [60.0, 250.0, 2000.0])
@pytest.mark.parametrize("method", ROOTS)
def test_certain_models_that_disagree(method: str, gap: float) -> None:
    """Each is sure of a token that is nothing to the other: between the two, the sums leave float32's range."""
    base, noise = random_pair(3, 200)
    theta, teacher = base.clone(), base + noise
    theta[:, 3], teacher[:, 3] = gap, torch.tensor([0.0, -gap, gap / 2])
    theta[:, 190], teacher[:, 190] = torch.tensor([0.0, -gap / 3, 0.0]), gap
    pair, rows = LogitPair(theta, teacher), [Mixture(method), Mixture(method, alpha_min=0.1, alpha_max=0.9)]
    for mixture, temperature in zip(rows, (1.0, 0.3125)):
        assert_rows(pair, [mixture] * 3, [temperature] * 3, run(pair, [mixture] * 3, [temperature] * 3))


@pytest.mark.parametrize("method", ROOTS)
def test_a_symmetric_row_is_not_taken_for_a_smooth_one(method: str) -> None:
    """Half the mass of each is nothing to the other, and between the nodes the mixture is sure of the rest."""
    pair = LogitPair(torch.tensor([[0.0, 60.0, -60.0, 60.0]]), torch.tensor([[-60.0, -60.0, 60.0, 60.0]]))
    for temperature in (0.3, 1.0, 2.0):
        assert_rows(pair, [Mixture(method)], [temperature], run(pair, [Mixture(method)], [temperature]))


@pytest.mark.parametrize("method", ["kl_symmetry", "ess_balance"])
def test_near_equal_rows_are_solved_down_to_the_stated_divergence(method: str) -> None:
    theta = torch.tensor([[0.1, 0.9]] * 2, dtype=torch.float64).log()
    variance = 0.1 * 0.9 * 4.0**2
    ratio = torch.tensor([[3.0, -1.0]], dtype=torch.float64)
    factor = torch.tensor([[4.0], [0.25]], dtype=torch.float64)
    teacher = theta + torch.sqrt(factor * SAME_DIVERGENCE / variance) * ratio
    got = run(LogitPair(theta.float(), teacher.float()), [Mixture(method, alpha_max=0.2)] * 2)
    assert got.alpha.tolist() == pytest.approx([0.2, 0.1])


def test_the_sums_normalise_the_rows() -> None:
    theta, teacher = random_pair(4, 300, scale=4.0)
    temperature = [0.3, 1.0, 1.7, 2.0]
    got = run(LogitPair(theta[:, :290], teacher), [Mixture("fixed")] * 4, temperature)
    scale = torch.tensor(temperature)[:, None].double()
    for logits, total in ((theta, got.theta_sum), (teacher, got.teacher_sum)):
        assert (total.double() - (logits[:, :290].double() / scale).logsumexp(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("folded", [(7,), (299, 0, 130)])
@pytest.mark.parametrize("mixture", [*map(Mixture, METHODS), *ARITHMETIC, *SWAPS[:2]])
def test_endings_are_folded_before_the_temperature(mixture: Mixture, folded: tuple[int, ...]) -> None:
    theta, teacher = random_pair(4, 300)
    teacher[0, list(folded)] = 9.0
    teacher[1, [100, *folded]] = -torch.inf
    rows, temperature = [mixture] * 4, [1.0, 0.5, 2.0, 0.7]
    got = run(LogitPair(theta, teacher), rows, temperature, stop=(100, 5), folded=folded)
    by_hand = fold_eos(teacher, folded, 100)
    assert_rows(LogitPair(theta, by_hand), rows, temperature, got)
    total = (by_hand.double() / torch.tensor(temperature)[:, None]).logsumexp(-1)
    assert (got.teacher_sum - total).abs().max() < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_a_grammar_holds_at_any_alpha(alpha: float, form: str) -> None:
    theta, teacher = random_pair(3, 130)
    ruled_out = torch.rand(3, 130, generator=torch.Generator().manual_seed(0)) < 0.7
    teacher = teacher.masked_fill(ruled_out, -torch.inf)
    rows = [Mixture("fixed", alpha_min=alpha, alpha_max=alpha, fixed_alpha=alpha, form=form)] * 3
    pair = LogitPair(rule_out(theta, teacher, MASKED), teacher)
    got = run(pair, rows)
    assert_rows(pair, rows, [1.0] * 3, got)
    assert torch.equal(got.logits[[0, 2]].isneginf(), ruled_out[[0, 2]])
    assert bool(got.logits[1].isneginf().any()) == (alpha == 1 or (alpha > 0 and form == "geometric"))


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize(
    "mixture", [*map(Mixture, METHODS), *ARITHMETIC, Mixture.theta_only(), Mixture.teacher_only()]
)
def test_broken_rows_end_and_spoil_no_other(kind: str, mixture: Mixture) -> None:
    theta, teacher = random_pair(5, 150)
    clean = run(LogitPair(theta, teacher), [mixture] * 5, stop=(90, 3))
    generator = torch.Generator().manual_seed(2)
    for n, scale in ((1, 1.0), (3, 5.0)):
        theta[n], teacher[n] = make_row(kind, 150, scale, generator)
    got = run(LogitPair(theta, teacher), [mixture] * 5, stop=(90, 3))
    assert got.alpha.isnan().tolist() == [False, True, False, True, False]
    for before, after in zip(clean, got):
        assert torch.equal(before[[0, 2, 4]], after[[0, 2, 4]])
    words = torch.zeros(150)
    words[90] = 1e4
    assert torch.equal(got.logits[1], words)
    assert torch.equal(got.logits[3], words)
    assert not bool((got.theta_sum.isfinite() & got.teacher_sum.isfinite())[[1, 3]].any())


def test_without_a_common_token_only_the_ends_have_a_solution() -> None:
    theta, teacher = random_pair(6, 100)
    theta[:, 50:], teacher[:, :50] = -torch.inf, -torch.inf
    rows = [*map(Mixture, ("kl_symmetry", "ess_balance", "trust_region", "fixed"))]
    rows += [Mixture.theta_only(), Mixture.teacher_only()]
    got = run(LogitPair(theta, teacher), rows)
    assert got.alpha.isnan().tolist() == [True] * 4 + [False] * 2
    assert torch.equal(got.logits[4], theta[4])
    assert torch.equal(got.logits[5], teacher[5])
    assert bool((got.logits[:4] == 0).all())  # no ending is known
    got = run(LogitPair(theta, teacher), [*ARITHMETIC, ARITHMETIC[0]])
    assert got.alpha[1] == 0  # of the trust region: KL(q‖θ) is infinite at any other
    assert torch.equal(got.logits[1], theta[1])
    assert got.alpha[4] == 1  # of the gate: the student's entropy is above its scale
    assert torch.equal(got.logits[4], teacher[4])
    assert bool(got.logits[[0, 2, 3, 5]].isfinite().all())


def test_rows_of_both_forms_share_a_batch() -> None:
    """A row does not depend on the forms of its neighbours, which choose between two builds of the kernels."""
    theta, teacher = random_pair(8, 200)
    rows = [*ARITHMETIC, *map(Mixture, ("kl_symmetry", "ess_balance", "trust_region", "fixed"))]
    assert_each_as_alone(LogitPair(theta, teacher), rows)


def test_rows_may_lie_apart_and_padding_is_ignored() -> None:
    theta, teacher = random_pair(8, 200)
    rows = [Mixture(METHODS[n % 4]) for n in range(8)]
    want = run(LogitPair(theta, teacher), rows)
    wide = torch.full((16, 230), math.nan)
    wide[::2, :200] = theta
    got = run(LogitPair(wide[::2], teacher), rows)
    for one, other in zip(want, got):
        assert torch.equal(one, other)
    table = torch.tensor([mixture.numbers() for mixture in rows], dtype=torch.float64, device=DEVICE)
    apart = MixtureRows.from_table(table.repeat_interleave(2, 0)[::2])
    out = mix_logits(theta.to(DEVICE), teacher.to(DEVICE), apart, chunk=SMALL)
    assert torch.equal(out.alpha.cpu(), want.alpha)


def test_no_rows() -> None:
    got = run(random_pair(0, 30), [])
    assert [tuple(value.shape) for value in got] == [(0, 30), (0,), (0,), (0,)]


def test_what_would_be_read_wrongly_is_refused() -> None:
    theta, teacher = random_pair(4, 30)
    with pytest.raises(ValueError, match=r"mix_logits: 4 rows of the student's logits, 3 of the teacher's"):
        run(LogitPair(theta, teacher[:3]), [Mixture()] * 4)
    with pytest.raises(ValueError, match=r"logits of a row of `teacher` lie \d+ numbers apart; wanted 1.*contiguous"):
        run(LogitPair(theta, torch.randn(30, 30).T[:4]), [Mixture()] * 4)


@pytest.mark.skipif(not GPU, reason="mix() takes the kernels on a GPU alone")
@pytest.mark.parametrize("method", METHODS)
def test_mix_on_a_gpu_is_the_reference(method: str) -> None:
    base, noise = random_pair(6, 5000, scale=3.0)
    theta, teacher = 0.7 * base + noise / 2, base
    theta[2, 17] = math.nan
    temperature = torch.tensor([1.0, 0.3, 1.0, 2.0, 0.7, 1.5])
    alpha, log_q = mix(theta.to(DEVICE), teacher.to(DEVICE), Mixture(method), temperature.to(DEVICE))
    for n in range(6):
        want, want_q = reference(theta[n : n + 1], teacher[n : n + 1], Mixture(method), float(temperature[n]))
        assert want.isnan().item() == (n == 2)
        assert torch.allclose(alpha[n : n + 1].cpu().double(), want, rtol=0, atol=ALPHA_TOLERANCE, equal_nan=True)
        assert torch.allclose(log_q[n].cpu().double().exp(), want_q[0].exp(), rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.skipif(not GPU, reason="a CUDA graph needs a GPU")
def test_a_graph_replays_on_other_logits() -> None:
    """No step waits for the host: a capture would refuse it."""
    theta, teacher = (side.to(DEVICE) for side in random_pair(4, 5000))
    rows = MixtureRows.of([Mixture(method) for method in METHODS[:4]], DEVICE)
    mix_logits(theta, teacher, rows, stop=(3,), folded=(5,))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mix_logits(theta, teacher, rows, stop=(3,), folded=(5,))
    for seed in (1, 2):
        for side, new in zip((theta, teacher), random_pair(4, 5000, seed=seed)):
            side.copy_(new)
        graph.replay()
        for got, want in zip(out, mix_logits(theta, teacher, rows, stop=(3,), folded=(5,))):
            assert torch.equal(got, want)


def test_a_grammar_that_leaves_the_student_no_token() -> None:
    """At α = 0, too, there is nothing to draw where the grammar rules out all that the student has."""
    theta = torch.full((3, 300), -torch.inf)
    theta[:, :5] = 1.0
    teacher = torch.full((3, 300), -torch.inf)
    teacher[:, 5:9] = 0.0
    rows = [Mixture.theta_only(), Mixture.theta_only(), Mixture.teacher_only()]
    got = run(LogitPair(rule_out(theta, teacher, MASKED), teacher), rows, stop=(7,))
    assert got.alpha.isnan().tolist() == [True, False, True]
    assert not bool(got.logits.log_softmax(-1).isnan().any())
    assert got.logits[0].argmax() == 7


def test_the_transformers_backend_draws_the_same_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole steps of a batch: tokens of seeded and greedy rows, and each record."""
    methods = [*METHODS, "kl_symmetry"]
    settings = [
        Sampling(temperature=t, seed=n, top_k=40) for n, t in enumerate((1.0, 0.7, 1.3, 1.0, 2.0, 0.5, 0.0, 1.0))
    ]
    mixtures = [Mixture(method) for method in methods[:-1]] + [Mixture.theta_only()]
    requests = [Request([1], [1], *both) for both in zip(mixtures, settings, strict=True)]
    assert len(requests) == 8
    pair = pairing.Pair("teacher", "theta", make_tokenizer(), 300, 317, 64, Ending((256,), ()))
    generator = torch.Generator().manual_seed(0)
    logits = [[torch.randn(8, V, generator=generator).to(DEVICE) * 3 for V in (300, 317)] for _ in range(3)]
    logits[2][0][7, 5] = torch.nan
    drawn = []
    for kernels in (False, True):
        monkeypatch.setattr(decoding, "has_kernels", lambda _, kernels=kernels: kernels)
        rows = decoding.Rows(requests, pair, torch.device(DEVICE))
        for both in logits:
            rows.draw(*both)
            rows.step += 1
        drawn.append((rows.tokens[:, :3].cpu(), rows.records[:, :3].cpu()))
    (tokens, records), (tokens_by_kernels, records_by_kernels) = drawn
    assert torch.equal(tokens, tokens_by_kernels)
    assert torch.allclose(records, records_by_kernels, atol=2e-4, equal_nan=True)
    assert records_by_kernels[:, :, 0].isnan().nonzero().tolist() == [[7, 2]]


@pytest.mark.parametrize("form", FORMS)
def test_the_gate_opens_with_the_entropy_of_the_student(form: str) -> None:
    """Rows from certain to flat, each with a scale of its own, beside rows of an equation."""
    base, teacher = random_pair(8, 300)
    theta = base * torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 20.0, 60.0])[:, None]
    rows = [Mixture("entropy_gate", form=form, entropy_scale=scale) for scale in (6.0, 5.0, 9.0, 1e-3, 2.0, 2.0, 0.5)]
    rows.append(Mixture(form=form))
    for temperature in (1.0, 0.4):
        got = run(LogitPair(theta, teacher), rows, [temperature] * 8)
        assert_rows(LogitPair(theta, teacher), rows, [temperature] * 8, got)
        assert 0 < float(got.alpha[2]) < 1 == float(got.alpha[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["near", "peaked apart", "grammar", "one_hot", "gaps", "masked", "disjoint"])
def test_swapped_rows(kind: str, dtype: torch.dtype) -> None:
    """Ties at the K-th logit (bfloat16, gaps), tokens without mass, and nearly all or nothing outside of S."""
    generator = torch.Generator().manual_seed(3)
    rows = [Mixture("top_k_swap", swap_top_k=K) for K in (1, 2, 25, 199, 200, 10_000)]
    pair = LogitPair(
        *(torch.stack(side).to(dtype) for side in zip(*(wide_row(kind, 200, 1.0, generator) for _ in rows)))
    )
    for temperature in (1.0, 0.3, 2.0):
        got = run(pair, rows, [temperature] * len(rows))
        assert_rows(pair, rows, [temperature] * len(rows), got)
        constant = (1 - got.alpha) * got.theta_sum + got.alpha * got.teacher_sum
        assert ((got.logits / temperature).logsumexp(-1) - constant).abs().max() < 1e-4  # Σq is 1 as it is written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ending_that_is_the_kth_likeliest_is_kept(dtype: torch.dtype) -> None:
    """Its logit is a sum that no float type holds exactly: the bound and the kernels must see the same number."""
    theta, teacher = (side.to(dtype) for side in random_pair(40, 130, scale=0.2))
    teacher[:, :3] = 10.0  # likelier than the ending
    teacher[:, [100, 7, 30]] = 5.0 + torch.rand(40, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = run(LogitPair(theta, teacher), [Mixture("top_k_swap", swap_top_k=4)] * 40, stop=(100,), folded=(7, 30))
    p = theta.double().softmax(-1)
    assert torch.allclose(got.alpha.double(), 1 - p[:, [0, 1, 2, 100]].sum(-1), atol=1e-5)


def test_swapped_rows_share_a_batch() -> None:
    """A row does not depend on its neighbours, which choose between builds of the kernels."""
    theta, teacher = random_pair(9, 200)
    rows = [*SWAPS[:2], Mixture(), ARITHMETIC[0], SWAPS[2], Mixture("ess_balance"), ARITHMETIC[1], *ENDS]
    assert_each_as_alone(LogitPair(theta, teacher), rows)


def test_a_grammar_holds_where_a_token_is_swapped() -> None:
    theta, teacher = random_pair(3, 130)
    ruled_out = torch.rand(3, 130, generator=torch.Generator().manual_seed(0)) < 0.7
    teacher = teacher.masked_fill(ruled_out, -torch.inf)
    pair = LogitPair(rule_out(theta, teacher, MASKED), teacher)
    rows = [Mixture("top_k_swap", swap_top_k=K) for K in (5, 25, 130)]
    got = run(pair, rows)
    assert_rows(pair, rows, [1.0] * 3, got)
    assert torch.equal(got.logits.isneginf(), ruled_out)


@pytest.mark.skipif(not GPU, reason="a CUDA graph needs a GPU")
def test_a_graph_swaps_other_logits() -> None:
    """The K-th largest logit is found on the device: a capture would refuse to wait."""
    theta, teacher = (side.to(DEVICE) for side in random_pair(4, 5000))
    rows = MixtureRows.of([*SWAPS[1:], Mixture()], DEVICE)
    mix_logits(theta, teacher, rows, stop=(3,), folded=(5,))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mix_logits(theta, teacher, rows, stop=(3,), folded=(5,))
    for side, new in zip((theta, teacher), random_pair(4, 5000, seed=1)):
        side.copy_(new)
    graph.replay()
    for got, want in zip(out, mix_logits(theta, teacher, rows, stop=(3,), folded=(5,))):
        assert torch.equal(got, want)
