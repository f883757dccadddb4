"""The numbers that are logged of a batch, from tensors alone, against numpy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.paths import ROOT
from optimal_sampling_trl import metrics
from optimal_sampling_trl.metrics import quantiles

SHARES = list(metrics.ALPHA_QUANTILES.values())


def test_the_mixtures_tokens_against_numpy() -> None:
    chance = torch.Generator().manual_seed(0)
    alpha, log_q, log_theta, log_teacher = (-torch.rand(4, 1001, generator=chance)).unbind(0)
    alpha = -alpha
    ratio = np.exp((log_theta - log_q).double().numpy())
    assert metrics.of_mixture(alpha, log_q, log_theta, log_teacher) == pytest.approx(
        {
            "alpha/mean": alpha.double().mean().item(),
            "alpha/q10": np.quantile(alpha.numpy(), 0.1),
            "alpha/q50": np.quantile(alpha.numpy(), 0.5),
            "alpha/q90": np.quantile(alpha.numpy(), 0.9),
            "mixture/kl_theta": (log_q - log_theta).double().mean().item(),
            "mixture/kl_teacher": (log_q - log_teacher).double().mean().item(),
            "mixture/ess": ratio.sum() ** 2 / (ratio**2).sum() / 1001,
        },
        rel=1e-5,
    )
    drawn = metrics.histograms_of_mixture(alpha, log_q, log_theta)
    assert drawn.keys() == {"alpha/tokens", "mixture/log_weight"}
    assert torch.equal(drawn["alpha/tokens"], alpha)
    assert torch.equal(drawn["mixture/log_weight"], log_theta - log_q)


def test_exact_numbers_take_the_places_of_estimates() -> None:
    """An infinite one is left out of its mean; where there is none the estimate stays."""
    log_q, log_theta, log_teacher = torch.zeros(3), torch.full((3,), -1.0), torch.full((3,), -2.0)
    exact = {"kl_q_theta": torch.tensor([0.5, 0.25, torch.inf]), "overlap": torch.tensor([0.5, 0.75, 1.0])}
    numbers = metrics.of_mixture(torch.zeros(3), log_q, log_theta, log_teacher, exact)
    assert (numbers["mixture/kl_theta"], numbers["mixture/kl_teacher"]) == (0.375, 2.0)
    assert metrics.of_drafts(log_q, log_theta, exact) == {"mixture/acceptance": 0.75}


def test_weights_beyond_a_float_have_a_sample_size() -> None:
    """exp(200) is no float32: the ratio of a token that the mixture hardly draws."""
    nothing = torch.zeros(4)
    log_theta = torch.tensor([200.0, 200.0, 0.0, -torch.inf])
    assert metrics.of_mixture(nothing, nothing, log_theta, nothing)["mixture/ess"] == pytest.approx(0.5)


def test_no_token_of_the_mixture_has_no_number() -> None:
    none = torch.zeros(0)
    assert metrics.of_mixture(none, none, none, none) == {}
    assert metrics.histograms_of_mixture(none, none, none) == {}


def test_a_token_that_a_model_rules_out_leaves_no_infinite_number() -> None:
    """log t = −inf at α = 0, log θ = −inf at α = 1: the divergence of one token is infinite, the metric is not."""
    alpha, nothing = torch.tensor([0.0, 1.0, 0.5, 0.5]), torch.zeros(4)
    log_theta = torch.tensor([-0.5, -torch.inf, -1.0, -1.0])
    log_teacher = torch.tensor([-torch.inf, -0.5, -2.0, -1.0])
    numbers = metrics.of_mixture(alpha, nothing, log_theta, log_teacher)
    assert numbers["mixture/kl_theta"] == pytest.approx(2.5 / 3)
    assert numbers["mixture/kl_teacher"] == pytest.approx(3.5 / 3)
    every = numbers | metrics.of_drafts(nothing, log_theta)
    assert all(np.isfinite(value) for value in every.values())
    drawn = metrics.histograms_of_mixture(alpha, nothing, log_theta)
    assert drawn["mixture/log_weight"].tolist() == [-0.5, -1.0, -1.0]
    assert len(drawn["alpha/tokens"]) == 4
    ruled_out = torch.full((4,), -torch.inf)
    assert metrics.of_mixture(alpha, nothing, nothing, ruled_out).keys().isdisjoint({"mixture/kl_teacher"})


def test_the_acceptance_of_the_students_drafts() -> None:
    """Mean of min(1, θ/q) by hand, and as an estimate of Σ min(θ, q), which both distributions give exactly."""
    log_q, log_theta = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-2.0, -1.0, -torch.inf])
    assert metrics.of_drafts(log_q, log_theta) == pytest.approx({"mixture/acceptance": (np.exp(-1) + 1 + 0) / 3})
    assert metrics.of_drafts(torch.zeros(0), torch.zeros(0)) == {}
    chance = torch.Generator().manual_seed(0)
    log_theta, log_q = torch.randn(2, 20, generator=chance).log_softmax(-1).unbind(0)
    tokens = torch.multinomial(log_q.exp(), 100_000, replacement=True, generator=chance)
    exact = float(torch.minimum(log_theta.exp(), log_q.exp()).sum())
    assert metrics.of_drafts(log_q[tokens], log_theta[tokens])["mixture/acceptance"] == pytest.approx(exact, abs=5e-3)


def test_quantiles_of_many_values() -> None:
    """As torch's own, which refuses as many values as a large batch has."""
    values = torch.rand(1001, generator=torch.Generator().manual_seed(0))
    assert quantiles(values, SHARES) == pytest.approx(values.quantile(torch.tensor(SHARES)).tolist(), abs=1e-6)
    many = torch.arange(2**24 + 1, dtype=torch.float32)
    assert quantiles(many, [0.5]) == [2.0**23]


