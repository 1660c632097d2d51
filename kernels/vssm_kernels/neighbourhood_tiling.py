"""How maps are divided for the Triton kernels of neighbourhood attention."""

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

TOKENS = 16  # of a tile, as the tensor cores multiply rows by 16
SHAPES = ((4, 4), (2, 8), (8, 2), (1, 16), (16, 1))
LARGEST_FLAT = 4096  # tokens of a grid: runs are for windows that cover most of it
OVERHEAD = 32  # what a part costs whatever its size, in partners


@dataclass(frozen=True)
class Tiling:
    """Tiles of the grids that a map is divided into by remainders, and in how many parts their partners are taken.

    Partners of a tile of queries are the keys that these see, and of a tile of keys the queries that see these: a
    rectangle.

    Args:
        tiles: Along either axis of the largest grid.
        sides: Of a tile, by rows and columns, powers of two.
        steps: From tile to tile; the rest of a tile is empty, so that partners are no more than fit into a part.
        flat: Whether a tile is a run of tokens in raster order instead.
        partners: Of a part.
        many: Whether some tile has several parts.
    """

    tiles: tuple[int, int]
    sides: tuple[int, int]
    steps: tuple[int, int]
    flat: bool
    partners: int
    many: bool

    @classmethod
    @functools.lru_cache
    def of(
        cls, size: tuple[int, int], window: int, dilation: tuple[int, int], *, kind: str, partners: tuple[int, ...]
    ) -> "Tiling":
        """The one that multiplies the fewest pairs, padding and what is no pair of neighbours included.

        Args:
            size: Rows and columns of the map.
            window: Side of a window.
            dilation: By rows and columns.
            kind: Of the tokens in a tile, "queries" or "keys".
            partners: What a part may have.
        """
        rows, columns = (_Axis(n, d, window, kind) for n, d in zip(size, dilation, strict=True))
        costs = {tiling: cost for number in partners for tiling, cost in _candidates(rows, columns, number)}
        turns = 2 if kind == "queries" else 1  # gradients need a sum over all keys before
        return min(costs, key=lambda tiling: (turns if tiling.many else 1) * costs[tiling])

    @property
    def arguments(self) -> dict[str, int]:
        """As kernels take them."""
        names = "tiles_y", "tiles_x", "SIDE_Y", "SIDE_X", "STEP_Y", "STEP_X", "FLAT", "PARTNERS", "MANY"
        values = *self.tiles, *self.sides, *self.steps, self.flat, self.partners, self.many
        return dict(zip(names, values, strict=True))


class _Axis(NamedTuple):
    """One axis of a map."""

    cells: int
    dilation: int
    window: int
    kind: str

    @property
    def members(self) -> Counter[int]:
        """How many remainders have so many members."""
        return Counter(len(range(each, self.cells, self.dilation)) for each in range(self.dilation))

    @property
    def largest(self) -> int:
        return max(self.members)

    def span(self, first: int, last: int, members: int) -> int:
        """How many partners the ranks from the first to the last have."""
        half, end = self.window // 2, members - self.window
        if self.kind == "queries":
            start, stop = (min(max(rank - half, 0), end) for rank in (first, last))
            return stop + self.window - start
        start = 0 if first < self.window else first - half
        return (members if last >= end else last + half + 1) - start

    def spans(self, step: int) -> Counter[int]:
        """How many tiles have so many partners along the axis, in all grids."""
        spans = Counter()
        for members, grids in self.members.items():
            for first in range(0, members, step):
                spans[self.span(first, min(first + step, members) - 1, members)] += grids
        return spans


def _candidates(rows: _Axis, columns: _Axis, partners: int) -> Iterator[tuple[Tiling, int]]:
    """Tilings with parts of so many partners, and what they cost."""
    for sides in SHAPES:
        for steps in itertools.product(range(sides[0] // 2 + 1, sides[0] + 1), range(sides[1] // 2 + 1, sides[1] + 1)):
            spans = itertools.product(rows.spans(steps[0]).items(), columns.spans(steps[1]).items())
            areas = ((y * x, n * m) for (y, n), (x, m) in spans)
            tiles = -(-rows.largest // steps[0]), -(-columns.largest // steps[1])
            yield _tiling(areas, partners, tiles=tiles, sides=sides, steps=steps)
    if rows.largest * columns.largest <= LARGEST_FLAT:
        tiles = 1, -(-rows.largest * columns.largest // TOKENS)
        yield _tiling(_flat_areas(rows, columns), partners, tiles=tiles, flat=True)


def _flat_areas(rows: _Axis, columns: _Axis) -> Iterator[tuple[int, int]]:
    """Partners of each run of tokens, and how many grids have it."""
    for (height, n), (width, m) in itertools.product(rows.members.items(), columns.members.items()):
        for first in range(0, height * width, TOKENS):
            last = min(first + TOKENS, height * width) - 1
            yield rows.span(first // width, last // width, height) * width, n * m


def _tiling(
    areas: Iterable[tuple[int, int]],
    partners: int,
    *,
    tiles: tuple[int, int],
    sides: tuple[int, int] = (1, TOKENS),
    steps: tuple[int, int] = (1, TOKENS),
    flat: bool = False,
) -> tuple[Tiling, int]:
    parts = Counter()
    for area, number in areas:
        parts[-(-area // partners)] += number
    cost = sum(each * number for each, number in parts.items()) * (partners + OVERHEAD)
    return Tiling(tiles, sides, steps, flat, partners, max(parts) > 1), cost
