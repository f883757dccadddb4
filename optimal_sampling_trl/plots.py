"""Figures of training runs and of rollouts: success, α, effective sample size, divergences. matplotlib is an extra.

`plot_*` write a PNG and return its path, `draw_*` return a matplotlib `Figure`, which a logger or a notebook takes.
Nothing global is touched: neither matplotlib's backend nor `pyplot`'s list of figures.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .page import write_atomically
from .rollouts.rollout import Rollout

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito's colours, distinct under every form of colour blindness, without the yellow that white swallows."""
MARKERS = "os^Dvp*"
STYLES = ("-", "--", "-.", ":")
MARKERS_PER_CURVE = 25
MOST_VALUES = 2**24
"""`Tensor.nanquantile` refuses more at once."""
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
    """Draws the success of several runs and, below on the same x, α over training; writes a PNG and returns its path.

    Args:
        path (`str` or `os.PathLike`):
            File to write, a PNG whatever its name. Its folder is made; an existing file is replaced at once.
        curves (`Mapping[str, Sequence[tuple[float, float]]]`):
            Points (x, success) of each run by name, in the order of the legend. A NaN leaves a gap.
        alpha (`Sequence[tuple[float, float]]`, *optional*):
            Points (x, mean α); without them there is no lower panel.
        alpha_band (`Sequence[tuple[float, float, float]]`, *optional*):
            Points (x, low, high): the quantiles of α that `band_label` names, drawn as a band.
        x_label, y_label, band_label (`str`, *optional*):
            What the axes and the band show, with the unit.
        title (`str`, *optional*):
            Heading of the figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No curves, a curve without points, a point of another length, or a band without `alpha`.

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
    """Writes `draw_training` as a PNG, whose folder is made, and returns its path.

    Example:
        ```python
        log = [{"step": 1, "alpha/mean": 0.5}, {"step": 2, "alpha/mean": 0.4}]  # a trainer's `state.log_history`
        plot_training("output/training.png", log)
        ```
    """
    return _write(path, draw_training(log_history))


def draw_training(log_history: Sequence[Mapping[str, Any]]) -> Any:
    """What the trainers log of the mixture, over training: a panel each for what the log holds of

    - the mean reward of the two halves of the groups, the student's own and the mixture's;
    - α, mean and 10 % to 90 % of tokens;
    - the effective sample size of the mixture's tokens for the student, as a share of their number;
    - KL(q‖θ) and KL(q‖t), estimated on the sampled tokens, in nats a token.

    Args:
        log_history: entries as `trainer.state.log_history` holds them, each with a `step`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no entry holds a metric of the mixture.
    """
    logged = [entry for entry in log_history if "step" in entry]

    def curve(*names: str) -> list[tuple[float, ...]]:
        found = [entry for entry in logged if all(entry.get(name) is not None for name in names)]
        return [(entry["step"], *(entry[name] for name in names)) for entry in found]

    rewards = {"the student's own": curve("mixture/reward_theta"), "the mixture's": curve("mixture/reward_mixture")}
    distances = {"KL(q‖θ)": curve("mixture/kl_theta"), "KL(q‖t)": curve("mixture/kl_teacher")}
    sizes, alpha = {"of the mixture's tokens": curve("mixture/ess")}, curve("alpha/mean")
    band = curve("alpha/q10", "alpha/q90")
    shown: list[tuple[str, Mapping[str, Sequence[tuple[float, ...]]]]] = [
        (label, {name: points for name, points in curves.items() if points})
        for label, curves in (("Mean reward", rewards), ("α", {"": alpha}), ("ESS ÷ tokens", sizes))
    ]
    shown.append(("Nats a token", {name: points for name, points in distances.items() if points}))
    shown = [(label, curves) for label, curves in shown if curves]
    if not shown:
        raise ValueError(
            "draw_training found no metric of the mixture in the log, such as 'alpha/mean'; pass "
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
    """Writes `draw_tokens` as a PNG, whose folder is made, and returns its path.

    Example:
        ```python
        with OptimalSamplingV1(model_teacher="large", model_theta="small") as sampler:
            plot_tokens("output/tokens.png", sampler.generate(["3 + 4 ="], n=8, max_tokens=8).rollouts)
        ```
    """
    return _write(path, draw_tokens(rollouts))


def draw_tokens(rollouts: Sequence[Rollout]) -> Any:
    """α by position in the completion, mean and 10 % to 90 %, above how many completions are that long.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no rollout with a token.
    """
    longest = max((len(rollout.completion_ids) for rollout in rollouts), default=0)
    if not longest:
        raise ValueError("draw_tokens got no rollout with a token; pass at least one.")
    alpha = torch.full((len(rollouts), longest), torch.nan, dtype=torch.float64)  # (N, T)
    for row, rollout in enumerate(rollouts):
        alpha[row, : len(rollout.alpha)] = rollout.alpha
    places = range(1, longest + 1)
    shares, columns = torch.tensor([0.1, 0.9], dtype=torch.float64), max(1, MOST_VALUES // len(rollouts))
    low, high = torch.cat([part.nanquantile(shares, dim=0) for part in alpha.split(columns, dim=1)], dim=1).tolist()
    count = (~alpha.isnan()).sum(0).tolist()
    figure, panels = _empty_figure([3.0, 1.5])
    band = list(zip(places, low, high, strict=True))
    _draw_alpha(panels[0], list(zip(places, alpha.nanmean(0).tolist(), strict=True)), band, "10 % to 90 %")
    panels[1].step(places, count, where="mid", color=PALETTE[0], linewidth=1.8, label="completions")
    panels[1].set_ylim(bottom=0)
    panels[1].set_ylabel("Completions")
    _finish(figure, panels, "Position in the completion (tokens)", None)
    return figure


def _empty_figure(heights: Sequence[float]) -> tuple[Any, Any]:
    """A figure of panels below one another with one x, `heights` in inches."""
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
    """`points` as `width` lists of numbers of one length."""
    if len(points) == 0:
        raise ValueError(f"{name} has no points; leave it out, or pass at least one.")
    for place, point in enumerate(points):
        if len(point) != width:
            raise ValueError(f"{name}: point {place} has {len(point)} numbers, wanted {width}.")
    return [[float(point[column]) for point in points] for column in range(width)]
