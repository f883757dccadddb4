"""Figures of training runs and of rollouts: success, α, effective sample size, divergences. matplotlib is an extra.

`plot_*` write a PNG and return its path, `draw_*` return a matplotlib `Figure` for a logger or a notebook. Nothing
global is touched: neither matplotlib's backend nor `pyplot`'s list of figures.
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
from .rollouts.rollout import Rollout

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito's colours, distinct under every form of colour blindness, without the yellow that white swallows."""
MARKERS = "os^Dvp*"
STYLES = ("-", "--", "-.", ":")
MARKERS_PER_CURVE = 25
BAND_LABEL = "10 % to 90 % of tokens"


def plot_learning(
    path: str | os.PathLike[str],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    alpha: Sequence[tuple[float, float]] | None = None,
    alpha_band: Sequence[tuple[float, float, float]] | None = None,
    *,
    x_label: str = "Training step",
    y_label: str = "Success rate (share of samples)",
    band_label: str = BAND_LABEL,
    title: str | None = None,
) -> Path:
    """Draw the success of several runs and, below on the same x, α over training, as a PNG.

    Args:
        path: the file to write, a PNG whatever its name. Its folder is made; an existing file is replaced at once.
        curves: points (x, success) of each run by name, in the order of the legend. A NaN leaves a gap.
        alpha: points (x, mean α); without them there is no lower panel.
        alpha_band: points (x, low, high), the quantiles of α that `band_label` names, drawn as a band.
        x_label, y_label, band_label: labels of the axes and of the band, with the unit.
        title: heading of the figure.

    Returns:
        the path.

    Raises:
        ImportError: where matplotlib is not installed.
        ValueError: on no curves, a curve without points, a point of another length, or a band without `alpha`.

    Example:
        ```python
        plot_learning("output/curves.png", {"GRPO": [(0, 0.02), (100, 0.1)], "mixture": [(0, 0.02), (100, 0.4)]})
        ```
    """
    if not curves:
        raise ValueError("plot_learning got no curves; pass at least one run as {name: [(x, success), ...]}.")
    if alpha is None and alpha_band is not None:
        raise ValueError("alpha_band was passed without alpha; pass the mean as well, the band is drawn round it.")

    figure, panels = _empty_figure([4.0] if alpha is None else [4.0, 2.0])
    _draw_curves(panels[0], curves, y_label)
    if alpha is not None:
        _draw_alpha(panels[1], alpha, alpha_band, band_label)
    _finish(figure, panels, x_label, title)
    return _write(path, figure)


def plot_training(path: str | os.PathLike[str], log_history: Sequence[Mapping[str, Any]]) -> Path:
    """Write `draw_training` as a PNG, make its folder, and return its path.

    Example:
        ```python
        log = [{"step": 1, "alpha/mean": 0.5}, {"step": 2, "alpha/mean": 0.4}]  # a trainer's `state.log_history`
        plot_training("output/training.png", log)
        ```
    """
    return _write(path, draw_training(log_history))


def draw_training(log_history: Sequence[Mapping[str, Any]]) -> Any:
    """Draw the trainers' metrics of the mixture over training, a panel for each kind that the log holds:

    - the mean reward of the two halves of the groups, the student's and the mixture's;
    - the share of completions and of prompts that the reward accepts;
    - α, mean and 10 % to 90 % of tokens;
    - the effective sample size of the mixture's tokens for the student, as a share of their number;
    - KL(q‖θ) and KL(q‖t), estimated on the sampled tokens, in nats a token.

    Args:
        log_history: entries of `trainer.state.log_history`, each with a `step`.

    Raises:
        ImportError: where matplotlib is not installed.
        ValueError: where no entry holds a metric of the mixture.
    """
    logged = [entry for entry in log_history if "step" in entry]

    def curve(*names: str) -> list[tuple[float, ...]]:
        found = [entry for entry in logged if all(entry.get(name) is not None for name in names)]
        return [(entry["step"], *(entry[name] for name in names)) for entry in found]

    rewards = {"the student's own": curve(metrics.REWARD_THETA), "the mixture's": curve(metrics.REWARD_MIXTURE)}
    accepted = {
        "the student's completions": curve(metrics.ACCEPTED_THETA),
        "the mixture's completions": curve(metrics.ACCEPTED_MIXTURE),
        "prompts with one": curve(metrics.ACCEPTED_PROMPTS),
    }
    distances = {"KL(q‖θ)": curve(metrics.KL_THETA), "KL(q‖t)": curve(metrics.KL_TEACHER)}
    sizes, alpha = {"of the mixture's tokens": curve(metrics.SAMPLE_SIZE)}, curve(metrics.ALPHA_MEAN)
    band = curve(*metrics.ALPHA_BAND)
    shown: list[tuple[str, Mapping[str, Sequence[tuple[float, ...]]]]] = [
        (label, {name: points for name, points in curves.items() if points})
        for label, curves in (
            ("Mean reward", rewards),
            ("Share accepted", accepted),
            ("α", {"": alpha}),
            ("ESS ÷ tokens", sizes),
        )
    ]
    shown.append(("Nats a token", {name: points for name, points in distances.items() if points}))
    shown = [(label, curves) for label, curves in shown if curves]
    if not shown:
        raise ValueError(
            f"draw_training found no metric of the mixture in the log, such as {metrics.ALPHA_MEAN!r}; pass "
            "`trainer.state.log_history` of one of this package's trainers."
        )
    figure, panels = _empty_figure([2.2] * len(shown))
    for panel, (label, curves) in zip(panels, shown, strict=True):
        if label == "α":
            _draw_alpha(panel, alpha, band or None, BAND_LABEL)
        else:
            _draw_curves(panel, curves, label)
    _finish(figure, panels, "Training step", None)
    return figure


