"""Stems: from images to the first token map."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _no_norm(dim: int) -> nn.Module:
    return nn.Identity()


class TokenStem(nn.Module):
    """What `TokenBackbone` asks of a stem: maps images (b, in_chans, H, W) to a map (b, h, w, c) of one token a patch.

    Attributes:
        stride: Distance of neighbouring tokens in pixels.
    """

    stride: int

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of an image whose sides are given in pixels."""
        raise NotImplementedError


class PatchStem(TokenStem):
    """Embeds square patches, overlapping if the stride is smaller than the patch, by one convolution without padding.

    An image of size s gives floor((s − patch_size)/stride) + 1 patches along each axis; what is left over at the right
    and bottom border is not seen.

    Args:
        in_chans: Channels of the images.
        embed_dim: Channels of the tokens.
        patch_size: Side of a patch in pixels.
        stride: Distance of neighbouring patches in pixels; ``patch_size`` when not given.
        norm_layer: Makes the norm of the tokens from their channels; none when not given.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        *,
        patch_size: int,
        stride: int | None = None,
        norm_layer: Callable[[int], nn.Module] = _no_norm,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.stride = patch_size if stride is None else stride
        if self.patch_size < 1 or self.stride < 1:
            raise ValueError(f"PatchStem: patch_size and stride must be at least 1, got {patch_size} and {self.stride}")
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=self.stride)
        self.norm = norm_layer(embed_dim)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.

        Raises:
            ValueError: If the image is smaller than a patch.
        """
        if min(height, width) < self.patch_size:
            raise ValueError(
                f"PatchStem: images must be at least {self.patch_size}×{self.patch_size} pixels, one patch, "
                f"got {height}×{width}"
            )
        return (height - self.patch_size) // self.stride + 1, (width - self.patch_size) // self.stride + 1

    def forward(self, x: Tensor) -> Tensor:
        """Embeds images (b, in_chans, H, W) as a map (b, h, w, embed_dim)."""
        self.grid_size(x.shape[2], x.shape[3])
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PaddedPatchStem(PatchStem):
    """Embeds square patches of an image that is zero-padded at the right and bottom to whole patches.

    An image of size s gives ceil(s/patch_size) patches along each axis.

    Args:
        in_chans: Channels of the images.
        embed_dim: Channels of the tokens.
        patch_size: Side of a patch in pixels.
    """

    def __init__(self, in_chans: int, embed_dim: int, *, patch_size: int) -> None:
        super().__init__(in_chans, embed_dim, patch_size=patch_size)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image whose sides are given in pixels."""
        return math.ceil(height / self.patch_size), math.ceil(width / self.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds images (b, in_chans, H, W) as a map (b, h, w, embed_dim)."""
        most = self.patch_size - 1  # more than makes whole patches is left out by the stride
        return super().forward(F.pad(x, (0, most, 0, most)))


class ConvStem(nn.Module):
    """Two 3×3 convolutions of stride 2, each followed by a norm, with a GELU between them.

    Each of them maps n pixels to ceil(n/2), so images of any size are seen to their border.

    Args:
        in_chans: Channels of the images.
        embed_dim: Channels of the tokens; half as many in between.
    """

    stride = 4

    def __init__(self, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, embed_dim // 2, kernel_size=3, stride=2, padding=1)
        self.norm1 = nn.LayerNorm(embed_dim // 2)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(embed_dim // 2, embed_dim, kernel_size=3, stride=2, padding=1)
        self.norm2 = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds images (b, in_chans, H, W) as a map (b, ceil(H/4), ceil(W/4), embed_dim)."""
        x = self.conv1(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        x = self.act(self.norm1(x)).permute(0, 3, 1, 2)
        return self.norm2(self.conv2(x).permute(0, 2, 3, 1))
