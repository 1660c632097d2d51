"""Neighbourhood attention written out: lists of the neighbours of every token, and plain sums over them."""

import itertools

import torch
from torch import Tensor

CASES = {  # size, window, dilation
    "odd grid": ((5, 7), 3, (1, 1)),
    "window as large as the map": ((5, 5), 5, (1, 1)),
    "many tiles": ((14, 9), 5, (1, 1)),
    "dilated": ((8, 9), 3, (2, 3)),
    "dilation that does not divide": ((11, 10), 3, (3, 2)),
    "remainders of unlike length in many tiles": ((23, 13), 3, (2, 3)),
    "one token": ((3, 4), 1, (2, 1)),
}


def neighbours(cell: int, length: int, window: int, dilation: int) -> list[int]:
    """The cells of a window, centred unless a border is in the way."""
    same = list(range(cell % dilation, length, dilation))
    start = min(max(same.index(cell) - window // 2, 0), len(same) - window)
    return same[start : start + window]


def written_out(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, size: tuple[int, int], window: int, dilation: tuple[int, int]
) -> Tensor:
    """What `neighbourhood_attention` computes."""
    tokens, ys, xs = [], [], []
    for row, column in itertools.product(*map(range, size)):
        rows = neighbours(row, size[0], window, dilation[0])
        columns = neighbours(column, size[1], window, dilation[1])
        around = list(itertools.product(rows, columns))
        tokens.append([y * size[1] + x for y, x in around])
        ys.append([(y - row) // dilation[0] + window - 1 for y, _ in around])
        xs.append([(x - column) // dilation[1] + window - 1 for _, x in around])
    index = torch.tensor(tokens, device=q.device)  # (l, window²)
    scores = torch.einsum("blhe,blnhe->bhln", q, k[:, index]) + bias[:, torch.tensor(ys), torch.tensor(xs)]
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("bhln,blnhe->blhe", weights, v[:, index])
