"""Figures of training runs and of rollouts: success, α, effective sample size, divergences. matplotlib is an extra.

`plot_*` write a PNG and return its path, `draw_*` return a matplotlib `Figure` for a logger or a notebook. A figure's
title says what is seen in it, unless another one is passed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import metrics
from .files import write_atomically
from .panels import PALETTE, Curve, draw_alpha, draw_curves, empty_figure, finish, seeds_of, show_percent
from .rollouts.rollout import Rollout

STUDENT, MIXTURE = PALETTE[1], PALETTE[0]
"""Colours of the two halves, as in the page of rollouts."""
COLORS = {
    "student's own": STUDENT,
    "mixture's": MIXTURE,
    "prompts with one": PALETTE[2],
    "KL(q‖θ)": STUDENT,
    "KL(q‖t)": MIXTURE,
}
"""Colours of curves by their name; the others have the palette's."""
BAND_LABEL = "10 % to 90 % of tokens"
ENDS = 5
"""A title compares the first fifth of training with the last."""
DIVERGENCES = {
    metrics.KL_THETA: "KL(q‖θ)",
    metrics.KL_TEACHER: "KL(q‖t)",
    "dense/kl_theta_teacher": "KL(θ‖t)",
    "dense/kl_teacher_theta": "KL(t‖θ)",
}
"""Divergences that are logged, and the names of their curves; the last two where there are dense records."""


def plot_learning(
    path: str | os.PathLike[str],
    curves: Mapping[str, Curve],
    alpha: Sequence[tuple[float, float]] | None = None,
    alpha_band: Sequence[tuple[float, float, float]] | None = None,
    *,
    x_label: str = "Training step",
    y_label: str = "Success rate (share of samples)",
    band_label: str = BAND_LABEL,
    title: str | None = None,
    percent: bool = False,
) -> Path:
    """Draw the success of several runs and, below on the same x, α over training, as a PNG.

    Args:
        path: the file to write, a PNG whatever its name. Its folder is made. An existing file is replaced atomically.
        curves: points (x, success) of each run by name, in the order of the legend. A NaN leaves a gap. In the place
            of points a list of them, one for each seed and at the same x: their mean is drawn, in a band from the
            lowest to the highest.
        alpha: points (x, mean α); without them there is no lower panel.
        alpha_band: points (x, low, high), the quantiles of α that `band_label` names, drawn as a band.
        x_label, y_label, band_label: labels of the axes and of the band, with the unit.
        title: heading of the figure. None says which run ends highest, and where; an empty text leaves it out.
        percent: write y, a share, as per cent.

    Returns:
        the path.

    Raises:
        ImportError: where matplotlib is not installed.
        ValueError: on no curves, a curve without points, a point of another length, seeds at different x, or a band
            without `alpha`.

    Example:
        ```python
        plot_learning("output/curves.png", {"GRPO": [(0, 0.02), (100, 0.1)], "mixture": [(0, 0.02), (100, 0.4)]})
        ```
    """
    if not curves:
        raise ValueError("plot_learning got no curves; pass at least one run as {name: [(x, success), ...]}.")
    if alpha is None and alpha_band is not None:
        raise ValueError("alpha_band was passed without alpha; pass the mean as well, the band is drawn round it.")

    figure, panels = empty_figure([4.0] if alpha is None else [4.0, 1.8])
    draw_curves(panels[0], curves, y_label)
    if percent:
        show_percent(panels[0].yaxis)
    if alpha is not None:
        draw_alpha(panels[1], alpha, alpha_band, band_label)
    finish(figure, panels, x_label, _highest(curves, percent) if title is None else title)
    return _write(path, figure)


