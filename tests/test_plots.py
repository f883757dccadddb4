"""The figures of training and of rollouts: what stands in them is what went in; each was looked at by eye once."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from optimal_sampling_trl import Mixture, Rollout, metrics
from optimal_sampling_trl.panels import draw_curves, empty_figure
from optimal_sampling_trl.plots import (
    DIVERGENCES,
    _highest,
    draw_tokens,
    draw_training,
    plot_learning,
    plot_tokens,
    plot_training,
)

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


def make_rollout(alpha: list[float], mixture: Mixture | None = None) -> Rollout:
    record, ids = torch.tensor(alpha), list(range(len(alpha)))
    return Rollout(
        [1], [1], ids, record, -record, -record, -record, text="", finish_reason="stop", mixture=mixture or Mixture()
    )


def lines(panel: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [(float(x), float(y)) for x, y in line.get_xydata()] for line in panel.get_lines()}


def test_training_has_a_panel_for_each_kind_of_metric() -> None:
    rewards, alpha, size, distances = draw_training(LOG).axes
    assert lines(rewards) == {
        "student's own": [(e["step"], e[metrics.REWARD_THETA]) for e in LOG],
        "mixture's": [(e["step"], e[metrics.REWARD_MIXTURE]) for e in LOG],
    }
    assert lines(alpha) == {"mean α": [(e["step"], e[metrics.ALPHA_MEAN]) for e in LOG]}
    assert list(lines(size).values()) == [[(e["step"], e[metrics.SAMPLE_SIZE]) for e in LOG]]
    assert lines(distances) == {
        "KL(q‖θ)": [(e["step"], e[metrics.KL_THETA]) for e in LOG],
        "KL(q‖t)": [(e["step"], e[metrics.KL_TEACHER]) for e in LOG],
    }


def test_divergences_between_the_models_stand_beside_those_of_the_mixture() -> None:
    """A dense loss logs KL(θ‖t): the curves of the mixture stay, and every name is one that a trainer logs."""
    *_, distances = draw_training([entry | {"dense/kl_theta_teacher": 0.5} for entry in LOG]).axes
    assert list(lines(distances)) == ["KL(q‖θ)", "KL(q‖t)", "KL(θ‖t)"]
    assert lines(distances)["KL(θ‖t)"] == [(e["step"], 0.5) for e in LOG]
    logged = {metrics.KL_THETA, metrics.KL_TEACHER, *(f"dense/{name}" for name in metrics.DENSE_MEANS)}
    assert set(DIVERGENCES) <= logged


def test_titles_say_what_is_seen() -> None:
    """The first fifth of training, which is two of eight steps, against the last; α where there is no reward."""
    figure = draw_training(LOG)
    fifths = "from the first to the last fifth of training:\n"
    wanted = f"Mean reward {fifths}0.15 → 0.75 (student's own), 0.57 → 0.88 (mixture's)"
    assert figure.get_suptitle() == wanted
    alone = draw_training([{"step": 1, metrics.ALPHA_MEAN: 0.5}])
    assert alone.get_suptitle() == f"α {fifths}0.50 → 0.50 (mean α)"
    assert draw_training(LOG, title="A run").get_suptitle() == "A run"
    assert draw_training(LOG, title="").get_suptitle() == ""
    tokens = draw_tokens([make_rollout([0.2, 0.4])])
    assert tokens.get_suptitle() == "Mean α 0.30 over 2 tokens of 1 completions of the mixture"


def test_steps_are_whole_numbers_and_legends_stand_within_the_panels() -> None:
    figure = draw_training(LOG[:3])
    figure.canvas.draw()
    ticks = [label.get_text() for label in figure.axes[-1].get_xticklabels() if label.get_text()]
    assert all(float(tick).is_integer() for tick in ticks)
    for panel in figure.axes:
        inside, legend = panel.get_window_extent(), panel.get_legend().get_window_extent()
        assert inside.x0 <= legend.x0
        assert legend.x1 <= inside.x1


def test_axis_of_alpha_fits_what_is_drawn_and_shows_a_tenth_at_least() -> None:
    flat = draw_training([{"step": step, metrics.ALPHA_MEAN: 0.3} for step in (1, 2)]).axes[0].get_ylim()
    assert flat == pytest.approx((0.25, 0.35))
    low, high = draw_training(LOG).axes[1].get_ylim()
    assert low <= 0.2
    assert 0.8 <= high <= 1.02


def test_acceptance_has_a_panel_where_it_was_logged() -> None:
    share = {metrics.ACCEPTED_MIXTURE: 0.25, metrics.ACCEPTED_PROMPTS: 0.5}
    panels = draw_training([entry | share for entry in LOG]).axes
    assert [panel.get_ylabel() for panel in panels][:2] == ["Mean reward", "Share accepted"]
    assert lines(panels[1]) == {
        "mixture's": [(e["step"], 0.25) for e in LOG],
        "prompts with one": [(e["step"], 0.5) for e in LOG],
    }


def test_training_leaves_out_what_was_not_logged() -> None:
    """Distillation has no rewards; an evaluation's and the last entry of a run hold nothing of the mixture."""
    distillation = [{key: value for key, value in entry.items() if "reward" not in key} for entry in LOG]
    others = [{"step": 4, "eval_loss": 1.0}, {"train_runtime": 3.0}, {"step": 8, "train_loss": 0.1}]
    panels = draw_training([*distillation, *others]).axes
    assert [panel.get_ylabel() for panel in panels] == ["α (0 student,\n1 teacher)", "ESS ÷ tokens", "Nats a token"]
    with pytest.raises(ValueError, match=r"no metric of the mixture.*pass `trainer\.state\.log_history`"):
        draw_training(others)


