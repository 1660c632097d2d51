"""Neighbourhood attention as models use it, on several values with the same weights, by tiles and by the fused op."""

import pytest
import torch

import vssm.layers.neighborhood
from neighbourhood_cases import CASES, written_out
from vssm.layers.neighborhood import attend_to_neighborhood
from vssm_kernels.neighbourhood_attention_torch import Tiles


@pytest.mark.parametrize("fused", [False, True], ids=["tiles", "fused op"])
@pytest.mark.parametrize("case", CASES)
def test_values_share_their_weights(case, fused, device, monkeypatch):
    monkeypatch.setattr(vssm.layers.neighborhood, "FUSED", (device.type,) if fused else ())
    size, window, dilation = CASES[case]
    heads, side = 2, 2 * window - 1
    tensors = [torch.randn(2, size[0] * size[1], heads, 3) for _ in "qkvs"] + [torch.randn(heads, side, side)]
    inputs = [tensor.double().to(device).requires_grad_() for tensor in tensors]
    q, k, v, states, bias = inputs
    grid = {"size": size, "window": window, "dilation": dilation}
    average = attend_to_neighborhood(q, k, bias, **grid)
    mine = average(states + average(v))
    expected = written_out(q, k, states + written_out(q, k, v, bias, **grid), bias, **grid)
    torch.testing.assert_close(mine, expected)

    dy = torch.randn_like(expected)
    gradients = torch.autograd.grad(mine, inputs, dy)
    for name, gradient, other in zip("qkvsb", gradients, torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(gradient, other, msg=lambda text, name=name: f"{name}: {text}")


def test_memory_does_not_grow_with_the_square_of_the_map():
    """Of weights, the largest tensor, each query has a bounded number, of which window² are not zero."""
    elements = {}
    for side in (24, 48):
        tiles = Tiles((side, side), window=5, dilation=(1, 1), device=torch.device("cpu"))
        q = torch.randn(1, side**2, 1, 2)
        weights = tiles.attend(q, q, torch.zeros(1, 9, 9))
        assert (weights > 0).sum() == weights[..., 0].numel() * 25
        elements[side] = weights.numel() / side**2
    assert elements[24] == elements[48] == 7**2


def test_windows_that_do_not_fit_are_refused():
    q, bias = torch.zeros(1, 40, 1, 4), torch.zeros(1, 13, 13)
    with pytest.raises(ValueError, match=r"window of 7×7 tokens .* needs a map of at least 7×7 tokens, got 5×8"):
        attend_to_neighborhood(q, q, bias, size=(5, 8), window=7)
