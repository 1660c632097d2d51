"""Line plots in one style, drawn with matplotlib (extra ``plot``)."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vssm.files import atomic_path

# Okabe and Ito's colours, which stay apart for colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
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
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise ValueError(f"line_plot: expected a file name ending in {', '.join(_FORMATS)}, got {str(path)!r}")
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
        style: dict[str, Any] = {"color": _COLOURS[index % len(_COLOURS)], "marker": "o", "markersize": 3}
        if label in dashed:
            style = {"color": "#777777", "marker": "_", "linestyle": _BROKEN[list(dashed).index(label) % len(_BROKEN)]}
        axes.plot(x, y, label=label, linewidth=1.5, **style)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if crowded:
        figure.legend(loc="outside right upper", frameon=False)
    else:
        axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=suffix[1:], dpi=150)


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
