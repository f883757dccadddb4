"""Weights against plain loops, exact identities on an enumerated language, and what overflows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optimal_sampling_trl.losses import (
    CORRECTIONS,
    LEVELS,
    SHAPES,
    Correction,
    accept_rewards,
    anchor_factor,
    effective_sample_size,
    imitation_loss,
    keep_positive,
    log_weights,
    mixture_weight,
    own_baseline,
    reaches,
    sampled_token_coefficients,
)
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.mixture.reference import reference

LENGTHS = (7, 1, 4, 6, 0, 3)
MIXED = torch.tensor([True, True, False, True, True, False])
INFINITE = 1e30
"""A `clip_max` that leaves every weight as it is."""


def batch(dtype: torch.dtype = torch.float64, padding: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """log θ, log q and the mask of completions of `LENGTHS` tokens; `padding` stands where there is no token."""
    generator = torch.Generator().manual_seed(0)
    log_theta, log_q = -torch.rand(2, len(LENGTHS), max(LENGTHS), generator=generator, dtype=torch.float64)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).to(dtype)
    return *(x.to(dtype).masked_fill(mask == 0, padding) for x in (log_theta, log_q)), mask


def shaped(weight: float, correction: Correction) -> float:
    """A weight after the shape of the correction."""
    shape = correction.name.split("_")[1]
    if shape == "truncate":
        return min(weight, correction.clip_max)
    if shape == "mask":
        return weight if (correction.clip_min or 0.0) <= weight <= correction.clip_max else 0.0
    return weight / (weight + correction.gamma)


def by_loops(correction: Correction, log_theta: Tensor, log_q: Tensor, inclusive: bool = True) -> list[list[float]]:
    """The weight of each token, without padding, token by token in Python's floats."""
    level = correction.name.split("_")[0]
    rows = []
    for row, length in enumerate(LENGTHS):
        ratios = [math.exp(float(log_theta[row, i]) - float(log_q[row, i])) for i in range(length)]
        weights = []
        for i in range(length):
            last = i + 1 if inclusive else i
            first = 0 if correction.window is None else max(0, last - correction.window)
            chosen = {"token": ratios[i : i + 1], "prefix": ratios[first:last], "sequence": ratios}[level]
            weights.append(shaped(math.prod(chosen), correction) if MIXED[row] else 1.0)
        rows.append(weights)
    if correction.self_normalise:
        values = [weight for row, weights in enumerate(rows) if MIXED[row] for weight in weights]
        mean = sum(values) / len(values)
        rows = [[w / mean if MIXED[row] else w for w in weights] for row, weights in enumerate(rows)]
    return rows


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 7, 100])
@pytest.mark.parametrize("self_normalise", [False, True])
@pytest.mark.parametrize("name", CORRECTIONS[1:])
def test_weights_are_those_of_plain_loops(
    name: str, self_normalise: bool, window: int | None, inclusive: bool
) -> None:
    correction = Correction(name, 1.5, 0.3, gamma=0.3, window=window, self_normalise=self_normalise)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        log_theta, log_q, mask = batch(dtype)
        weights = correction.weights(log_theta, log_q, mask, MIXED, inclusive=inclusive)
        assert weights.shape == mask.shape
        assert weights.dtype == dtype
        for row, wanted in enumerate(by_loops(correction, log_theta, log_q, inclusive)):
            assert weights[row, : len(wanted)].tolist() == pytest.approx(wanted, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_the_students_own_rows_have_weight_one_exactly(name: str) -> None:
    log_theta, log_q, mask = batch()
    for self_normalise in (False, True):
        weights = Correction(name, self_normalise=self_normalise).weights(log_theta, log_q, mask, MIXED)
        assert bool((weights[~MIXED] == 1).all())
        assert bool((weights[MIXED] != 1).any()) == (name != "none")


@pytest.mark.parametrize("name", CORRECTIONS[1:])
@pytest.mark.parametrize("padding", [-torch.inf, torch.inf, torch.nan, 1e30])
def test_what_stands_on_padding_does_not_matter(name: str, padding: float) -> None:
    correction = Correction(name, window=2, self_normalise=True)
    log_theta, log_q, mask = batch()
    wanted = correction.weights(log_theta, log_q, mask, MIXED)
    got = correction.weights(batch(padding=padding)[0], log_q, mask, MIXED)
    assert torch.equal(got[mask == 1], wanted[mask == 1])
    assert bool((got[mask == 0] == 1).all()), "a loss that adds up over padding would depend on its width"


def test_a_window_counts_the_last_ratios() -> None:
    """Powers of two, so that the product says which ratios it holds."""
    log_theta = torch.log(torch.tensor([[2.0, 4.0, 16.0, 256.0]], dtype=torch.float64))
    log_q, mask = torch.zeros_like(log_theta), torch.ones_like(log_theta)

    def weights(window: int | None, inclusive: bool) -> list[float]:
        chosen = log_weights(log_theta, log_q, mask, "prefix", window=window, inclusive=inclusive)
        return (chosen / math.log(2)).tolist()[0]

    assert weights(None, True) == pytest.approx([1, 3, 7, 15])
    assert weights(None, False) == pytest.approx([0, 1, 3, 7])
    assert weights(2, True) == pytest.approx([1, 3, 6, 12])
    assert weights(2, False) == pytest.approx([0, 1, 3, 6])
    assert weights(1, False) == pytest.approx([0, 1, 2, 4])
    assert weights(9, True) == weights(None, True)


def test_weights_carry_no_gradient() -> None:
    log_theta, log_q, mask = batch()
    log_theta.requires_grad_()
    for name in CORRECTIONS:
        assert not Correction(name).weights(log_theta, log_q, mask, MIXED).requires_grad
    assert not sampled_token_coefficients(log_q, log_theta, mask, clip=1.0, mean=torch.zeros(len(mask))).requires_grad


EXTREME = st.sampled_from([-torch.inf, -1e38, -1e4, -200.0, -1.0, 0.0, 1.0, 200.0, 1e4, 1e38, torch.inf])


@given(st.lists(EXTREME, min_size=12, max_size=12), st.sampled_from(CORRECTIONS), st.booleans(), st.data())
def test_extreme_ratios_give_finite_weights(ratios: list[float], name: str, inclusive: bool, data: Any) -> None:
    window = data.draw(st.sampled_from([None, 1, 2, 3]))
    gamma = data.draw(st.sampled_from([0.0, 0.1, 1e30]))
    normalise = data.draw(st.booleans())
    log_ratio, zeros = torch.tensor(ratios).view(2, 6), torch.zeros(2, 6)
    mask = torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2])
    correction = Correction(name, 3.0, gamma=gamma, window=window, self_normalise=normalise)
    for log_theta, log_q in ((log_ratio, zeros), (zeros, -log_ratio)):
        weights = correction.weights(log_theta, log_q, mask, torch.tensor([True, True]), inclusive=inclusive)
        assert bool(weights.isfinite().all()), weights
        assert bool((weights >= 0).all())
        if not normalise:
            assert float(weights.max()) <= {"truncate": 3.0, "mask": 3.0}.get(name.split("_")[-1], 1.0)


