"""Settings of the dense losses: refusals, what is asked of an engine, and the fade."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl

from optimal_sampling_trl import DistillationConfig, GRPOConfig, RAFTConfig, RLOOConfig
from optimal_sampling_trl.rollouts.dense import Dense
from optimal_sampling_trl.trainers.dense_config import coefficient_at, dense_of, joined

TERMS = (GRPOConfig, RLOOConfig, RAFTConfig)


def config(made: Any, folder: Path, **settings: Any) -> Any:
    return made(str(folder), use_cpu=True, bf16=False, report_to="none", **settings)


@pytest.mark.parametrize("made", TERMS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dense_coefficient": -0.1}, r"`dense_coefficient` is -0\.1; wanted a finite number of at least 0"),
        ({"dense_coefficient": True}, "`dense_coefficient` is True; wanted a finite number"),
        (
            {"dense_coefficient": 1.0, "dense_divergence": "revers"},
            r"^Unknown value of `dense_divergence` 'revers'\. Known: forward, js, reverse\. Did you mean 'reverse'\?",
        ),
        ({"dense_coefficient": 1.0, "dense_fade": 1.5}, r"`dense_fade` is 1\.5; wanted a number in \(0, 1\]"),
        (
            {"dense_coefficient": 1.0, "dense_fade": 0.0},
            r"`dense_fade` is 0\.0; wanted a number in \(0, 1\]\. Pass a share of training, or None",
        ),
        ({"dense_coefficient": 1.0, "dense_top_k": 0}, "`dense_top_k` is 0; wanted a whole number of at least 1"),
        ({"dense_divergence": "js"}, "`dense_divergence` is 'js' and `dense_coefficient` 0, so that nothing reads it"),
        ({"dense_fade": 0.5}, r"`dense_fade` is 0\.5 and `dense_coefficient` 0"),
        ({"dense_top_k": 8}, r"`dense_top_k` is 8 and `dense_coefficient` 0.*Drop it, or set the coefficient"),
    ],
    ids=str,
)
def test_refusals(tmp_path: Path, made: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(made, tmp_path, **settings)


def test_distillation_refuses_no_token(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="DistillationConfig: `dense_top_k` is 0; wanted a whole number of at least 1"
    ):
        config(DistillationConfig, tmp_path, loss="dense", dense_top_k=0)


def test_what_is_asked_of_an_engine(tmp_path: Path) -> None:
    wish = Dense(("kl_theta_teacher",), 32)
    for made in TERMS:
        assert dense_of(config(made, tmp_path)) is None
        assert dense_of(config(made, tmp_path, dense_coefficient=0.1)) == wish
    assert dense_of(config(DistillationConfig, tmp_path)) is None
    assert dense_of(config(DistillationConfig, tmp_path, loss="dense")) == wish
    assert dense_of(config(DistillationConfig, tmp_path, loss="dense", dense_top_k=5)).top_k == 5
    assert dense_of(config(trl.GRPOConfig, tmp_path)) is None


def test_two_wishes_are_one() -> None:
    few, many = Dense(("overlap", "kl_theta_teacher"), 4), Dense(("kl_theta_teacher",), 32)
    assert joined(few, many) == Dense(("overlap", "kl_theta_teacher"), 32)
    assert joined(few, None) == joined(None, few) == few
    assert joined(None, None) is None


def test_the_fade_is_linear_and_stays_at_zero(tmp_path: Path) -> None:
    steady, fading = (config(GRPOConfig, tmp_path, dense_coefficient=2.0, dense_fade=fade) for fade in (None, 0.5))
    shares = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
    assert [coefficient_at(steady, share) for share in shares] == [2.0] * 6
    assert [coefficient_at(fading, share) for share in shares] == [2.0, 1.5, 1.0, 0.0, 0.0, 0.0]
    assert coefficient_at(config(trl.GRPOConfig, tmp_path), 0.5) == 0.0
