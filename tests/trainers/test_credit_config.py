"""Credit of single tokens: what is refused, and what is asked of an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optimal_sampling_trl import GRPOConfig
from optimal_sampling_trl.rollouts.dense import Dense
from optimal_sampling_trl.trainers.dense_config import dense_of


def config(folder: Path, **settings: Any) -> GRPOConfig:
    return GRPOConfig(str(folder), use_cpu=True, bf16=False, report_to="none", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"credit": "token"}, r"^Unknown value of `credit` 'token'\. Known: anchored, completion, routed\."),
        ({"credit": "routed"}, r"`credit` is 'routed' and `dense_coefficient` 0, .*Set `dense_coefficient=1\.0`"),
    ],
    ids=str,
)
def test_what_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_routed_credit_asks_for_the_teachers_entropy(tmp_path: Path) -> None:
    assert config(tmp_path).credit == "completion"
    assert dense_of(config(tmp_path, credit="anchored")) is None
    wish = dense_of(config(tmp_path, credit="routed", dense_coefficient=1.0, dense_top_k=8))
    assert wish == Dense(("kl_theta_teacher", "entropy_teacher"), 8)
