"""Figures of a training run: success of several runs above, α of the mixture below. matplotlib is an extra."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .page import write_atomically

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito's colours, distinct under every form of colour blindness, without the yellow that white swallows."""
MARKERS = "os^Dvp*"
STYLES = ("-", "--", "-.", ":")
MARKERS_PER_CURVE = 25


def plot_learning(
    path: str | os.PathLike[str],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    alpha: Sequence[tuple[float, float]] | None = None,
    alpha_band: Sequence[tuple[float, float, float]] | None = None,
    *,
    x_label: str = "Training step",
    y_label: str = "Success rate (share of samples)",
    band_label: str = "10 % to 90 % of tokens",
    title: str | None = None,
) -> Path:
    """Draws the success of several runs and, below on the same x, α over training; writes a PNG and returns its path.

    Nothing global is touched: neither matplotlib's backend nor `pyplot`'s list of figures.

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
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_learning draws with matplotlib, which is missing; run `pip install 'optimal-sampling-trl[plots]'`."
        ) from error

    if not curves:
        raise ValueError("plot_learning got no curves; pass at least one run as {name: [(x, success), ...]}.")
    if alpha is None and alpha_band is not None:
        raise ValueError("alpha_band was passed without alpha; pass the mean as well, the band is drawn round it.")

    figure = Figure(figsize=(9.0, 4.0 if alpha is None else 6.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    rows = 1 if alpha is None else 2
    panels = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=[2, 1][:rows])[:, 0]
    _draw_success(panels[0], curves, y_label)
    if alpha is not None:
        _draw_alpha(panels[1], alpha, alpha_band, band_label)
    panels[-1].set_xlabel(x_label)
    for panel in panels:
        panel.grid(color="#dddddd", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        # Outside of the axes, so that no curve is hidden.
        panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False)
    if title is not None:
        figure.suptitle(title)

    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(Path(path), image.getvalue())
    return Path(path)


def _draw_success(panel: Any, curves: Mapping[str, Sequence[tuple[float, float]]], y_label: str) -> None:
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
