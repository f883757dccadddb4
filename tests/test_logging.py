"""The metrics arrive where TRL's own do: in TensorBoard, under TRL's prefix, one value a step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training import TEXTS, make_trainer, make_untrained_pair, one_batch

METRICS = (
    "alpha/mean",
    "alpha/q10",
    "alpha/q50",
    "alpha/q90",
    "mixture/ess",
    "mixture/kl_theta",
    "mixture/kl_teacher",
    "mixture/reward_theta",
    "mixture/reward_mixture",
    "mixture/groups_with_signal",
    "mixture/tokens_per_second",
    "engine/log_theta_difference",
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_untrained_pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_metrics_reach_tensorboard(
    pair: tuple[str, str], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make_trainer(kind, pair, tmp_path, max_steps=2, report_to="tensorboard")
    trainer.train()
    written = accumulator.EventAccumulator(str(tmp_path / "logs")).Reload()
    history = [entry for entry in trainer.state.log_history if "alpha/mean" in entry]
    assert [entry["step"] for entry in history] == [1, 2]
    for name in METRICS:
        events = written.Scalars(f"train/{name}")
        assert [event.step for event in events] == [1, 2], name
        for event, entry in zip(events, history, strict=True):
            assert math.isfinite(event.value), name
            assert event.value == pytest.approx(entry[name], rel=1e-6), name  # TensorBoard keeps float32


def test_rloo_measures_the_engines_difference_per_token(pair: tuple[str, str], tmp_path: Path) -> None:
    """TRL gives RLOO a sum for each completion: a log θ that is 0.01 off in the engine's record of each token shows as
    0.01, whatever the lengths; half of it where half of the rows are off; and nothing where nothing is."""
    trainer = make_trainer("rloo", pair, tmp_path)
    take, offset = trainer.vllm_generation.take, [0.0, 0.0]

    def off() -> Any:
        rollouts = take()
        for row, rollout in enumerate(rollouts):
            rollout.log_theta.add_(offset[row % 2])
        return rollouts

    trainer.vllm_generation.take = off
    for offsets, wanted in (([0.0, 0.0], 0.0), ([0.01, 0.01], 0.01), ([0.0, -0.01], 0.005)):
        offset[:] = offsets
        trainer._metrics["train"].clear()
        batch = one_batch(trainer, [text for text in TEXTS[:4] for _ in range(4)])
        assert len(batch["completion_mask"].sum(1).unique()) > 1
        assert trainer._metrics["train"]["engine/log_theta_difference"] == pytest.approx([wanted], abs=2e-6)


def test_rloo_leaves_masked_completions_out_of_the_difference(pair: tuple[str, str], tmp_path: Path) -> None:
    """A truncated completion that TRL masks has no token: it is no zero in the mean."""
    trainer = make_trainer("rloo", pair, tmp_path, mask_truncated_completions=True)
    take = trainer.vllm_generation.take

    def off() -> Any:
        rollouts = take()
        for rollout in rollouts:
            rollout.log_theta.add_(0.01)
        return rollouts

    trainer.vllm_generation.take = off
    batch = one_batch(trainer, [text for text in TEXTS[:8] for _ in range(4)])
    lengths = batch["completion_mask"].sum(1)
    assert bool(torch.any(lengths == 0))
    assert bool(torch.any(lengths > 0))
    assert trainer._metrics["train"]["engine/log_theta_difference"] == pytest.approx([0.01], abs=2e-6)
