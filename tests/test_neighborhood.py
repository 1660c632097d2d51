"""Neighbourhood attention against a loop over tokens and neighbours."""

import itertools

import pytest
import torch
from torch import Tensor

from vssm.layers.neighborhood import Neighborhood

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


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, size: tuple[int, int], window: int, dilation: tuple[int, int]
) -> Tensor:
    q, k, v = (x.unflatten(1, size) for x in (q, k, v))
    results = []
    for row, column in itertools.product(range(size[0]), range(size[1])):
        rows = neighbours(row, size[0], window, dilation[0])
        columns = neighbours(column, size[1], window, dilation[1])
        around = list(itertools.product(rows, columns))
        biases = [
            bias[:, (y - row) // dilation[0] + window - 1, (x - column) // dilation[1] + window - 1] for y, x in around
        ]
        scores = torch.stack([(q[:, row, column] * k[:, y, x]).sum(-1) for y, x in around], -1) + torch.stack(
            biases, -1
        )
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)  # (b, heads, window²)
        values = torch.stack([v[:, y, x] for y, x in around], 2)  # (b, heads, window², e)
        results.append((weights[..., None] * values).sum(2))
    return torch.stack(results, dim=1)


@pytest.mark.parametrize("case", CASES)
def test_against_a_loop(case, device):
    size, window, dilation = CASES[case]
    heads, side = 2, 2 * window - 1
    tensors = [torch.randn(2, size[0] * size[1], heads, 3) for _ in "qkv"] + [torch.randn(heads, side, side)]
    inputs = [tensor.double().to(device).requires_grad_() for tensor in tensors]
    q, k, v, bias = inputs
    around = Neighborhood(size, window=window, dilation=dilation, device=device)
    mine = around.aggregate(around.attend(q, k, bias), v)
    expected = by_hand(q, k, v, bias, size, window, dilation)
    torch.testing.assert_close(mine, expected)

    dy = torch.randn_like(expected)
    gradients = torch.autograd.grad(mine, inputs, dy)
    for name, gradient, other in zip("qkvb", gradients, torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(gradient, other, msg=lambda text, name=name: f"{name}: {text}")


def test_memory_does_not_grow_with_the_square_of_the_map():
    """Of weights, the largest tensor, each query has a bounded number, of which window² are not zero."""
    elements = {}
    for side in (24, 48):
        around = Neighborhood((side, side), window=5, device=torch.device("cpu"))
        q = torch.randn(1, side**2, 1, 2)
        weights = around.attend(q, q, torch.zeros(1, 9, 9))
        assert (weights > 0).sum() == weights[..., 0].numel() * 25
        elements[side] = weights.numel() / side**2
    assert elements[24] == elements[48] == 7**2


def test_windows_that_do_not_fit_are_refused():
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=r"window of 7×7 tokens .* needs a map of at least 7×7 tokens, got 5×8"):
        Neighborhood((5, 8), window=7, device=cpu)
    with pytest.raises(ValueError, match=r"with dilation 1×3 needs a map of at least 3×9 tokens, got 8×8"):
        Neighborhood((8, 8), window=3, dilation=(1, 3), device=cpu)
    with pytest.raises(ValueError, match="expected an odd window and dilations from 1 on, got 4 and 1×1"):
        Neighborhood((8, 8), window=4, device=cpu)
    with pytest.raises(ValueError, match="got 3 and 0×1"):
        Neighborhood((8, 8), window=3, dilation=(0, 1), device=cpu)
