"""Effective receptive fields: how much each pixel moves the centre of a model's last map."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vssm.engine.plot import new_figure, save_figure
from vssm.engine.sight import last_map

_PANEL, _DPI = 1.9, 300  # inches, dots per inch
_FLOOR = 1e-4  # of the largest value: what is less is drawn as this
_SHARE = 0.5  # of the field, within the square of which the area is told


def effective_receptive_field(model: nn.Module, images: Tensor) -> Tensor:
    """The gradient of the centre of a model's last map with respect to its input, in absolute value.

    The centre is the sum over channels of the map's cell (⌊h/2⌋, ⌊w/2⌋), before the last norm, under which that sum
    would be constant.

    Args:
        model: In evaluation mode.
        images: (b, c, H, W), normalised as the model expects them.

    Returns:
        Means over images and their channels, (H, W).

    Raises:
        ValueError: The model makes no maps, or their centre does not depend on the images.

    Reference:
        Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", NeurIPS 2016,
        https://arxiv.org/abs/1701.04128; over several images as Ding et al., "Scaling Up Your Kernels to 31×31",
        CVPR 2022, https://arxiv.org/abs/2203.06717
    """
    total = images.new_zeros(images.shape[-2:])
    for image in images.split(1):  # one at a time, for their graphs may be large
        pixels = image.detach().clone().requires_grad_()
        maps = last_map(model, pixels)
        centre = maps[0, :, maps.shape[2] // 2, maps.shape[3] // 2].sum()
        total += torch.autograd.grad(centre, pixels)[0].abs().mean((0, 1))
    if not total.max() > 0:
        raise ValueError(
            f"effective_receptive_field: expected a centre of the last map that depends on the images, its gradient is "
            f"{total.max():g} at most"
        )
    return total / len(images)


def area_share(field: Tensor, share: float) -> float:
    """The area of the smallest square around an image's centre that holds a share of a field, over the whole area.

    Args:
        field: (H, W).
        share: Of the sum of the field, from 0 to 1.

    Returns:
        From 1/(H·W) to 1; parts of the square outside of the image do not count.

    Reference:
        Ding et al., 2022, who give it as the ratio r for a share t.
    """
    height, width = field.shape
    row, column = height // 2, width // 2
    sums = nn.functional.pad(field.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    for reach in range(max(height, width)):
        top, bottom = max(row - reach, 0), min(row + reach + 1, height)
        left, right = max(column - reach, 0), min(column + reach + 1, width)
        inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        if inside >= share * sums[-1, -1]:
            return (bottom - top) * (right - left) / (height * width)
    return 1.0


def draw_receptive_fields(path: str | os.PathLike, titles: Sequence[str], fields: Sequence[Tensor]) -> dict[str, Any]:
    """Draws receptive fields beside each other, each relative to its largest value, on one logarithmic scale.

    Args:
        path: Target, ending in .png, .svg or .pdf.
        titles: What stands above each.
        fields: From `effective_receptive_field`, (H, W) each.

    Returns:
        What was drawn: ``picture``, ``titles`` and ``half_area``, for each the share of the image's area of the square
        that holds half of the field.

    Raises:
        ValueError: matplotlib is missing, or the format is unknown.
    """
    figure = new_figure(width=_PANEL * len(fields) + 0.8, height=_PANEL + 0.6)
    from matplotlib.colors import LogNorm

    panels = figure.subplots(1, len(fields), squeeze=False)[0]
    areas = [area_share(field, _SHARE) for field in fields]
    drawn: Any = None
    for axes, title, field, area in zip(panels, titles, fields, areas, strict=True):
        relative = np.maximum((field / field.max()).numpy(), _FLOOR)
        drawn = axes.imshow(relative, norm=LogNorm(_FLOOR, 1), cmap="viridis", interpolation="nearest")
        axes.set_title(title, fontsize=8)
        axes.set_xlabel(f"half within {area:.1%} of the area", fontsize=7)
        axes.tick_params(labelsize=6)
        axes.locator_params(integer=True, nbins=5)
    panels[0].set_ylabel("pixels", fontsize=7)
    bar = figure.colorbar(drawn, ax=panels, shrink=0.8, pad=0.02, extend="min")
    bar.set_label("mean |∂ centre of last map / ∂ pixel|,\nrelative to the largest", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    save_figure(figure, path, dpi=_DPI)
    return {"picture": os.fspath(path), "titles": list(titles), "half_area": areas}
