"""Pictures of scan orders: the path of each direction over a grid or an image, with arrows, coloured by time."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from vssm.engine.plot import new_figure, save_figure
from vssm.engine.sight import backdrop
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
_OPACITY = 0.45  # of the colours of time over an image


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
    _check_side("draw_scan_order", height, width)
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


def draw_paths(
    path: str | os.PathLike, times: Sequence[np.ndarray], *, image: np.ndarray | None = None, title: str = ""
) -> dict[str, object]:
    """Draws one panel a direction: arrows from patch to patch, and each patch in the colour of its time.

    Args:
        path: Target, ending in .png, .svg or .pdf.
        times: For each direction the step at which a patch is visited (h, w), as `visit_times` gives it.
        image: Colours (H, W, 3) from 0 to 1, which lie under the path; white paper when not given.
        title: Heading; none when empty.

    Returns:
        What was drawn: ``picture``, ``directions`` and ``steps``, the number of patches that each visits.

    Raises:
        ValueError: A grid is too large to be drawn, matplotlib is missing, or the format is unknown.
    """
    height, width = times[0].shape
    _check_side("draw_paths", height, width)
    figure, panels = _new_panels(len(times), height, width)
    figure.suptitle(title, fontsize=9, color=_INK)
    for direction, (axes, table) in enumerate(zip(panels, times, strict=True)):
        rows, columns = table.shape
        axes.set_title(f"direction {direction}", fontsize=9, color=_INK)
        axes.set(xlim=(-0.55, columns - 0.45), ylim=(rows - 0.45, -0.55))
        if image is not None:
            extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
            axes.imshow(
                backdrop(image), cmap="gray", vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest"
            )
        _draw_times(axes, table)
        axes.set_aspect(1 if image is None else image.shape[0] / rows / (image.shape[1] / columns))
    _add_legend(figure, panels)
    save_figure(figure, path, dpi=300)
    return {"picture": os.fspath(path), "directions": len(times), "steps": [int((each >= 0).sum()) for each in times]}


def _draw_times(axes: Any, table: np.ndarray) -> None:
    rows, columns = table.shape
    relative = np.ma.masked_less(table, 0) / max(int(table.max()), 1)
    axes.imshow(relative, cmap=_colour_map(), vmin=0, vmax=1, alpha=_OPACITY, aspect="auto", interpolation="nearest")
    _draw_cells(axes, rows, columns)
    tokens = np.argsort(table, axis=None)[(table < 0).sum() :]
    _draw_path(axes, np.stack([tokens % columns, tokens // columns]).astype(float), inked=True)


def _check_side(function: str, height: int, width: int) -> None:
    if max(height, width) > _LARGEST_SIDE:
        raise ValueError(
            f"{function}: expected a grid of at most {_LARGEST_SIDE}x{_LARGEST_SIDE} tokens, which a page can "
            f"show, got {height}x{width}"
        )


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


def _draw_path(axes: Any, cells: np.ndarray, *, inked: bool = False) -> None:
    """Draws an arrow a step and a dot a token, larger at the first (disc) and the last (square).

    Arrows to a token farther away than a neighbour are thin, with the head in their middle: at their end it would
    cover the first step of the next row or window.

    Args:
        axes: Panel.
        cells: Column and row of the token at each step (2, l).
        inked: Arrows and dots are dark, over tokens that have the colours of time; else they have these themselves.
    """
    from matplotlib.colors import to_rgba

    times = _colour_map()(np.linspace(0, 1, cells.shape[1]))
    colours = np.broadcast_to(to_rgba(_INK), times.shape) if inked else times
    vectors = np.diff(cells)
    lengths = np.hypot(*vectors)
    tails = cells[:, :-1] + _CLEARANCE * vectors / lengths
    shafts = (1 - 2 * _CLEARANCE / lengths) * vectors
    near, far = lengths == 1, lengths > 1
    to_middle = (0.5 + 0.5 * _HEAD / lengths[far]) * shafts[:, far]
    _draw_arrows(axes, tails[:, near], shafts[:, near], colours[:-1][near], width=_STEP_WIDTH, head=_HEAD)
    _draw_arrows(axes, tails[:, far], shafts[:, far], colours[:-1][far], width=_JUMP_WIDTH, head=0)
    _draw_arrows(axes, tails[:, far], to_middle, colours[:-1][far], width=_JUMP_WIDTH, head=_HEAD)
    _draw_dots(axes, cells, colours, ends=(times[0], times[-1]))


def _draw_arrows(
    axes: Any, tails: np.ndarray, shafts: np.ndarray, colours: np.ndarray, *, width: float, head: float
) -> None:
    """Draws arrows of given tails and shafts (2, arrows); widths and heads in tokens."""
    in_tokens = {"angles": "xy", "units": "xy", "scale_units": "xy", "scale": 1}
    heads = {"headwidth": head / width, "headlength": head / width, "headaxislength": head / width}
    axes.quiver(*tails, *shafts, color=colours, width=width, minlength=0, **heads, **in_tokens)


def _draw_dots(axes: Any, cells: np.ndarray, colours: np.ndarray, *, ends: tuple[np.ndarray, np.ndarray]) -> None:
    from matplotlib.patches import Circle, Rectangle

    for cell, colour in zip(cells.T, colours, strict=True):
        axes.add_patch(Circle(tuple(cell), _DOT, color=colour, linewidth=0))
    style = {"edgecolor": _INK, "linewidth": 1.0, "zorder": 3}
    axes.add_patch(Rectangle(tuple(cells[:, -1] - _MARK), 2 * _MARK, 2 * _MARK, facecolor=ends[1], **style))
    axes.add_patch(Circle(tuple(cells[:, 0]), _MARK, facecolor=ends[0], **style))


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