def test_tokens_are_averaged_over_the_completions_that_are_so_long() -> None:
    alpha, count = draw_tokens([make_rollout([0.2, 0.4, 0.6]), make_rollout([0.4]), make_rollout([0.6, 0.8])]).axes
    assert lines(alpha)["mean α"] == [pytest.approx(point, abs=1e-6) for point in [(1, 0.4), (2, 0.6), (3, 0.6)]]
    assert lines(count)["mixture's"] == [(1, 3), (2, 2), (3, 1)]
    (band,) = alpha.collections
    top = max(y for x, y in band.get_paths()[0].vertices if x == 1)
    assert top == pytest.approx(0.56, abs=1e-6)  # nine tenths of the way from 0.2 over 0.4 to 0.6
    with pytest.raises(ValueError, match=r"no rollout of the mixture with a token"):
        draw_tokens([make_rollout([])])


def test_completions_of_the_student_alone_take_no_part_in_alpha() -> None:
    own = make_rollout([0.0, 0.0, 0.0], Mixture.theta_only())
    alpha, count = draw_tokens([make_rollout([0.2, 0.4]), own]).axes
    assert lines(alpha)["mean α"] == [pytest.approx(point, abs=1e-6) for point in [(1, 0.2), (2, 0.4)]]
    assert lines(count) == {"mixture's": [(1, 1), (2, 1)], "student's own": [(1, 1), (2, 1), (3, 1)]}
    with pytest.raises(ValueError, match=r"and 1 of the student alone, whose α is 0; pass at least one"):
        draw_tokens([own])


def test_both_are_written_as_png(tmp_path: Path) -> None:
    for path in (
        plot_training(tmp_path / "new" / "training.png", LOG),
        plot_tokens(tmp_path / "tokens.png", [make_rollout([0.1, 0.9])]),
    ):
        assert path.read_bytes().startswith(b"\x89PNG")


CURVES = {"GRPO": [(0, 0.1), (100, 0.3)], "mixture": [(0, 0.1), (50, math.nan), (100, 0.6)]}


def test_figure_is_a_png_and_leaves_matplotlib_alone(tmp_path):
    code = (
        "import sys, matplotlib\n"
        "from optimal_sampling_trl.plots import plot_learning\n"
        f"plot_learning({str(tmp_path / 'a' / 'learn.png')!r}, {{'GRPO': [(0, .1), (1, .2)]}}, [(0, .5), (1, .4)],"
        " [(0, .2, .9), (1, .1, .8)])\n"
        "assert 'matplotlib.pyplot' not in sys.modules and matplotlib.get_backend() == 'svg'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "MPLBACKEND": "svg"})
    assert (tmp_path / "a" / "learn.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "a").iterdir())) == 1
    assert plot_learning(tmp_path / "one.png", CURVES).stat().st_size > 1000


def test_seeds_are_a_mean_in_a_band() -> None:
    (panel,) = empty_figure([3.0])[1]
    draw_curves(panel, {"GRPO": [[(0, 0.1), (10, 0.2)], [(0, 0.3), (10, 0.6)]], "one": [(0, 0.5)]}, "success")
    assert lines(panel) == {
        "GRPO (2 seeds)": [pytest.approx(point) for point in [(0, 0.2), (10, 0.4)]],
        "one": [(0, 0.5)],
    }
    (band,) = panel.collections
    ends = {(float(x), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
    assert ends == {(0, 0.1), (0, 0.3), (10, 0.2), (10, 0.6)}
    with pytest.raises(ValueError, match=r"curve 'GRPO': seed 1 was measured at other x than seed 0"):
        draw_curves(panel, {"GRPO": [[(0, 0.1)], [(1, 0.3)]]}, "success")


def test_title_of_curves_names_the_run_that_ends_highest() -> None:
    seeds = [[(0, 0.1), (100, 0.5)], [(0, 0.1), (100, 0.3)]]
    assert _highest({**CURVES, "seeds": seeds}, True) == "mixture: 10.0 % → 60.0 %, the highest of 3"
    assert _highest({"seeds": seeds}, False) == "seeds: 0.10 → 0.40"


def test_figure_errors_say_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "learn.png"
    with pytest.raises(ValueError, match="no curves; pass at least one"):
        plot_learning(path, {})
    with pytest.raises(ValueError, match="curve 'GRPO' has no points"):
        plot_learning(path, {"GRPO": []})
    with pytest.raises(ValueError, match="alpha_band: point 0 has 2 numbers, wanted 3"):
        plot_learning(path, CURVES, [(0, 0.5)], [(0, 0.5)])
    with pytest.raises(ValueError, match="pass the mean as well"):
        plot_learning(path, CURVES, alpha_band=[(0, 0.1, 0.2)])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'optimal-sampling-trl\[plots\]'"):
        plot_learning(path, CURVES)
    assert not path.exists()