def test_the_speed_is_that_of_the_slowest_process() -> None:
    assert metrics.of_speed(torch.tensor([30.0, 10.0]), torch.tensor([2.0, 4.0])) == {
        "mixture/tokens_per_second": 10.0
    }
    assert metrics.of_speed(torch.tensor([30.0]), torch.tensor([0.0]))["mixture/tokens_per_second"] > 0


NAN = torch.nan


def test_the_rewards_of_the_student_and_of_the_mixture() -> None:
    rewards = torch.tensor([0.0, 1.0, 1.0, NAN, 0.5])
    theta_rows = torch.tensor([True, True, False, False, False])
    wanted = {"mixture/reward_theta": 0.5, "mixture/reward_mixture": 0.75}
    assert metrics.of_rewards(rewards, theta_rows, ~theta_rows) == wanted
    assert metrics.of_rewards(rewards, ~theta_rows, theta_rows) == {
        "mixture/reward_theta": 0.75,
        "mixture/reward_mixture": 0.5,
    }
    first = torch.tensor([True, False, False, False, False])  # the second row is in neither half
    assert metrics.of_rewards(rewards, first, ~theta_rows) == wanted | {"mixture/reward_theta": 0.0}
    every, none = torch.ones(5).bool(), torch.zeros(5).bool()
    assert metrics.of_rewards(rewards, every, none).keys() == {"mixture/reward_theta"}
    assert metrics.of_rewards(rewards, none, every).keys() == {"mixture/reward_mixture"}


def test_a_group_whose_rewards_differ_has_a_signal() -> None:
    rewards = [[0.0, 1.0, 1.0], [0.5, 0.5, 0.5], [NAN, 0.5, NAN], [NAN, NAN, NAN], [NAN, 0.0, 1.0]]
    assert metrics.of_groups(torch.tensor(rewards)) == pytest.approx({"mixture/groups_with_signal": 2 / 5})


def test_the_acceptance_of_completions_and_of_prompts() -> None:
    """A completion that no function could score is in no share; its prompt has no accepted one by it."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0], [NAN, 1.0], [NAN, NAN]])
    theta_rows = torch.tensor([[True, False]] * 4)
    assert metrics.of_acceptance(rewards, rewards > 0, theta_rows, ~theta_rows) == pytest.approx(
        {"accepted/theta": 1 / 2, "accepted/mixture": 1 / 3, "accepted/prompts": 2 / 4}
    )


def test_the_rewards_and_the_acceptance_of_the_teacher_alone() -> None:
    rewards = torch.tensor([1.0, 0.0, NAN, 0.5])
    wanted = {"mixture/reward_teacher": 0.5, "accepted/teacher": 2 / 3}
    assert metrics.of_teacher(rewards, rewards > 0) == pytest.approx(wanted)


def test_the_readme_lists_every_metric() -> None:
    table = (ROOT / "docs" / "monitoring.md").read_text()
    names = [value for name, value in vars(metrics).items() if name.isupper() and isinstance(value, str)]
    assert len(names) > 8
    histograms = (metrics.ALPHA_TOKENS, metrics.LOG_WEIGHT)
    missing = [name for name in (*names, *metrics.ALPHA_QUANTILES) if f"`{name}`" not in table]
    assert missing == list(histograms), "the table of docs/monitoring.md lacks some"


def test_the_difference_between_trainer_and_engine() -> None:
    engine, mask = (
        torch.tensor([[-1.0, -2.0, 0.0], [-1.0, 0.0, 0.0]]),
        torch.tensor([[True, True, False], [True, False, False]]),
    )
    assert metrics.token_differences(engine + 0.25, engine).unique().tolist() == [0.25]
    per_token = metrics.completion_differences(torch.tensor([-3.5, -0.75]), engine, mask)
    assert per_token.tolist() == [0.25, 0.25]
    assert metrics.of_differences(per_token) == {"engine/log_theta_difference": 0.25}
    assert metrics.of_differences(torch.zeros(0)) == {}
    assert metrics.of_differences(torch.tensor([0.5, torch.inf])) == {"engine/log_theta_difference": 0.5}
