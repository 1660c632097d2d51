"""Between tokens and the maps that convolutions see, and between sizes of maps."""

import torch
import torch.nn.functional as F
from torch import Tensor


def to_maps(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (b, l, c) in raster order of a grid ``size`` = (h, w) as maps (b, c, h, w), a channels-last view."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """Maps (b, c, h, w) as tokens (b, h·w, c) in raster order."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def pad_or_crop(grid: Tensor, height: int, width: int) -> Tensor:
    """A map (b, h, w, c) with zeros added, or cells left out, at the right and bottom."""
    missing = height - grid.shape[1], width - grid.shape[2]
    if not torch.compiler.is_exporting() and missing == (0, 0):  # an exported program must take either way
        return grid
    return F.pad(grid, (0, 0, 0, missing[1], 0, missing[0]))
