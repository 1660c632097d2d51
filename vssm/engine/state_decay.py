"""How much of what a token gave to the state is left of it later along its path."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vssm.engine.plot import COLOURS, new_figure, save_figure
from vssm.engine.scan_paths import ScanPath
from vssm.engine.sight import Sight, backdrop

_PANEL, _DPI = 2.0, 300  # inches, dots per inch
_FLOOR = 1e-3  # what is less is drawn as this
_OPACITY = 0.85


def share_left(step: Tensor, A: Tensor, start: int) -> Tensor:
    """The share of the input of one step that the state still holds at that step and at each later one.

    At step s it is Π_{start < j ≤ s} exp(step_j·A), averaged over channels and states.

    Args:
        step: Step sizes (t, d).
        A: State matrix (d, n), not above 0.
        start: The step whose input is followed, from 0.

    Returns:
        (t − start,), of which the first is 1.
    """
    later = step[start + 1 :].cumsum(0)
    passed = torch.cat([torch.zeros_like(step[:1]), later])  # (t − start, d)
    return (passed[:, :, None] * A).exp().mean((1, 2))


def decay_map(path: ScanPath, patch: int) -> Tensor:
    """The share of a patch's input that is left in the state at each patch of a path.

    Args:
        path: A direction.
        patch: Number of the patch that is followed, in raster order.

    Returns:
        (h, w), in the dtype of the steps; NaN where the path does not go after that patch.

    Raises:
        ValueError: The path does not visit the patch.
    """
    start = _start(path, patch)
    cells = path.cells[start:]
    visited = cells >= 0
    left = torch.full((path.size[0] * path.size[1],), torch.nan, dtype=path.step.dtype)
    left[cells[visited]] = share_left(path.step, path.A, start)[visited]
    return left.unflatten(0, path.size)


def half_life(path: ScanPath, patch: int) -> int | None:
    """Steps after which less than half of a patch's input is left; None if the path ends before."""
    below = (share_left(path.step, path.A, _start(path, patch)) < 0.5).nonzero()
    return int(below[0]) if len(below) else None


def draw_decay(
    file: str | os.PathLike, sight: Sight, paths: Sequence[ScanPath], *, token: tuple[int, int] | None, title: str
) -> dict[str, Any]:
    """Draws how much of a token's input is left in the state, over the image for each direction, and against steps.

    Args:
        file: Target, ending in .png, .svg or .pdf.
        sight: The image.
        paths: Directions of a block.
        token: Row and column of the token in the grid of the first path; its centre when not given.
        title: Heading.

    Returns:
        What was drawn: ``picture``, ``token`` and, for each path, ``half_life`` in steps, None where the path ends
        before.

    Raises:
        ValueError: There is no such token, matplotlib is missing, or the format is unknown.
    """
    rows, columns = paths[0].size
    row, column = token or (rows // 2, columns // 2)
    if not (0 <= row < rows and 0 <= column < columns):
        raise ValueError(f"draw_decay: expected a token from 0,0 to {rows - 1},{columns - 1}, got {row},{column}")
    patches = [_same_place((row, column), paths[0].size, path.size) for path in paths]
    figure = new_figure(width=_PANEL * len(paths) + 3.2, height=_PANEL + 0.55)
    from matplotlib.colors import LogNorm

    *panels, curves = figure.subplots(1, len(paths) + 1, gridspec_kw={"width_ratios": [1.0] * len(paths) + [1.3]})
    figure.suptitle(title, fontsize=8)
    drawn: Any = None
    for direction, (axes, path, patch) in enumerate(zip(panels, paths, patches, strict=True)):
        drawn = _draw_over(axes, sight, decay_map(path, patch).numpy(), patch=patch, norm=LogNorm(_FLOOR, 1))
        axes.set_title(f"direction {direction}", fontsize=7)
        left = share_left(path.step, path.A, _start(path, patch)).numpy()
        curves.semilogy(left, color=COLOURS[direction % len(COLOURS)], linewidth=1, label=f"{direction}")
    bar = figure.colorbar(drawn, ax=panels, shrink=0.8, pad=0.02, extend="min")
    bar.set_label("share of the input left in the state", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    _label_curves(curves)
    save_figure(figure, file, dpi=_DPI)
    lives = [half_life(path, patch) for path, patch in zip(paths, patches, strict=True)]
    return {"picture": os.fspath(file), "token": [row, column], "half_life": lives}


def _start(path: ScanPath, patch: int) -> int:
    steps = (path.cells == patch).nonzero()
    if not len(steps):
        raise ValueError(f"decay_map: expected a patch that the path visits, got {patch}")
    return int(steps[0])


def _same_place(cell: tuple[int, int], size: tuple[int, int], other: tuple[int, int]) -> int:
    """The number of the patch of another grid of the same image where a cell of this one is."""
    row, column = (place * theirs // ours for place, ours, theirs in zip(cell, size, other, strict=True))
    return row * other[1] + column


def _draw_over(axes: Any, sight: Sight, left: np.ndarray, *, patch: int, norm: Any) -> Any:
    from matplotlib.patches import Rectangle

    rows, columns = left.shape
    height, width = sight.colours.shape[:2]
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    grey = backdrop(sight.colours)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    drawn = axes.imshow(np.maximum(left, _FLOOR), cmap="viridis", norm=norm, alpha=_OPACITY, interpolation="nearest")
    row, column = divmod(patch, columns)
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#D55E00", linewidth=1.2))
    axes.set(aspect=(height / rows) / (width / columns))
    axes.set_axis_off()
    return drawn


def _label_curves(axes: Any) -> None:
    axes.set_xlabel("steps along the path", fontsize=7)
    axes.set_ylabel("share left", fontsize=7)
    axes.set_ylim(_FLOOR, 1.2)
    axes.tick_params(labelsize=6)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="direction", title_fontsize=6, fontsize=6, frameon=False)
