"""Neighbourhood attention: every token of a map attends to the window of tokens around it.

Windows of neighbouring tokens overlap, so tokens are taken by tiles: the queries of a tile are multiplied with all
keys that one of them sees, and what a query does not see is masked. This needs no copy of the keys for every query,
and no product of all tokens with all tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vssm.scan_order import cached


class Neighborhood:
    """The windows around the tokens of one grid.

    Along an axis of n cells with dilation d, the neighbours of cell i are window cells of the same remainder modulo d,
    d apart and centred on i. At a border the window is shifted, never padded: each token has window² neighbours.

    Args:
        size: Rows and columns (h, w) of the grid.
        window: Side of a window, odd, in tokens.
        dilation: Distance of neighbouring tokens of a window, by rows and by columns.
        device: Of the tensors that are to be mixed.

    Raises:
        ValueError: If a window does not fit into the grid.

    Reference:
        Hassani and Shi, "Dilated Neighborhood Attention Transformer", 2022, https://arxiv.org/abs/2209.15001; borders
        and order of the biases as in NATTEN 0.17
    """

    def __init__(
        self, size: tuple[int, int], *, window: int, dilation: tuple[int, int] = (1, 1), device: torch.device
    ) -> None:
        if window % 2 == 0 or min(dilation) < 1:
            raise ValueError(
                f"Neighborhood: expected an odd window and dilations from 1 on, got {window} and "
                f"{dilation[0]}×{dilation[1]}"
            )
        needed = window * dilation[0], window * dilation[1]
        if size[0] < needed[0] or size[1] < needed[1]:
            raise ValueError(
                f"Neighborhood: a window of {window}×{window} tokens with dilation {dilation[0]}×{dilation[1]} needs a "
                f"map of at least {needed[0]}×{needed[1]} tokens, got {size[0]}×{size[1]}; enlarge the images"
            )
        self.window = window
        rows = _tiles(size[0], window, dilation[0], device=device)
        columns = _tiles(size[1], window, dilation[1], device=device)
        self._offsets = rows.offsets, columns.offsets
        self._queries = _of_grid(rows.queries, columns.queries, size[1])
        self._keys = _of_grid(rows.keys, columns.keys, size[1])
        self._slots = _slots(rows, columns)

    def attend(self, q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        """Attention weights softmax(q·k + bias) over the neighbours of each token.

        Args:
            q: Queries (b, l, heads, e) in raster order, scaled already.
            k: Keys (b, l, heads, e).
            bias: Relative position biases (heads, 2·window − 1, 2·window − 1): entry (window − 1 + y, window − 1 + x)
                is added for the neighbour y rows down and x columns to the right, both in units of the dilation.

        Returns:
            The weights, in tiles, as `aggregate` takes them.
        """
        q, k = _take(q, self._queries), _take(k, self._keys)
        return (q @ k.transpose(-1, -2) + self._in_tiles(bias)).softmax(-1)

    def aggregate(self, weights: Tensor, values: Tensor) -> Tensor:
        """Sums over the neighbours of each token: Σ weight·value.

        Args:
            weights: From `attend`.
            values: (b, l, heads, e) in raster order.

        Returns:
            (b, l, heads, e).
        """
        values = _take(values, self._keys)
        tiles = weights.to(values.dtype) @ values  # (b, heads, tiles, queries, e)
        return tiles.flatten(2, 3).index_select(2, self._slots).transpose(1, 2)

    def _in_tiles(self, bias: Tensor) -> Tensor:
        """Biases as (heads, tiles, queries, keys), −∞ for keys that a query does not see."""
        rows, columns = self._offsets
        bias = F.pad(bias, (0, 1, 0, 1), value=-torch.inf)
        bias = bias.index_select(1, rows.flatten()).index_select(2, columns.flatten())
        bias = bias.unflatten(2, columns.shape).unflatten(1, rows.shape)
        return bias.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """Of x (b, l, heads, e) the given tokens, (tiles, t), as (b, heads, tiles, t, e)."""
    return x.transpose(1, 2).index_select(2, tokens.flatten()).unflatten(2, tokens.shape)


def _of_grid(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Tokens (tiles, t) of a grid from their rows and columns by tiles of either axis."""
    tokens = rows[:, None, :, None] * width + columns[:, None, :]  # (tiles of rows, of columns, t of rows, of columns)
    return tokens.flatten(2, 3).flatten(0, 1)


def _slots(rows: "_Tiles", columns: "_Tiles") -> Tensor:
    """Where among the queries of all tiles of a grid each token is, (l,)."""
    (tile_rows, height), (tile_columns, width) = rows.queries.shape, columns.queries.shape
    slots = torch.arange(tile_rows * tile_columns * height * width, device=rows.slots.device)
    slots = slots.view(tile_rows, tile_columns, height, width).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return slots.index_select(0, rows.slots).index_select(1, columns.slots).flatten()


class _Tiles(NamedTuple):
    """Tiles along one axis: cells of one remainder modulo the dilation, a few in succession.

    Args:
        queries: Cells of each tile, (tiles, t); the last ones of a remainder repeat a cell where they are too few.
        keys: Cells that some query of the tile sees, (tiles, u).
        offsets: Which of 2·window − 1 biases each pair has, (tiles, t, u); one more if the query does not see the key.
        slots: Where among the queries of all tiles each cell is, (n,).
    """

    queries: Tensor
    keys: Tensor
    offsets: Tensor
    slots: Tensor


@cached
def _tiles(length: int, window: int, dilation: int, *, device: torch.device) -> _Tiles:
    tile = window // 2 + 1  # costs least memory: larger tiles mask more pairs, smaller ones copy keys more often
    longest = -(-length // dilation)
    tiles = -(-longest // tile)
    first = torch.arange(dilation, device=device)[:, None, None]
    members = (length - first + dilation - 1) // dilation  # of each remainder, one less than the longest in some
    ranks = torch.arange(tiles * tile, device=device).view(1, tiles, tile).minimum(members - 1)
    starts = (ranks - window // 2).clamp(min=0).minimum(members - window)
    seen = starts[..., :1] + torch.arange(min(longest, tile + window - 1), device=device)
    pairs = seen[:, :, None, :] - ranks[..., None]
    is_neighbour = (seen[:, :, None, :] >= starts[..., None]) & (seen[:, :, None, :] < starts[..., None] + window)
    cells = torch.arange(length, device=device)
    return _Tiles(
        queries=(ranks * dilation + first).flatten(0, 1),
        keys=(seen.minimum(members - 1) * dilation + first).flatten(0, 1),
        offsets=torch.where(is_neighbour, pairs + window - 1, 2 * window - 1).flatten(0, 1),
        slots=cells % dilation * (tiles * tile) + cells // dilation,
    )