def test_extreme_ratios_have_the_limits_weight() -> None:
    """One token the student excludes makes a product 0 for as long as the window holds it, and no longer."""
    log_theta = torch.tensor([[0.0, -torch.inf, 0.0, 0.0, 200.0]])
    log_q, mask, mixed = torch.zeros(1, 5), torch.ones(1, 5), torch.tensor([True])

    def weights(name: str, **settings: Any) -> list[float]:
        inclusive = settings.pop("inclusive", True)
        return (
            Correction(name, 3.0, **settings).weights(log_theta, log_q, mask, mixed, inclusive=inclusive)[0].tolist()
        )

    assert weights("token_truncate") == [1, 0, 1, 1, 3]
    assert weights("token_mask") == [1, 0, 1, 1, 0]
    assert weights("token_luffy", gamma=1.0) == pytest.approx([0.5, 0, 0.5, 0.5, 1])
    assert weights("prefix_truncate") == [1, 0, 0, 0, 0]
    assert weights("prefix_truncate", inclusive=False) == [1, 1, 0, 0, 0]
    assert weights("prefix_truncate", window=2) == [1, 0, 0, 1, 3]
    assert weights("prefix_truncate", window=2, inclusive=False) == [1, 1, 0, 0, 1]
    assert weights("sequence_truncate") == [0] * 5


