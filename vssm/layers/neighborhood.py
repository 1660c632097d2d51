"""Neighbourhood attention: every token of a map attends to the window of tokens around it."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from vssm_kernels import neighbourhood_attention
from vssm_kernels.neighbourhood_attention import check_windows
from vssm_kernels.neighbourhood_attention_torch import Tiles

# Where weights are formed anew for every set of values, by a kernel that keeps none of them in memory.
FUSED = ("cuda",)


def attend_to_neighborhood(
    q: Tensor, k: Tensor, bias: Tensor, *, size: tuple[int, int], window: int, dilation: tuple[int, int] = (1, 1)
) -> Callable[[Tensor], Tensor]:
    """Attention of each token to its neighbours, whose weights softmax(q·k + bias) several sets of values can share.

    Args:
        q: Queries (b, l, heads, e) in raster order, scaled already.
        k: Keys (b, l, heads, e).
        bias: Relative position biases (heads, 2·window − 1, 2·window − 1).
        size: Rows and columns (h, w) of the map.
        window: Side of a window, odd, in tokens.
        dilation: Distance of neighbouring tokens of a window, by rows and by columns.

    Returns:
        What maps values (b, l, heads, f) to Σ weight·value over the neighbours of each token, (b, l, heads, f).
        Neighbours, and where in ``bias`` theirs are, are those of `vssm_kernels.neighbourhood_attention`.

    Raises:
        ValueError: If a window does not fit into the map.
    """
    if q.device.type in FUSED:
        return partial(neighbourhood_attention, q, k, bias=bias, size=size, window=window, dilation=dilation)
    check_windows(size, window, dilation)
    tiles = Tiles(size, window=window, dilation=dilation, device=q.device)
    return partial(tiles.aggregate, tiles.attend(q, k, bias))
