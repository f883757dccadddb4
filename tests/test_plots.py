"""The figures of training and of rollouts: what stands in them is what went in; each was looked at by eye once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from optimal_sampling_trl import Mixture, Rollout, metrics
from optimal_sampling_trl.plots import draw_tokens, draw_training, plot_tokens, plot_training

LOG = [
    {
        "step": step,
        metrics.REWARD_THETA: step / 10,
        metrics.REWARD_MIXTURE: 0.5 + step / 20,
        metrics.ALPHA_MEAN: 0.6 - step / 20,
        metrics.ALPHA_BAND[0]: 0.3,
        metrics.ALPHA_BAND[1]: 0.8,
        metrics.SAMPLE_SIZE: 0.4 + step / 20,
        metrics.KL_THETA: 0.5 / step,
        metrics.KL_TEACHER: 0.6 / step,
    }
    for step in range(1, 9)
]


def make_rollout(alpha: list[float]) -> Rollout:
    record, ids = torch.tensor(alpha), list(range(len(alpha)))
    return Rollout([1], [1], ids, record, -record, -record, -record, text="", finish_reason="stop", mixture=Mixture())


def lines(panel: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [(float(x), float(y)) for x, y in line.get_xydata()] for line in panel.get_lines()}


def test_training_has_a_panel_for_each_kind_of_metric() -> None:
    rewards, alpha, size, distances = draw_training(LOG).axes
    assert lines(rewards) == {
        "the student's own": [(e["step"], e[metrics.REWARD_THETA]) for e in LOG],
        "the mixture's": [(e["step"], e[metrics.REWARD_MIXTURE]) for e in LOG],
    }
    assert lines(alpha) == {"mean α": [(e["step"], e[metrics.ALPHA_MEAN]) for e in LOG]}
    assert list(lines(size).values()) == [[(e["step"], e[metrics.SAMPLE_SIZE]) for e in LOG]]
    assert lines(distances)["KL(q‖t)"] == [(e["step"], e[metrics.KL_TEACHER]) for e in LOG]


def test_acceptance_has_a_panel_where_it_was_logged() -> None:
    share = {metrics.ACCEPTED_MIXTURE: 0.25, metrics.ACCEPTED_PROMPTS: 0.5}
    panels = draw_training([entry | share for entry in LOG]).axes
    assert [panel.get_ylabel() for panel in panels][:2] == ["Mean reward", "Share accepted"]
    assert lines(panels[1]) == {
        "the mixture's completions": [(e["step"], 0.25) for e in LOG],
        "prompts with one": [(e["step"], 0.5) for e in LOG],
    }


def test_training_leaves_out_what_was_not_logged() -> None:
    """Distillation has no rewards; an evaluation's and the last entry of a run hold nothing of the mixture."""
    distillation = [{key: value for key, value in entry.items() if "reward" not in key} for entry in LOG]
    others = [{"step": 4, "eval_loss": 1.0}, {"train_runtime": 3.0}, {"step": 8, "train_loss": 0.1}]
    panels = draw_training([*distillation, *others]).axes
    assert [panel.get_ylabel() for panel in panels] == ["α (0 student, 1 teacher)", "ESS ÷ tokens", "Nats a token"]
    with pytest.raises(ValueError, match=r"no metric of the mixture.*pass `trainer\.state\.log_history`"):
        draw_training(others)


def test_tokens_are_averaged_over_the_completions_that_are_so_long() -> None:
    alpha, count = draw_tokens([make_rollout([0.2, 0.4, 0.6]), make_rollout([0.4]), make_rollout([0.6, 0.8])]).axes
    assert lines(alpha)["mean α"] == [pytest.approx(point, abs=1e-6) for point in [(1, 0.4), (2, 0.6), (3, 0.6)]]
    assert lines(count)["completions"] == [(1, 3), (2, 2), (3, 1)]
    (band,) = alpha.collections
    top = max(y for x, y in band.get_paths()[0].vertices if x == 1)
    assert top == pytest.approx(0.56, abs=1e-6)  # nine tenths of the way from 0.2 over 0.4 to 0.6
    with pytest.raises(ValueError, match=r"no rollout with a token; pass at least one"):
        draw_tokens([make_rollout([])])


def test_both_are_written_as_png(tmp_path: Path) -> None:
    for path in (
        plot_training(tmp_path / "new" / "training.png", LOG),
        plot_tokens(tmp_path / "tokens.png", [make_rollout([0.1, 0.9])]),
    ):
        assert path.read_bytes().startswith(b"\x89PNG")