def _highest(curves: Mapping[str, Curve], percent: bool) -> str:
    """Say which run ends highest, and where each began and ended if there is one alone."""
    ends = {
        name: [np.mean([y[place] for _, y in seeds_of(name, curve)]) for place in (0, -1)]
        for name, curve in curves.items()
    }
    best = max(ends, key=lambda name: np.nan_to_num(ends[name][1], nan=-np.inf))
    first, last = (f"{value:.1%}".replace("%", " %") if percent else f"{value:.2f}" for value in ends[best])
    return f"{best}: {first} → {last}" + (f", the highest of {len(ends)}" if len(ends) > 1 else "")


def plot_training(path: str | os.PathLike[str], log_history: Sequence[Mapping[str, Any]]) -> Path:
    """Write `draw_training` as a PNG, make its folder, and return its path.

    Example:
        ```python
        log = [{"step": 1, "alpha/mean": 0.5}, {"step": 2, "alpha/mean": 0.4}]  # a trainer's `state.log_history`
        plot_training("output/training.png", log)
        ```
    """
    return _write(path, draw_training(log_history))


def draw_training(log_history: Sequence[Mapping[str, Any]], title: str | None = None) -> Any:
    """Draw the trainers' metrics of the mixture over training, a panel for each kind that the log holds:

    - the mean reward of the two halves of the groups, the student's and the mixture's;
    - the share of completions and of prompts that the reward accepts;
    - α, mean and 10 % to 90 % of tokens;
    - the effective sample size of the mixture's tokens for the student, as a share of their number;
    - divergences in nats a token: KL(q‖θ) and KL(q‖t) over the mixture's tokens, estimated unless dense records hold
      them, and the exact ones between student and teacher over all tokens where dense records hold those.

    Args:
        log_history: entries of `trainer.state.log_history`, each with a `step`.
        title: heading of the figure. None compares the first fifth of training with the last; an empty text leaves it
            out.

    Raises:
        ImportError: where matplotlib is not installed.
        ValueError: where no entry holds a metric of the mixture.
    """
    logged = [entry for entry in log_history if "step" in entry]

    def curve(*names: str) -> list[tuple[float, ...]]:
        found = [entry for entry in logged if all(entry.get(name) is not None for name in names)]
        return [(entry["step"], *(entry[name] for name in names)) for entry in found]

    alpha = curve(metrics.ALPHA_MEAN)
    panels_of: dict[str, Mapping[str, Sequence[tuple[float, ...]]]] = {
        "Mean reward": {
            "student's own": curve(metrics.REWARD_THETA),
            "mixture's": curve(metrics.REWARD_MIXTURE),
        },
        "Share accepted": {
            "student's own": curve(metrics.ACCEPTED_THETA),
            "mixture's": curve(metrics.ACCEPTED_MIXTURE),
            "prompts with one": curve(metrics.ACCEPTED_PROMPTS),
        },
        "α": {"mean α": alpha},
        "ESS ÷ tokens": {"mixture's tokens": curve(metrics.SAMPLE_SIZE)},
        "Nats a token": {label: curve(name) for name, label in DIVERGENCES.items()},
    }
    shown = {label: _with_points(curves) for label, curves in panels_of.items() if _with_points(curves)}
    if not shown:
        raise ValueError(
            f"draw_training found no metric of the mixture in the log, such as {metrics.ALPHA_MEAN!r}; pass "
            "`trainer.state.log_history` of one of this package's trainers."
        )
    figure, panels = empty_figure([2.0] * len(shown))
    for panel, (label, curves) in zip(panels, shown.items(), strict=True):
        if label == "α":
            draw_alpha(panel, alpha, curve(*metrics.ALPHA_BAND) or None, BAND_LABEL)
        else:
            draw_curves(panel, curves, label, COLORS)
    finish(figure, panels, "Training step", _change(shown) if title is None else title)
    return figure


def _with_points(curves: Mapping[str, Sequence[tuple[float, ...]]]) -> dict[str, Sequence[tuple[float, ...]]]:
    return {name: points for name, points in curves.items() if points}


