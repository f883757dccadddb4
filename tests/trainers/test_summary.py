"""The line at the start of a training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trl

from helpers.training import make_trainer
from optimal_sampling_trl import Mixture
from optimal_sampling_trl.trainers.summary import describe

WANTED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "grpo": (
        {},
        ["; 50% of the completions from the mixture (kl_symmetry, α in [0, 1])", "a positive advantage alone count"],
    ),
    "rloo": (
        {
            "positive_only": "none",
            "correction": "sequence_truncate",
            "generator": {"mixture": Mixture("fixed", fixed_alpha=1.0), "alpha_by_success": 1.0},
        },
        [
            "; up to 50% of the completions from the mixture (α = 1, annealed by the student's successes); ",
            "all completions count, weighted by sequence_truncate",
        ],
    ),
    "raft": (
        {"generator": {"mixture": Mixture("top_k_swap", swap_top_k=7)}},
        ["100% of the completions from the mixture (top_k_swap, K = 7)", "that the reward accepts are imitated"],
    ),
    "divergence": ({"generator": {"schedule": 0.5}}, ["annealed over 0.5 of training", "loss 'divergence'"]),
    "sampled_token": (
        {"generator": {"mixture": Mixture("trust_region", epsilon=0.1)}},
        ["(trust_region, ε = 0.1, α in [0, 1])", "loss 'sampled_token'"],
    ),
}


TERMS: list[tuple[str, dict[str, Any], str]] = [
    (
        "raft",
        {"dense_coefficient": 1.0, "dense_fade": 0.5},
        "are imitated, plus 1 × the 'reverse' divergence from the teacher, faded over 0.5 of training; ",
    ),
    (
        "rloo",
        {"dense_coefficient": 0.25, "dense_divergence": "js", "correction": "sequence_mask"},
        ", weighted by sequence_mask, plus 0.25 × the 'js' divergence from the teacher; ",
    ),
    (
        "grpo",
        {"distillation_coefficient": 0.1, "credit": "anchored"},
        " alone count, credit 'anchored', plus 0.1 × (log t - log θ) of the sampled tokens; ",
    ),
]


@pytest.mark.parametrize(("kind", "settings", "words"), TERMS, ids=["raft", "rloo", "grpo"])
def test_it_says_what_stands_beside_the_reward(
    pair: tuple[str, str], tmp_path: Path, kind: str, settings: dict[str, Any], words: str
) -> None:
    assert words in describe(make_trainer(kind, pair, tmp_path, **settings))
    assert ", plus " not in describe(make_trainer(kind, pair, tmp_path))


@pytest.mark.parametrize("kind", WANTED)
def test_it_says_what_is_trained(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    settings, words = WANTED[kind]
    line = describe(make_trainer(kind, pair, tmp_path, **settings))
    words = [f"student '{pair[1]}', teacher '{pair[0]}', sampled by transformers; ", *words]
    assert [each for each in words if each not in line] == [], line
    assert re.search(r"; \d+\.\d GB of .* taken\.$", line)
    assert "\n" not in line


def test_a_configuration_of_trls_has_the_loss_of_its_trainer(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = make_trainer("raft", pair, tmp_path, config=trl.GRPOConfig, num_generations=4)
    assert "; completions that the reward accepts are imitated; " in describe(trainer)


def test_it_is_printed_once_unless_errors_alone_are_asked_for(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer("raft", pair, tmp_path, max_steps=1).train()
    assert capsys.readouterr().out.count("RAFTTrainer: student ") == 1
    make_trainer("raft", pair, tmp_path, max_steps=1, log_level="error").train()
    assert "RAFTTrainer: student " not in capsys.readouterr().out
