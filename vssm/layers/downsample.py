"""Downsampling between stages, by convolution; timm has `PatchMerging`, which merges patches of 2×2 tokens."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ConvDownsample(nn.Module):
    """Halves the resolution by a 3×3 convolution of stride 2, followed by a norm.

    Args:
        dim: Channels before.
        dim_out: Channels after.
        bias: Whether the convolution has a bias.
        norm_layer: Makes the norm from ``dim_out``.
    """

    def __init__(
        self, dim: int, dim_out: int, *, bias: bool = True, norm_layer: Callable[[int], nn.Module] = nn.LayerNorm
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, kernel_size=3, stride=2, padding=1, bias=bias)
        self.conv.to(memory_format=torch.channels_last)  # as its maps are: else each call would reorder the weight
        self.norm = norm_layer(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, h, w, dim) to (b, ceil(h/2), ceil(w/2), dim_out)."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