def plot_tokens(path: str | os.PathLike[str], rollouts: Sequence[Rollout]) -> Path:
    """Write `draw_tokens` as a PNG, make its folder, and return its path.

    Example:
        ```python
        with OptimalSamplingV1(model_teacher="large", model_theta="small") as sampler:
            plot_tokens("output/tokens.png", sampler.generate(["3 + 4 ="], n=8, max_tokens=8).rollouts)
        ```
    """
    return _write(path, draw_tokens(rollouts))


def draw_tokens(rollouts: Sequence[Rollout]) -> Any:
    """Draw α by position in the completion, mean and 10 % to 90 %, above the number of completions that are so long.

    Raises:
        ImportError: where matplotlib is not installed.
        ValueError: where no rollout has a token.
    """
    longest = max((len(rollout.completion_ids) for rollout in rollouts), default=0)
    if not longest:
        raise ValueError("draw_tokens got no rollout with a token; pass at least one.")
    alpha = np.full((len(rollouts), longest), np.nan)  # (N, T)
    for row, rollout in enumerate(rollouts):
        alpha[row, : len(rollout.alpha)] = rollout.alpha
    places = range(1, longest + 1)
    low, high = np.nanquantile(alpha, [0.1, 0.9], axis=0).tolist()
    count = (~np.isnan(alpha)).sum(0).tolist()
    figure, panels = _empty_figure([3.0, 1.5])
    band = list(zip(places, low, high, strict=True))
    _draw_alpha(panels[0], list(zip(places, np.nanmean(alpha, axis=0).tolist(), strict=True)), band, "10 % to 90 %")
    panels[1].step(places, count, where="mid", color=PALETTE[0], linewidth=1.8, label="completions")
    panels[1].set_ylim(bottom=0)
    panels[1].set_ylabel("Completions")
    _finish(figure, panels, "Position in the completion (tokens)", None)
    return figure


def _empty_figure(heights: Sequence[float]) -> tuple[Any, Any]:
    """Make a figure of panels below one another with one x; `heights` are in inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Figures are drawn with matplotlib, which is missing; run `pip install 'optimal-sampling-trl[plots]'`."
        ) from error
    figure = Figure(figsize=(9.0, sum(heights)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]


def _finish(figure: Any, panels: Any, x_label: str, title: str | None) -> None:
    panels[-1].set_xlabel(x_label)
    for panel in panels:
        panel.grid(color="#dddddd", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        # Outside of the axes, so that no curve is hidden.
        panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False)
    if title is not None:
        figure.suptitle(title)


def _write(path: str | os.PathLike[str], figure: Any) -> Path:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(Path(path), image.getvalue())
    return Path(path)


def _draw_curves(panel: Any, curves: Mapping[str, Sequence[tuple[float, ...]]], y_label: str) -> None:
    for place, (name, points) in enumerate(curves.items()):
        x, y = _columns(f"curve {name!r}", points, 2)
        color, marker = PALETTE[place % len(PALETTE)], MARKERS[place % len(MARKERS)]
        style, every = STYLES[place // len(PALETTE) % len(STYLES)], max(1, len(x) // MARKERS_PER_CURVE)
        panel.plot(x, y, style, label=name, color=color, marker=marker, markersize=4, markevery=every, linewidth=1.8)
    panel.set_ylabel(y_label)
    panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))


def _draw_alpha(panel: Any, alpha: Sequence[Any], band: Sequence[Any] | None, band_label: str) -> None:
    x, mean = _columns("alpha", alpha, 2)
    panel.plot(x, mean, color=PALETTE[0], linewidth=1.8, label="mean α")
    if band is not None:
        x, low, high = _columns("alpha_band", band, 3)
        panel.fill_between(x, low, high, color=PALETTE[0], alpha=0.2, linewidth=0, label=band_label)
    panel.set_ylim(-0.03, 1.03)
    panel.set_ylabel("α (0 student, 1 teacher)")


def _columns(name: str, points: Sequence[Sequence[float]], width: int) -> list[list[float]]:
    """Split points of `width` numbers into as many lists.

    Raises:
        ValueError: on no points, or a point of another length.
    """
    if len(points) == 0:
        raise ValueError(f"{name} has no points; leave it out, or pass at least one.")
    for place, point in enumerate(points):
        if len(point) != width:
            raise ValueError(f"{name}: point {place} has {len(point)} numbers, wanted {width}.")
    return [[float(point[column]) for point in points] for column in range(width)]
