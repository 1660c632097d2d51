"""Stems: from images to the first token map."""

from torch import Tensor, nn


class PatchStem(nn.Module):
    """Embeds square patches, overlapping if the stride is smaller than the patch, by one convolution without padding.

    An image of size s gives floor((s − patch_size)/stride) + 1 patches along each axis; what is left over at the right
    and bottom border is not seen.

    Args:
        in_chans: Channels of the images.
        embed_dim: Channels of the tokens.
        patch_size: Side of a patch in pixels.
        stride: Distance of neighbouring patches in pixels; ``patch_size`` when not given.
    """

    def __init__(self, in_chans: int, embed_dim: int, *, patch_size: int, stride: int | None = None) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.stride = patch_size if stride is None else stride
        if self.patch_size < 1 or self.stride < 1:
            raise ValueError(f"PatchStem: patch_size and stride must be at least 1, got {patch_size} and {self.stride}")
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=self.stride)

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
        return self.proj(x).permute(0, 2, 3, 1)
