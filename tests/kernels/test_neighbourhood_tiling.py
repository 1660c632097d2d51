"""Tiles of neighbourhood attention against lists of the neighbours of every token."""

from collections import Counter

import pytest

from neighbourhood_cases import CASES, neighbours
from vssm_kernels import neighbourhood_tiling
from vssm_kernels.neighbourhood_tiling import Tiling

A2MAMBA = {  # size, window, dilation: parts of how many keys, all at once, and how many pairs for each of neighbours
    "first stage": ((56, 56), 11, (1, 1), 256, 2.2),
    "first stage, dilated": ((56, 56), 11, (5, 5), 128, 1.7),
    "second stage": ((28, 28), 9, (1, 1), 256, 3.2),
    "second stage, dilated": ((28, 28), 9, (3, 3), 128, 1.8),
    "third stage": ((14, 14), 7, (1, 1), 128, 2.8),
    "third stage, dilated": ((14, 14), 7, (2, 2), 64, 1.75),
    "fourth stage": ((7, 7), 7, (1, 1), 64, 1.75),
}


def _seen(cell, cells, window, dilation, kind):
    if kind == "queries":
        return neighbours(cell, cells, window, dilation)
    same = range(cell % dilation, cells, dilation)
    return [query for query in same if cell in neighbours(query, cells, window, dilation)]


@pytest.mark.parametrize("kind", ["queries", "keys"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [1, 2, 4])
def test_partners_of_the_tiles_of_an_axis(case, step, kind):
    for cells, dilation in zip(CASES[case][0], CASES[case][2], strict=True):
        window, expected = CASES[case][1], Counter()
        for remainder in range(dilation):
            same = range(remainder, cells, dilation)
            for first in range(0, len(same), step):
                tile = same[first : first + step]
                expected[len(set().union(*(_seen(cell, cells, window, dilation, kind) for cell in tile)))] += 1
        assert neighbourhood_tiling._Axis(cells, dilation, window, kind).spans(step) == expected


@pytest.mark.parametrize("case", A2MAMBA)
def test_keys_of_a2mamba_are_taken_at_once(case):
    size, window, dilation, partners, ratio = A2MAMBA[case]
    tiling = Tiling.of(size, window, dilation, kind="queries", partners=(256, 128, 64, 32))
    assert (tiling.partners, tiling.many) == (partners, False)
    grids = dilation[0] * dilation[1]
    pairs = grids * tiling.tiles[0] * tiling.tiles[1] * neighbourhood_tiling.TOKENS * tiling.partners
    assert pairs <= 1.15 * ratio * size[0] * size[1] * window**2
