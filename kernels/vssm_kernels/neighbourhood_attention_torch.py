"""Neighbourhood attention in plain torch: the reference, and what runs where Triton does not.

Windows of neighbouring tokens overlap, so tokens are taken by tiles: the queries of a tile are multiplied with all
keys that one of them sees, and what a query does not see is masked. This needs no copy of the keys for every query,
and no product of all tokens with all tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vssm_kernels.neighbours import compute_dtype
from vssm_kernels.tables import cached


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, size: Sequence[int], window: int, dilation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Result (b, l, heads, f) in the dtype of ``v``, and log Σ exp of the scores of each token, (b, heads, l)."""
    tiles = Tiles(size, window=window, dilation=dilation, device=q.device)
    scores = tiles.scores(*(_widened(each, v) for each in (q, k, bias)))
    y = tiles.aggregate(scores.softmax(-1), _widened(v, q))
    lse = tiles.of_tokens(scores.logsumexp(-1, keepdim=True)).squeeze(-1)
    return y.to(v.dtype).contiguous(), lse.to(compute_dtype(q))


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    y: Tensor,
    lse: Tensor,
    *,
    size: Sequence[int],
    window: int,
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias in their shapes, contiguous, in the precision of the arithmetic."""
    tiles = Tiles(size, window=window, dilation=dilation, device=q.device)
    dy, q, k, v, bias = (_widened(each, q, v) for each in (dy, q, k, v, bias))
    weights = tiles.attend(q, k, bias)
    dy = tiles.to_queries(dy)
    dv = tiles.sum_of_keys(weights.mT @ dy)
    dweights = dy @ tiles.keys_of(v).mT
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    dq = tiles.of_tokens(dscores @ tiles.keys_of(k)).transpose(1, 2).contiguous()
    dk = tiles.sum_of_keys(dscores.mT @ tiles.queries_of(q))
    return dq, dk, dv, tiles.sum_of_biases(dscores.sum(0))


def _widened(tensor: Tensor, *others: Tensor) -> Tensor:
    dtype = compute_dtype(tensor)
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return tensor.to(dtype)


class Tiles:
    """The tiles of a map, and what is computed in them.

    Args:
        size: Rows and columns (h, w) of the map.
        window: Side of a window, odd, in tokens; it must fit into the map.
        dilation: Distance of neighbouring tokens of a window, by rows and by columns.
        device: Of the tensors that are to be mixed.
    """

    def __init__(self, size: Sequence[int], *, window: int, dilation: Sequence[int], device: torch.device) -> None:
        self.window = window
        self._rows = _tiles(size[0], window, dilation[0], device=device)
        self._columns = _tiles(size[1], window, dilation[1], device=device)
        self._queries = _of_grid(self._rows.queries, self._columns.queries, size[1])
        self._keys = _of_grid(self._rows.keys, self._columns.keys, size[1])
        self._slots = _slots(self._rows, self._columns)

    def attend(self, q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        """Attention weights softmax(q·k + bias) over the neighbours of each token, (b, heads, tiles, queries, keys).

        Args:
            q: Queries (b, l, heads, e) in raster order, scaled already.
            k: Keys (b, l, heads, e).
            bias: (heads, 2·window − 1, 2·window − 1).
        """
        return self.scores(q, k, bias).softmax(-1)

    def scores(self, q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        """q·k + bias, −∞ for keys that a query does not see."""
        return self.queries_of(q) @ self.keys_of(k).mT + self._in_tiles(bias)

    def aggregate(self, weights: Tensor, values: Tensor) -> Tensor:
        """Sums over the neighbours of each token: Σ weight·value.

        Args:
            weights: From `attend`.
            values: (b, l, heads, e) in raster order.

        Returns:
            (b, l, heads, e).
        """
        return self.of_tokens(weights.to(values.dtype) @ self.keys_of(values)).transpose(1, 2)

    def queries_of(self, x: Tensor) -> Tensor:
        """Of x (b, l, heads, e) the queries of every tile, (b, heads, tiles, queries, e); some are there twice."""
        return _take(x, self._queries)

    def keys_of(self, x: Tensor) -> Tensor:
        """Of x (b, l, heads, e) what a query of a tile sees, (b, heads, tiles, keys, e)."""
        return _take(x, self._keys)

    def of_tokens(self, tiles: Tensor) -> Tensor:
        """What tiles (b, heads, tiles, queries, e) hold of each token, (b, heads, l, e)."""
        return tiles.flatten(2, 3).index_select(2, self._slots)

    def to_queries(self, x: Tensor) -> Tensor:
        """The adjoint of `of_tokens`: (b, l, heads, e) to tiles, zero where a query is there for a second time."""
        b, _, heads, e = x.shape
        tiles = x.new_zeros(b, heads, self._queries.numel(), e)
        return tiles.index_copy_(2, self._slots, x.transpose(1, 2)).unflatten(2, self._queries.shape)

    def sum_of_keys(self, tiles: Tensor) -> Tensor:
        """The adjoint of `keys_of`: sums over the tiles that see a token, (b, l, heads, e)."""
        b, heads, *_, e = tiles.shape
        sums = tiles.new_zeros(b, heads, len(self._slots), e)
        return sums.index_add_(2, self._keys.flatten(), tiles.flatten(2, 3)).transpose(1, 2).contiguous()

    def sum_of_biases(self, scores: Tensor) -> Tensor:
        """Sums of (heads, tiles, queries, keys) over the pairs that share a bias: the adjoint of their placement."""
        (rows, columns), side = (self._rows.offsets, self._columns.offsets), 2 * self.window  # the last is for no pair
        scores = (
            scores.unflatten(1, (len(rows), -1)).unflatten(3, (rows.shape[1], -1)).unflatten(5, (rows.shape[2], -1))
        )
        scores = scores.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)  # (heads, pairs of rows, of columns)
        sums = scores.new_zeros(*scores.shape[:2], side).index_add_(2, columns.flatten(), scores)
        sums = scores.new_zeros(len(scores), side, side).index_add_(1, rows.flatten(), sums)
        return sums[:, :-1, :-1].contiguous()

    def _in_tiles(self, bias: Tensor) -> Tensor:
        """Biases as (heads, tiles, queries, keys), −∞ for keys that a query does not see."""
        rows, columns = self._rows.offsets, self._columns.offsets
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
