"""The neck of Mamba-YOLO: a path from coarse maps to fine ones and one back, of blocks that scan."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vssm.layers.grid import to_maps, to_tokens
from vssm.models.mambayolo import GeluSS2D, MambaYoloBlock, conv_norm_silu, init_scans


class PyramidPooling(nn.Module):
    """Joins a map with itself pooled once, twice and three times over 5×5 cells.

    Args:
        dim: Channels of the map; half as many are pooled.

    Reference:
        Jocher et al., YOLOv5's SPPF, 2022, https://doi.org/10.5281/zenodo.6222936; He et al., "Spatial Pyramid
        Pooling", 2014, https://arxiv.org/abs/1406.4729
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduce = conv_norm_silu(dim, dim // 2)
        self.expand = conv_norm_silu(4 * (dim // 2), dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, dim, h, w) to the same shape."""
        pooled = [self.reduce(x)]
        for _ in range(3):
            pooled.append(F.max_pool2d(pooled[-1], 5, stride=1, padding=2))
        return self.expand(torch.cat(pooled, dim=1))


class MixerChain(nn.ModuleList):
    """Mixers one after the other, without residual or norm between them."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps tokens (b, l, c) in raster order of a grid ``size`` = (h, w) to tokens."""
        for mixer in self:
            x = mixer(x, size)
        return x


class MambaYoloNeck(nn.Module):
    """Path aggregation: each level reads the coarser ones, then each reads the finer ones.

    The coarsest map is pooled first. A coarser map is enlarged by repetition, a finer one reduced by a 3×3 convolution
    of stride 2; both come before the level's own channels, and a block reads all of them.

    Args:
        in_channels: Channels of the maps, from the finest to the coarsest; the neck keeps them.
        mixers: Scans in each block.

    Attributes:
        out_channels: Channels of the results.

    Reference:
        Wang et al., "Mamba YOLO", 2024, section 3.2, https://arxiv.org/abs/2406.05835; Liu et al., "Path Aggregation
        Network", 2018, https://arxiv.org/abs/1803.01534
    """

    def __init__(self, in_channels: Sequence[int], *, mixers: int = 1) -> None:
        super().__init__()
        self.in_channels = self.out_channels = list(in_channels)
        pairs = list(zip(self.in_channels[:-1], self.in_channels[1:], strict=True))  # of a finer and a coarser level
        self.pooling = PyramidPooling(self.in_channels[-1])
        self.top_down = nn.ModuleList(_block(fine + coarse, fine, mixers=mixers) for fine, coarse in pairs)
        self.downsample = nn.ModuleList(conv_norm_silu(fine, fine, 3, stride=2) for fine, _ in pairs)
        self.bottom_up = nn.ModuleList(_block(fine + coarse, coarse, mixers=mixers) for fine, coarse in pairs)
        init_scans(self)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps maps (b, c_i, h_i, w_i), from the finest to the coarsest, to maps of the same shapes.

        Raises:
            ValueError: If there are more or fewer maps, or maps of other channels.
        """
        given = [each.shape[1] for each in maps]
        if given != self.in_channels:
            raise ValueError(f"MambaYoloNeck: expected maps of {self.in_channels} channels, got {given}")
        inner = [self.pooling(maps[-1])]
        for block, each in zip(reversed(self.top_down), reversed(maps[:-1]), strict=True):
            coarser = F.interpolate(inner[0], size=each.shape[2:], mode="nearest")
            inner.insert(0, _run(block, torch.cat([coarser, each], dim=1)))
        results = [inner[0]]
        for downsample, block, each in zip(self.downsample, self.bottom_up, inner[1:], strict=True):
            results.append(_run(block, torch.cat([downsample(results[-1]), each], dim=1)))
        return tuple(results)


def _block(dim: int, dim_out: int, *, mixers: int) -> MambaYoloBlock:
    """A block of the backbone with several mixers; its projection, which changes the channels, has no bias."""
    chain = MixerChain(GeluSS2D(dim_out) for _ in range(mixers))
    return MambaYoloBlock(dim_out, proj=conv_norm_silu(dim, dim_out), mixer=chain)


def _run(block: nn.Module, x: Tensor) -> Tensor:
    """Runs a block on the tokens of a map (b, dim, h, w)."""
    size = (x.shape[2], x.shape[3])
    return to_maps(block(to_tokens(x), size), size)
