"""Plots in one style, drawn with matplotlib (extra ``plot``)."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vssm.files import atomic_path

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_LEGEND_INSIDE = 4  # series; with more, the legend would cover the lines
_BROKEN = ("--", ":", "-.")
_FORMATS = (".png", ".svg", ".pdf")


def line_plot(
    path: str | os.PathLike,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    logx: bool = False,
    logy: bool = False,
    dashed: Collection[str] = (),
) -> None:
    """Draws one line per series and writes the picture, whole or not at all.

    Args:
        path: Target, ending in .png, .svg or .pdf.
        series: Label to (x values, y values).
        xlabel: Name and unit of the x axis.
        ylabel: Name and unit of the y axis.
        title: Heading.
        logx: Logarithmic x axis.
        logy: Logarithmic y axis.
        dashed: Labels of series that are no measurements: grey broken lines.

    Raises:
        ValueError: matplotlib is missing, the format is unknown, or a series has not as many y as x values.
    """
    _check_format(path)
    crowded = len(series) > _LEGEND_INSIDE
    figure = new_figure(width=8.4 if crowded else 6.4, height=4.0)
    axes = figure.add_subplot(
        title=title,
        xlabel=xlabel,
        ylabel=ylabel,
        xscale="log" if logx else "linear",
        yscale="log" if logy else "linear",
    )
    for index, (label, (x, y)) in enumerate(series.items()):
        if len(x) != len(y):
            raise ValueError(f"line_plot: expected as many y as x values for {label!r}, got {len(y)} and {len(x)}")
        style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": "o", "markersize": 3}
        if label in dashed:
            style = {"color": "#777777", "marker": "_", "linestyle": _BROKEN[list(dashed).index(label) % len(_BROKEN)]}
        axes.plot(x, y, label=label, linewidth=1.5, **style)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if crowded:
        figure.legend(loc="outside right upper", frameon=False)
    else:
        axes.legend(frameon=False)
    save_figure(figure, path)


@dataclass(frozen=True)
class Bar:
    """One bar.

    Args:
        label: What stands beside it.
        value: Its length.
        low: Where its error bar begins.
        high: Where its error bar ends.
        group: What the colour tells.
    """

    label: str
    value: float
    low: float
    high: float
    group: str


def bar_plot(
    path: str | os.PathLike,
    panels: Mapping[str, Sequence[Bar]],
    *,
    groups: Sequence[str],
    xlabel: str,
    title: str,
) -> None:
    """Draws panels of horizontal bars, from top to bottom, and writes the picture, whole or not at all.

    Args:
        path: Target, ending in .png, .svg or .pdf.
        panels: Heading to bars; the panels have axes of their own.
        groups: All groups of bars, in the order of their colours.
        xlabel: Name and unit of the x axis.
        title: Heading of all.

    Raises:
        ValueError: matplotlib is missing, or the format is unknown.
    """
    _check_format(path)
    rows = max(len(bars) for bars in panels.values())
    figure = new_figure(width=2.4 + 4.2 * len(panels), height=1.6 + 0.34 * rows)
    figure.suptitle(title, fontsize="medium")
    for place, (heading, bars) in enumerate(panels.items(), start=1):
        _draw_bars(figure.add_subplot(1, len(panels), place, xlabel=xlabel, title=heading), bars, groups)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower right", ncols=len(labels), frameon=False)
    save_figure(figure, path)


def _draw_bars(axes: Any, bars: Sequence[Bar], groups: Sequence[str]) -> None:
    for group, colour in zip(groups, COLOURS, strict=False):
        rows = [row for row, bar in enumerate(bars) if bar.group == group]
        if not rows:
            continue
        values = [bars[row].value for row in rows]
        spread = [[bars[row].value - bars[row].low for row in rows], [bars[row].high - bars[row].value for row in rows]]
        drawn = axes.barh(rows, values, xerr=spread, label=group, height=0.7, color=colour, ecolor="#444444", capsize=2)
        axes.bar_label(
            drawn, labels=[f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values], padding=4
        )
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.margins(x=0.16)
    axes.grid(axis="x", alpha=0.3, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Any, path: str | os.PathLike, *, dpi: int = 150) -> None:
    """Writes a figure, whole or not at all.

    Args:
        figure: From `new_figure`.
        path: Target, ending in .png, .svg or .pdf.
        dpi: Pixels per inch.

    Raises:
        ValueError: The format is unknown.
    """
    suffix = _check_format(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=suffix[1:], dpi=dpi)


def _check_format(path: str | os.PathLike) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise ValueError(f"plot: expected a file name ending in {', '.join(_FORMATS)}, got {str(path)!r}")
    return suffix


def new_figure(*, width: float, height: float):
    """An empty matplotlib figure that no window system and no global state knows of.

    Args:
        width: In inches.
        height: In inches.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('plots need matplotlib, which is not installed: pip install "vssm[plot]"') from None
    return Figure(figsize=(width, height), layout="constrained")