def test_errors_say_what_got_wanted_and_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"Unknown correction 'tokens_mask'\. Known: .*Did you mean 'token_mask'\?"):
        Correction("tokens_mask")
    with pytest.raises(ValueError, match=r"Unknown level of a correction 'prefx'.*Did you mean 'prefix'\?"):
        log_weights(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), "prefx")
    for settings, wanted in (
        ({"clip_max": -1.0}, r"`clip_max` is -1\.0; wanted a finite number of at least 0"),
        ({"clip_max": math.inf}, r"`clip_max` is inf; wanted a finite number of at least 0"),
        ({"gamma": -0.1}, r"`gamma` is -0\.1; wanted a finite number of at least 0"),
        ({"clip_min": 4.0}, r"`clip_min` is 4\.0; wanted a number in \[0, 3\]"),
        ({"window": 0}, r"`window` is 0; wanted .* at least 1"),
    ):
        with pytest.raises(ValueError, match=f"^Correction: {wanted}"):
            Correction("prefix_mask", **settings)
    assert len(CORRECTIONS) == 1 + len(LEVELS) * len(SHAPES)


def test_positive_only_touches_the_mixtures_negatives_alone() -> None:
    mixed = torch.tensor([True, True, False, False])
    advantages = torch.tensor([-1.0, 2.0, -3.0, 4.0])
    assert keep_positive(advantages, mixed).tolist() == [0.0, 2.0, -3.0, 4.0]
    per_token = torch.stack([advantages, -advantages], dim=1)
    assert keep_positive(per_token, mixed).tolist() == [[0.0, 1.0], [2.0, 0.0], [-3.0, 3.0], [4.0, -4.0]]


def test_rewards_are_accepted_from_a_least_one_on() -> None:
    rewards = torch.tensor([0.0, 0.3, 1.0, -1.0, torch.nan])
    assert accept_rewards(rewards).tolist() == [False, True, True, False, False]
    assert accept_rewards(rewards, 0.3).tolist() == [False, True, True, False, False]
    assert accept_rewards(rewards, 1.0).tolist() == [False, False, True, False, False]
    assert accept_rewards(rewards, -2.0).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("weights", [(0.35, 0.45, 0.2), (0.1, 0.6, 0.1, 0.2), (0.7, 0.2, 0.05, 0.04, 0.01)])
def test_rounding_keeps_no_reward_from_its_threshold(weights: tuple[float, ...]) -> None:
    """In whatever order float32 sums: full marks are reached, and a reward that is really smaller is not."""
    totals = reduce(torch.add, torch.tensor(list(itertools.permutations(weights))).unbind(1))
    assert (totals != 1).any(), "the test means nothing"
    for full in (1.0, -1.0, 5e4):
        assert accept_rewards(totals * full, full).all()
        assert reaches(totals * full, full).all()
        assert not accept_rewards((totals - math.copysign(1e-5, full)) * full, full).any()


def test_nothing_is_forgiven_at_a_threshold_of_zero() -> None:
    rewards = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    assert accept_rewards(rewards).tolist() == [False, False, True, False]
    assert accept_rewards(rewards, 0.0).tolist() == [True, True, True, False]