def _change(shown: Mapping[str, Mapping[str, Sequence[tuple[float, ...]]]]) -> str:
    """Say how the first kind of metric changed: the mean of the first fifth of its points, and of the last."""
    label, curves = next(iter(shown.items()))
    changes = []
    for name, points in curves.items():
        values = [point[1] for point in points]
        part = -(-len(values) // ENDS)
        first, last = np.nanmean(values[:part]), np.nanmean(values[-part:])
        changes.append(f"{first:.2f} → {last:.2f} ({name})")
    return f"{label} from the first to the last fifth of training:\n{', '.join(changes)}"


def plot_tokens(path: str | os.PathLike[str], rollouts: Sequence[Rollout]) -> Path:
    """Write `draw_tokens` as a PNG, make its folder, and return its path.

    Example:
        ```python
        with OptimalSamplingV1(model_teacher="large", model_theta="small") as sampler:
            plot_tokens("output/tokens.png", sampler.generate(["3 + 4 ="], n=8, max_tokens=8).rollouts)
        ```
    """
    return _write(path, draw_tokens(rollouts))


def draw_tokens(rollouts: Sequence[Rollout], title: str | None = None) -> Any:
    """Draw α by position in the completion, mean and 10 % to 90 %, above the number of completions that are so long.

    Completions that the student sampled alone have α = 0 and take no part in α; they are counted apart.

    Args:
        rollouts: the mixture's, with or without the student's own among them.
        title: heading of the figure. None says the mean of α and of how many tokens; an empty text leaves it out.

    Raises:
        ImportError: where matplotlib is not installed.
        ValueError: where no rollout of the mixture has a token.
    """
    mixed = [rollout for rollout in rollouts if not rollout.mixture.is_theta_only]
    alpha = _by_position(mixed)  # (N, T)
    of_student = [len(rollout.completion_ids) for rollout in rollouts if rollout.mixture.is_theta_only]
    if not alpha.size:
        raise ValueError(
            f"draw_tokens got no rollout of the mixture with a token, and {len(of_student)} of the student alone, "
            "whose α is 0; pass at least one."
        )
    places = range(1, alpha.shape[1] + 1)
    low, high = np.nanquantile(alpha, [0.1, 0.9], axis=0).tolist()
    figure, panels = empty_figure([3.0, 1.6])
    band = list(zip(places, low, high, strict=True))
    draw_alpha(panels[0], list(zip(places, np.nanmean(alpha, axis=0).tolist(), strict=True)), band, "10 % to 90 %")
    counts = {"mixture's": (~np.isnan(alpha)).sum(0).tolist()}
    if of_student:
        counts["student's own"] = [
            sum(length >= place for length in of_student) for place in range(1, max(of_student) + 1)
        ]
    for (name, count), color, style in zip(counts.items(), (MIXTURE, STUDENT), ("-", "--")):
        positions = range(1, len(count) + 1)
        panels[1].step(positions, count, style, where="mid", color=color, linewidth=1.8, label=name)
    panels[1].set_ylim(bottom=0)
    panels[1].legend(loc="lower left", fontsize="small")  # where a count that falls leaves room
    panels[1].set_ylabel("Completions")
    tokens = int((~np.isnan(alpha)).sum())
    seen = f"Mean α {np.nanmean(alpha):.2f} over {tokens:,} tokens of {len(mixed):,} completions of the mixture"
    finish(figure, panels, "Position in the completion (tokens)", seen if title is None else title)
    return figure


def _by_position(rollouts: Sequence[Rollout]) -> np.ndarray:
    """Stack α of N rollouts as (N, T), NaN past the end of each."""
    longest = max((len(rollout.completion_ids) for rollout in rollouts), default=0)
    alpha = np.full((len(rollouts), longest), np.nan)
    for row, rollout in enumerate(rollouts):
        alpha[row, : len(rollout.alpha)] = rollout.alpha
    return alpha


def _write(path: str | os.PathLike[str], figure: Any) -> Path:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(Path(path), image.getvalue())
    return Path(path)
