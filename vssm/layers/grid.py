"""Between tokens and the maps that convolutions see."""

from torch import Tensor


def to_maps(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (b, l, c) in raster order of a grid ``size`` = (h, w) as maps (b, c, h, w), a channels-last view."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """Maps (b, c, h, w) as tokens (b, h·w, c) in raster order."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
