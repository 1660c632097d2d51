"""Pictures of scan orders: the path of each direction over the grid, with arrows, coloured from start to end."""

import os
from typing import Any

import numpy as np

from vssm.engine.plot import new_figure
from vssm.files import atomic_path
from vssm.scan_order import scan_order

_LARGEST_SIDE = 64  # beyond it, arrows are smaller than what a page resolves
_INCHES_PER_TOKEN, _SMALLEST_PANEL, _LARGEST_PANEL = 0.32, 1.2, 4.0

# Sizes in tokens.
_DOT, _MARK = 0.13, 0.21  # radius of a token's dot, and of the larger disc and square at the first and last step
_CLEARANCE = 0.25  # distance of arrows from the centres of their tokens
_STEP_WIDTH, _JUMP_WIDTH = 0.08, 0.03  # shafts to a neighbour and to a token farther away
_HEAD = 0.26

_INK = "#262626"


def draw_scan_order(
    path: str | os.PathLike, name: str, height: int, width: int, *, window: int | None = None
) -> dict[str, object]:
    """Draws one panel a direction of a scan order and writes the picture, whole or not at all.

    Args:
        path: Target; its suffix chooses the format (.png, .svg, .pdf).
        name: Scan order, one of `vssm.scan_order.BUILDERS`.
        height: Rows of the grid, 1 to 64.
        width: Columns of the grid, 1 to 64.
        window: Side of the windows, for the order ``"window"``.

    Returns:
        What was drawn: picture, order, window, height, width and the number of directions.

    Raises:
        ValueError: If the order is unknown, the grid empty or too large to be drawn, or matplotlib missing.
    """
    order = scan_order(name, height, width, "cpu", window=window).numpy()
    if max(height, width) > _LARGEST_SIDE:
        raise ValueError(
            f"draw_scan_order: expected a grid of at most {_LARGEST_SIDE}x{_LARGEST_SIDE} tokens, which a page can "
            f"show, got {height}x{width}"
        )
    figure, panels = _new_panels(len(order), height, width)
    for direction, (axes, tokens) in enumerate(zip(panels, order, strict=True)):
        axes.set_title(f"direction {direction}", fontsize=9, color=_INK)
        _draw_cells(axes, height, width)
        _draw_path(axes, np.stack([tokens % width, tokens // width]).astype(float))
    _add_legend(figure, panels)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=200, bbox_inches="tight", pad_inches=0.05)
    return {
        "picture": os.fspath(path),
        "order": name,
        "window": window,
        "height": height,
        "width": width,
        "directions": len(order),
    }


def _new_panels(count: int, height: int, width: int) -> tuple[Any, list[Any]]:
    """A figure with its panels side by side, or below each other where the grid is wide."""
    longest = max(height, width)
    scale = min(max(_INCHES_PER_TOKEN * longest, _SMALLEST_PANEL), _LARGEST_PANEL) / longest
    columns = 1 if width > 2 * height else count
    rows = count // columns
    figure = new_figure(width=max(columns * (scale * width + 0.25), 3.0), height=rows * (scale * height + 0.3) + 0.45)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set(aspect="equal", xlim=(-0.55, width - 0.45), ylim=(height - 0.45, -0.55))
        axes.set_axis_off()
    return figure, panels


def _draw_cells(axes: Any, height: int, width: int) -> None:
    style = {"color": "#D9D9D9", "linewidth": 0.6, "zorder": 0}
    axes.hlines([row - 0.5 for row in range(height + 1)], -0.5, width - 0.5, **style)
    axes.vlines([column - 0.5 for column in range(width + 1)], -0.5, height - 0.5, **style)


def _draw_path(axes: Any, cells: np.ndarray) -> None:
    """Draws an arrow a step and a dot a token, larger at the first (disc) and the last (square).

    Arrows to a token farther away than a neighbour are thin, with the head in their middle: at their end it would
    cover the first step of the next row or window.

    Args:
        axes: Panel.
        cells: Column and row of the token at each step (2, l).
    """
    colours = _colour_map()(np.linspace(0, 1, cells.shape[1]))
    vectors = np.diff(cells)
    lengths = np.hypot(*vectors)
    tails = cells[:, :-1] + _CLEARANCE * vectors / lengths
    shafts = (1 - 2 * _CLEARANCE / lengths) * vectors
    near, far = lengths == 1, lengths > 1
    to_middle = (0.5 + 0.5 * _HEAD / lengths[far]) * shafts[:, far]
    _draw_arrows(axes, tails[:, near], shafts[:, near], colours[:-1][near], width=_STEP_WIDTH, head=_HEAD)
    _draw_arrows(axes, tails[:, far], shafts[:, far], colours[:-1][far], width=_JUMP_WIDTH, head=0)
    _draw_arrows(axes, tails[:, far], to_middle, colours[:-1][far], width=_JUMP_WIDTH, head=_HEAD)
    _draw_dots(axes, cells, colours)


def _draw_arrows(
    axes: Any, tails: np.ndarray, shafts: np.ndarray, colours: np.ndarray, *, width: float, head: float
) -> None:
    """Draws arrows of given tails and shafts (2, arrows); widths and heads in tokens."""
    in_tokens = {"angles": "xy", "units": "xy", "scale_units": "xy", "scale": 1}
    heads = {"headwidth": head / width, "headlength": head / width, "headaxislength": head / width}
    axes.quiver(*tails, *shafts, color=colours, width=width, minlength=0, **heads, **in_tokens)


def _draw_dots(axes: Any, cells: np.ndarray, colours: np.ndarray) -> None:
    from matplotlib.patches import Circle, Rectangle

    for cell, colour in zip(cells.T, colours, strict=True):
        axes.add_patch(Circle(tuple(cell), _DOT, color=colour, linewidth=0))
    ends = {"edgecolor": _INK, "linewidth": 1.0, "zorder": 3}
    axes.add_patch(Rectangle(tuple(cells[:, -1] - _MARK), 2 * _MARK, 2 * _MARK, facecolor=colours[-1], **ends))
    axes.add_patch(Circle(tuple(cells[:, 0]), _MARK, facecolor=colours[0], **ends))


def _add_legend(figure: Any, panels: list[Any]) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(
        ScalarMappable(cmap=_colour_map()), ax=panels, location="bottom", fraction=0.05, aspect=30, shrink=0.6, pad=0.02
    )
    bar.set_ticks([0, 1], labels=["● first step", "■ last step"], fontsize=8, color=_INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _colour_map() -> Any:
    """Viridis without its last tenth, a yellow too pale for white paper."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, 256)))
