"""Panels of the figures: curves with bands over seeds, α with its quantiles, one x below one another.

Nothing global is touched: neither matplotlib's backend nor `pyplot`'s list of figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito's colours, distinct under every form of colour blindness, without the yellow that white swallows."""
MARKERS = "os^Dvp*"
"""One for each colour of `PALETTE`, so that a curve keeps its marker in every panel."""
STYLES = ("-", "--", "-.", ":")
MARKERS_PER_CURVE = 25
LONG_LEGEND = 6
"""Entries from which a legend has two columns."""
LEAST_ALPHA = 0.1
"""Range of α that a panel shows at least, so that noise looks like noise."""

Points = Sequence[Sequence[float]]
"""Points (x, y) of one run."""
Curve = Points | Sequence[Points]
"""Points of one run, or of several seeds."""


def empty_figure(heights: Sequence[float]) -> tuple[Any, Any]:
    """Make a figure of panels below one another with one x; `heights` are in inches.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Figures are drawn with matplotlib, which is missing; run `pip install 'optimal-sampling-trl[plots]'`."
        ) from error
    figure = Figure(figsize=(8.0, sum(heights)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]


def finish(figure: Any, panels: Any, x_label: str, title: str | None) -> None:
    """Add what all panels share: grid, legends within them, whole numbers on x where x is whole, and the title."""
    for panel in panels:
        panel.grid(color="#dddddd", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        entries = len(panel.get_legend_handles_labels()[1])
        if entries and panel.get_legend() is None:
            panel.legend(loc="best", ncols=2 if entries >= LONG_LEGEND else 1, fontsize="small", framealpha=0.85)
    panels[-1].set_xlabel(x_label)
    if all(float(x).is_integer() for panel in panels for line in panel.get_lines() for x in line.get_xdata()):
        _count_in_whole_numbers(panels[-1].xaxis)
    if title:
        figure.suptitle(title, fontsize="large", fontweight="bold")


def _count_in_whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def show_percent(axis: Any) -> None:
    """Write shares as per cent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def draw_curves(
    panel: Any,
    curves: Mapping[str, Curve],
    y_label: str,
    colors: Mapping[str, str] | None = None,
    dashed: Sequence[str] = (),
) -> None:
    """Draw curves, each seed's own or their mean in a band from the lowest to the highest.

    Args:
        colors: colours by name, in place of the palette's.
        dashed: names of curves that are drawn with dashes and without markers.
    """
    for place, (name, curve) in enumerate(curves.items()):
        seeds = seeds_of(name, curve)
        x, y = seeds[0][0], np.mean([values for _, values in seeds], axis=0)
        color = (colors or {}).get(name, PALETTE[place % len(PALETTE)])
        marker = MARKERS[PALETTE.index(color) if color in PALETTE else place % len(MARKERS)]
        style = STYLES[place // len(PALETTE) % len(STYLES)]
        if name in dashed:
            style, marker = "--", ""
        every = max(1, len(x) // MARKERS_PER_CURVE)
        label = name if len(seeds) == 1 else f"{name} ({len(seeds)} seeds)"
        panel.plot(x, y, style, label=label, color=color, marker=marker, markersize=4, markevery=every, linewidth=1.8)
        if len(seeds) > 1:
            low, high = (extreme([values for _, values in seeds], axis=0) for extreme in (np.min, np.max))
            panel.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    panel.set_ylabel(y_label)
    panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))


def draw_alpha(panel: Any, alpha: Points, band: Points | None, band_label: str) -> None:
    """Draw the mean of α and its quantiles, on an axis that fits them."""
    x, mean = columns("alpha", alpha, 2)
    panel.plot(x, mean, color=PALETTE[0], linewidth=1.8, label="mean α")
    seen = mean
    if band is not None:
        x, low, high = columns("alpha_band", band, 3)
        panel.fill_between(x, low, high, color=PALETTE[0], alpha=0.2, linewidth=0, label=band_label)
        seen = [*mean, *low, *high]
    lowest, highest = float(np.nanmin(seen)), float(np.nanmax(seen))
    middle, half = (lowest + highest) / 2, max(LEAST_ALPHA / 2, 0.6 * (highest - lowest))
    panel.set_ylim(max(-0.02, middle - half), min(1.02, middle + half))
    panel.set_ylabel("α (0 student,\n1 teacher)")


def seeds_of(name: str, curve: Curve) -> list[list[list[float]]]:
    """Split a curve into one (x, y) for each seed.

    Raises:
        ValueError: on no points, a point of another length, or seeds that were measured at different x.
    """
    many = len(curve) > 0 and len(curve[0]) > 0 and isinstance(curve[0][0], Sequence)
    seeds = [columns(f"curve {name!r}", points, 2) for points in (curve if many else [curve])]  # type: ignore[arg-type]
    for place, (x, _) in enumerate(seeds):
        if x != seeds[0][0]:
            raise ValueError(
                f"curve {name!r}: seed {place} was measured at other x than seed 0; a band needs the same ones. Pass "
                "the points that all seeds have, or each seed as a curve of its own."
            )
    return seeds


def columns(name: str, points: Sequence[Sequence[float]], width: int) -> list[list[float]]:
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