def test_imitation_by_hand() -> None:
    log_theta = torch.tensor([[-1.0, -2.0, 9.0], [-4.0, 9.0, 9.0], [-8.0, -8.0, -8.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    weights = torch.tensor([1.0, 0.5, 0.0])
    assert float(imitation_loss(log_theta, weights, mask, mask.sum())) == pytest.approx((1 + 2 + 0.5 * 4) / 6)
    nothing = imitation_loss(log_theta.requires_grad_(), torch.zeros(3), mask, torch.tensor(0.0))
    nothing.backward()
    assert float(nothing) == 0
    assert log_theta.grad is not None
    assert bool((log_theta.grad == 0).all())


def test_imitation_is_the_gradient_towards_the_accepted_samples() -> None:
    """By enumeration of all completions of two tokens: the expected loss over q's samples, divided by the tokens, has
    the gradient −P(accepted)·E_q[∇log θ(y) | accepted]/T."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, generator=generator, dtype=torch.float64, requires_grad=True)  # (T, V), independent
    log_q = torch.randn(2, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    completions = list(itertools.product(range(3), repeat=2))
    accepted = torch.tensor([float(a >= b) for a, b in completions], dtype=torch.float64)
    log_theta = torch.stack([logits.log_softmax(-1)[range(2), list(pair)] for pair in completions])  # (9, 2)
    chance = torch.stack([log_q[range(2), list(pair)].sum() for pair in completions]).exp()
    mask = torch.ones(9, 2, dtype=torch.float64)
    loss = imitation_loss(log_theta, accepted * chance, mask, torch.tensor(2.0, dtype=torch.float64))
    (got,) = torch.autograd.grad(loss, logits, retain_graph=True)
    share = (chance * accepted).sum()
    conditional = (chance * accepted / share * log_theta.sum(1)).sum()
    (wanted,) = torch.autograd.grad(-share * conditional / 2, logits)
    assert torch.allclose(got, wanted, atol=1e-12)


def test_effective_sample_size_of_kish() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    by_hand = sum(weights.flatten().tolist()) ** 2 / sum(w * w for w in weights.flatten().tolist())
    assert float(effective_sample_size(weights.log())) == pytest.approx(by_hand, rel=1e-12)
    assert float(effective_sample_size(torch.full((6,), 0.3).log())) == pytest.approx(6)
    assert float(effective_sample_size(torch.tensor([0.0, 2.0, 0.0]).log())) == 1
    assert float(effective_sample_size(torch.zeros(4).log())) == 0
    assert float(effective_sample_size(torch.zeros(0).log())) == 0


def test_effective_sample_size_does_not_overflow() -> None:
    assert float(effective_sample_size(torch.tensor([1e30, 1e30, 1.0]).log())) == pytest.approx(2)
    assert float(effective_sample_size(torch.tensor([torch.inf, torch.inf, 1.0]).log())) == pytest.approx(2)
    assert float(effective_sample_size(torch.tensor([1e-30, 1e-30]).log())) == pytest.approx(2)


def test_sampled_token_coefficients() -> None:
    log_teacher = torch.tensor([[-1.0, -9.0, -0.5], [-2.0, -torch.inf, 5.0]])
    log_theta = torch.tensor([[-2.0, -1.0, -1.0], [-1.0, -3.0, -5.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    whole = sampled_token_coefficients(log_teacher, log_theta, mask)
    assert whole.tolist() == [[1.0, -8.0, 0.5], [-1.0, 0.0, 0.0]]  # without the one that the teacher rules out
    clipped = sampled_token_coefficients(log_teacher, log_theta, mask, clip=2.0)
    assert clipped.tolist() == [[1.0, -2.0, 0.5], [-1.0, -2.0, 0.0]]
    mean = (1.0 - 2.0 + 0.5 - 1.0 - 2.0) / 5
    centred = sampled_token_coefficients(log_teacher, log_theta, mask, clip=2.0, mean=torch.full((2,), mean))
    assert centred.flatten().tolist() == pytest.approx([1 - mean, -2 - mean, 0.5 - mean, -1 - mean, -2 - mean, 0])
    log_teacher[1, 2] = -torch.inf  # on padding
    assert sampled_token_coefficients(log_teacher, log_theta, mask)[1, 2] == 0
    nothing = sampled_token_coefficients(log_teacher, log_theta, torch.zeros(2, 3), clip=2.0, mean=torch.ones(2))
    assert nothing.tolist() == [[0.0] * 3] * 2


# Exact identities. A language of three symbols, of which 0 ends a sequence; at most three tokens: 15 sequences. Each
# prefix has its own distribution under θ (with parameters), under the teacher and under q.
V, T = 3, 3


def sequences() -> Iterator[tuple[int, ...]]:
    for length in range(1, T + 1):
        for tokens in itertools.product(range(V), repeat=length):
            if 0 not in tokens[:-1] and (length == T or tokens[-1] == 0):
                yield tokens


class Language(NamedTuple):
    """All sequences (B, T) with their mask, log θ (with its gradient to `parameters`), log q, and both masses (B,)."""

    parameters: Tensor
    prefixes: dict[tuple[int, ...], int]
    ids: Tensor
    mask: Tensor
    log_theta: Tensor
    log_q: Tensor
    mass_theta: Tensor
    mass_q: Tensor

    def weights(self, level: str, **settings: Any) -> Tensor:
        inclusive = settings.pop("inclusive", True)
        correction = Correction(f"{level}_truncate", INFINITE, **settings)
        everywhere = torch.ones(len(self.ids), dtype=torch.bool)
        return correction.weights(self.log_theta, self.log_q, self.mask, everywhere, inclusive=inclusive)

    def gradient(self, objective: Tensor) -> Tensor:
        return torch.autograd.grad(objective, self.parameters, retain_graph=True)[0]

    def of_prefix(self, value: Callable[[tuple[int, ...]], float], own: int) -> Tensor:
        """A number (B, T) that depends on the tokens before each one, and with `own=1` on the token itself too."""
        rows = [[value(tuple(row[: i + own])) if valid[i] else 0.0 for i in range(T)] for row, valid in self._rows()]
        return torch.tensor(rows, dtype=torch.float64)

    def _rows(self) -> Iterator[tuple[list[int], list[float]]]:
        return zip(self.ids.tolist(), self.mask.tolist(), strict=True)


@pytest.fixture(scope="module")
def language() -> Language:
    generator = torch.Generator().manual_seed(2)
    prefixes = {p: i for i, p in enumerate(p for n in range(T) for p in itertools.product((1, 2), repeat=n))}
    parameters = torch.randn(len(prefixes), V, generator=generator, dtype=torch.float64).requires_grad_()
    table_q = torch.randn(len(prefixes), V, generator=generator, dtype=torch.float64).log_softmax(-1)
    table_theta = parameters.log_softmax(-1)
    every = list(sequences())
    ids = torch.tensor([[*tokens, *[0] * (T - len(tokens))] for tokens in every])
    mask = torch.tensor([[1.0] * len(tokens) + [0.0] * (T - len(tokens)) for tokens in every], dtype=torch.float64)
    rows = torch.tensor([[prefixes.get(tuple(row[:i]), 0) for i in range(T)] for row in ids.tolist()])
    log_theta, log_q = table_theta[rows, ids] * mask, table_q[rows, ids] * mask
    masses = [log.sum(1).exp().detach() for log in (log_theta, log_q)]
    return Language(parameters, prefixes, ids, mask, log_theta, log_q, *masses)


def test_the_language_is_whole(language: Language) -> None:
    assert len(language.ids) == 15
    assert float(language.mass_theta.sum()) == pytest.approx(1, abs=1e-12)
    assert float(language.mass_q.sum()) == pytest.approx(1, abs=1e-12)


def test_sequence_weights_give_the_on_policy_gradient_exactly(language: Language) -> None:
    """Σ q(x) w(x) A(x) ∇log θ(x) = Σ θ(x) A(x) ∇log θ(x), for any A of the whole completion; token weights do not."""
    advantage = torch.randn(len(language.ids), generator=torch.Generator().manual_seed(3), dtype=torch.float64)[
        :, None
    ]

    def estimate(weights: Tensor) -> Tensor:
        return language.gradient((language.mass_q[:, None] * weights * advantage * language.log_theta).sum())

    exact = language.gradient((language.mass_theta[:, None] * advantage * language.log_theta).sum())
    assert float(exact.abs().max()) > 0.1
    assert torch.allclose(estimate(language.weights("sequence")), exact, atol=1e-12, rtol=0)
    for biased in (language.weights("token"), language.weights("prefix"), torch.ones_like(language.mask)):
        assert float((estimate(biased) - exact).abs().max()) > 0.01


def test_prefix_weights_are_exact_for_a_sum_over_tokens(language: Language) -> None:
    """Σ_x q(x) Σ_i w_i a(x_≤i) ∇log θ(x_i) = Σ_x θ(x) Σ_i a(x_≤i) ∇log θ(x_i); others are biased."""
    term = language.of_prefix(lambda tokens: math.sin(1 + sum(3**i * token for i, token in enumerate(tokens))), own=1)

    def estimate(weights: Tensor) -> Tensor:
        return language.gradient((language.mass_q[:, None] * weights * term * language.log_theta).sum())

    exact = language.gradient((language.mass_theta[:, None] * term * language.log_theta).sum())
    assert float(exact.abs().max()) > 0.1
    for whole in (language.weights("prefix"), language.weights("prefix", window=T), language.weights("sequence")):
        assert torch.allclose(estimate(whole), exact, atol=1e-12, rtol=0)
    for biased in (
        language.weights("token"),
        language.weights("prefix", window=1),
        language.weights("prefix", window=2),
        language.weights("prefix", inclusive=False),
    ):
        assert float((estimate(biased) - exact).abs().max()) > 0.01


def test_prefix_weights_without_the_token_are_exact_for_a_function_of_the_prefix(language: Language) -> None:
    """Σ_x q(x) Σ_i w_<i D(x_<i) = Σ_x θ(x) Σ_i D(x_<i), as of a divergence between next-token distributions."""
    divergence = language.of_prefix(lambda tokens: 1.0 + language.prefixes[tokens] ** 2, own=0)

    def estimate(weights: Tensor) -> float:
        return float((language.mass_q[:, None] * weights * divergence).sum())

    exact = float((language.mass_theta[:, None] * divergence).sum())
    assert estimate(language.weights("prefix", inclusive=False)) == pytest.approx(exact, abs=1e-10)
    assert estimate(language.weights("prefix")) == pytest.approx(exact, abs=1e-10)  # exact too, with more variance
    assert abs(estimate(language.weights("token")) - exact) > 0.1
    assert abs(estimate(torch.ones_like(language.mask)) - exact) > 0.1


def log_distributions() -> tuple[Tensor, Tensor]:
    """log θ (its logits have a gradient) and log t of 40 positions."""
    generator = torch.Generator().manual_seed(4)
    logits, teacher = (2 * torch.randn(40, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits.requires_grad_(), teacher.log_softmax(-1)


def gradient_of(logits: Tensor, log_q: Tensor, centred: bool = False) -> Tensor:
    """E_q[−c ∇log θ] with c from `sampled_token_coefficients`: each position a row, each token weighted by q."""
    log_theta = logits.log_softmax(-1)
    rows = []
    for position in range(len(logits)):
        log_teacher, theta = log_distributions()[1][position : position + 1], log_theta[position : position + 1]
        mass = log_q[position : position + 1].exp()  # as the mask
        mean = (mass * (log_teacher - theta)).sum(-1).detach() if centred else None
        coefficient = sampled_token_coefficients(log_teacher, theta, mass, mean=mean)
        rows.append(-(coefficient * theta).sum())
    return torch.autograd.grad(sum(rows), logits)[0]


def log_variance(logits: Tensor, log_q: Tensor) -> Tensor:
    """½Var_q[log t − log θ] of each position, q fixed."""
    ratio, q = log_distributions()[1] - logits.log_softmax(-1), log_q.exp()
    mean = (q * ratio).sum(-1, keepdim=True)
    return (q * (ratio - mean).square()).sum(-1) / 2


def test_under_kl_symmetry_the_sampled_token_loss_descends_the_log_variance() -> None:
    """E_q[ℓ] = 0, so that −E_q[ℓ ∇log θ] is the gradient of ½Var_q[ℓ] with neither a baseline nor a weight."""
    logits, log_teacher = log_distributions()
    alpha, log_q = reference(logits.detach(), log_teacher, Mixture("kl_symmetry"))
    assert bool(((alpha > 0.01) & (alpha < 0.99)).all())
    ratio = log_teacher - logits.detach().log_softmax(-1)
    assert float((log_q.exp() * ratio).sum(-1).abs().max()) < 1e-9
    exact = torch.autograd.grad(log_variance(logits, log_q).sum(), logits)[0]
    assert float(exact.abs().max()) > 0.1
    assert torch.allclose(gradient_of(logits, log_q), exact, atol=1e-9, rtol=0)


def test_under_another_mixture_the_loss_needs_the_mean_subtracted() -> None:
    logits, log_teacher = log_distributions()
    _, log_q = reference(logits.detach(), log_teacher, Mixture("fixed", fixed_alpha=0.9))
    exact = torch.autograd.grad(log_variance(logits, log_q).sum(), logits)[0]
    assert torch.allclose(gradient_of(logits, log_q, centred=True), exact, atol=1e-12, rtol=0)
    assert float((gradient_of(logits, log_q) - exact).abs().max()) > 0.1


def test_on_the_students_own_tokens_it_is_the_gradient_of_reverse_kl() -> None:
    logits, log_teacher = log_distributions()
    log_theta = logits.log_softmax(-1)
    exact = torch.autograd.grad((log_theta.exp() * (log_theta - log_teacher)).sum(), logits)[0]
    assert torch.allclose(gradient_of(logits, log_theta.detach()), exact, atol=1e-12, rtol=0)


def test_advantages_over_the_students_own_rewards_by_hand() -> None:
    """A completion that no function scored has none, and is in no mean; one own completion has no deviation."""
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, math.nan, 3.0, math.nan]])
    own = torch.tensor([[True, True, False, False]] * 2)
    deviation = math.sqrt(0.5) + 1e-4
    wanted = [[-0.5 / deviation, 0.5 / deviation, 0.5, -0.5], [0.0, 0.0, 2.0, 0.0]]
    assert own_baseline(rewards, own).flatten().tolist() == pytest.approx([*wanted[0], *wanted[1]])
    plain = own_baseline(rewards, own, scale=False)
    assert plain.flatten().tolist() == pytest.approx([-0.5, 0.5, 0.5, -0.5, 0.0, 0.0, 2.0, 0.0])


def test_the_weight_of_the_mixture_is_half_a_cosine() -> None:
    assert [mixture_weight(step, 4) for step in range(6)] == pytest.approx(
        [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0, 0.0]
    )
    assert mixture_weight(1000, None) == 1.0


def test_the_anchored_factor_is_the_gradient_of_the_clipped_objective() -> None:
    """min(r·A, clip(r)·A) with r = (θ/θ_old)^α·(θ/t)^(1−α), at θ = θ_old, the teacher's logarithm in [−1, 1]."""
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(2, 40, 1, dtype=torch.float64, generator=generator).expand(2, 40, 6)
    log_theta, log_teacher = -4 * torch.rand(2, 2, 40, 6, dtype=torch.float64, generator=generator)
    alpha = torch.tensor([0.5, 0.3], dtype=torch.float64)[:, None, None]
    log_theta.requires_grad_()
    to_teacher = (log_theta - log_teacher).clamp(-1, 1)
    ratio = torch.exp(alpha * (log_theta - log_theta.detach()) + (1 - alpha) * to_teacher)
    objective = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    (wanted,) = torch.autograd.grad(objective.sum(), log_theta)
    log_ratio = log_teacher - log_theta.detach()
    found = advantages * anchor_factor(advantages, log_ratio, 1 - alpha)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)
    assert 0.1 < float((wanted == 0).double().mean()) < 0.7
    assert torch.equal(anchor_factor(advantages, log_ratio, 0 * alpha), torch.ones_like(advantages))
    ruled_out = anchor_factor(torch.tensor([1.0, -1.0]), torch.tensor([-math.inf, -math.inf]))
    assert ruled_out.tolist() == pytest.approx([0.0, 0.5 * math.exp(0.5)])  # only the old policy's part is left
