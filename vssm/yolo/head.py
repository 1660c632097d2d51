"""An anchor-free head that gives each side of a box as a distribution, as YOLOv8 has it."""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from vssm.models.mambayolo import conv_norm_silu


class HeadMaps(NamedTuple):
    """What the head says about the cells of each level, from the finest to the coarsest.

    Attributes:
        classes: Logits (b, num_classes, h_i, w_i).
        sides: Logits (b, 4·bins, h_i, w_i) of the distances to the left, top, right and bottom side of a box, in cells:
            first all bins of the left side.
    """

    classes: list[Tensor]
    sides: list[Tensor]


class CellPredictions(NamedTuple):
    """The same of all levels together, a row for each cell.

    Attributes:
        classes: Logits (b, a, num_classes).
        sides: Logits (b, a, 4, bins).
        centres: Centres (a, 2) of the cells in pixels: x, y.
        strides: Sides (a, 1) of the cells in pixels.
    """

    classes: Tensor
    sides: Tensor
    centres: Tensor
    strides: Tensor

    def boxes(self) -> Tensor:
        """Boxes (b, a, 4): x0, y0, x1, y1 in pixels, each side where its distribution expects it."""
        distances = _expectation(self.sides) * self.strides  # (b, a, 4)
        return torch.cat([self.centres - distances[..., :2], self.centres + distances[..., 2:]], dim=-1)


class YoloHead(nn.Module):
    """Two branches of convolutions on each level: one for the classes, one for the sides of a box.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the maps, from the finest to the coarsest.
        strides: Pixels per cell of each level.
        bins: Distances from 0 to bins − 1 cells that a side can have.

    Reference:
        Jocher et al., "Ultralytics YOLOv8", 2023; Li et al., "Generalized Focal Loss", 2020, section 3.2,
        https://arxiv.org/abs/2006.04388
    """

    def __init__(
        self, num_classes: int, in_channels: Sequence[int], *, strides: Sequence[int] = (8, 16, 32), bins: int = 16
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_channels = list(in_channels)
        self.strides = tuple(strides)
        self.bins = bins
        sides_dim = max(16, in_channels[0] // 4, 4 * bins)
        classes_dim = max(in_channels[0], min(num_classes, 100))
        self.sides = nn.ModuleList(_branch(dim, sides_dim, 4 * bins, bias=1.0) for dim in in_channels)
        self.classes = nn.ModuleList(
            _branch(dim, classes_dim, num_classes, bias=_first_logit(num_classes, stride))
            for dim, stride in zip(in_channels, strides, strict=True)
        )

    def forward(self, maps: Sequence[Tensor]) -> HeadMaps:
        """Reads maps (b, c_i, h_i, w_i), from the finest to the coarsest."""
        classes = [branch(each) for branch, each in zip(self.classes, maps, strict=True)]
        return HeadMaps(classes, [branch(each) for branch, each in zip(self.sides, maps, strict=True)])

    def expected(self, sides: Tensor) -> Tensor:
        """Expected distances (b, 4, h, w) in cells, in float32 at least, of logits (b, 4·bins, h, w)."""
        logits = sides.to(torch.promote_types(sides.dtype, torch.float32))
        return _expectation(logits.unflatten(1, (4, self.bins)).movedim(2, -1))

    def cells(self, maps: HeadMaps) -> CellPredictions:
        """Predictions of all cells, in float32 at least: level by level, each in raster order."""
        classes, sides = (torch.cat([each.flatten(2) for each in kind], dim=2).transpose(1, 2) for kind in maps)
        sides = sides.unflatten(2, (4, self.bins))
        dtype, device = torch.promote_types(sides.dtype, torch.float32), sides.device
        centres, strides = [], []
        for each, stride in zip(maps.sides, self.strides, strict=True):
            rows, columns = (torch.arange(side, dtype=dtype, device=device) + 0.5 for side in each.shape[2:])
            y, x = torch.meshgrid(rows * stride, columns * stride, indexing="ij")
            centres.append(torch.stack([x, y], dim=-1).flatten(0, 1))
            strides.append(torch.full((len(centres[-1]), 1), stride, dtype=dtype, device=device))
        return CellPredictions(classes.to(dtype), sides.to(dtype), torch.cat(centres), torch.cat(strides))


def _expectation(logits: Tensor) -> Tensor:
    """Mean (...,) of the bins' numbers under distributions given by logits (..., bins)."""
    bins = torch.arange(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return (logits.softmax(-1) * bins).sum(-1)


def _branch(dim: int, hidden_dim: int, dim_out: int, *, bias: float) -> nn.Sequential:
    last = nn.Conv2d(hidden_dim, dim_out, 1)
    nn.init.constant_(cast(Tensor, last.bias), bias)
    return nn.Sequential(conv_norm_silu(dim, hidden_dim, 3), conv_norm_silu(hidden_dim, hidden_dim, 3), last)


def _first_logit(num_classes: int, stride: int) -> float:
    """What the class logits of a level start near: five objects in an image of 640 pixels, evenly over the classes."""
    return math.log(5 / num_classes / (640 / stride) ** 2)
