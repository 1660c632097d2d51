"""The causal convolutions in plain torch: the reference, and what runs where Triton does not."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vssm_kernels.neighbours import compute_dtype

# Elements of x up to which shifted sums, which stay in a CPU's cache, beat a convolution, which reads memory once.
SMALL = 1 << 17


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool], *, activation: bool
) -> Tensor:  # fmt: skip
    """Result (b, l, k, d) in the dtype of ``x``."""
    b, l, d = x.shape
    wide, weight, bias = _widened(x, weight, bias)
    y = wide.new_empty(b, l, len(reverse), d)
    for i, backwards in enumerate(reverse):
        result = _convolve(wide, weight[i], None if bias is None else bias[i], backwards=backwards)
        if activation:
            torch.ops.aten.silu.out(result, out=y[:, :, i])
        else:
            y[:, :, i] = result
    return y.to(x.dtype)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool], *, activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (b, l, d), of weight (k, d, w) and of bias (k, d), in the precision of the arithmetic."""
    x, weight, bias = _widened(x, weight, bias)
    dx, dweight, dbias = x.new_zeros(x.shape), weight.new_zeros(weight.shape), weight.new_empty(weight.shape[:2])
    for i, backwards in enumerate(reverse):
        gradient = dy[:, :, i].to(x.dtype)
        if activation:
            result = _convolve(x, weight[i], None if bias is None else bias[i], backwards=backwards)
            gradient = torch.ops.aten.silu_backward(gradient, result)
        dx += _convolve(gradient, weight[i], None, backwards=not backwards)  # the adjoint looks the other way
        dbias[i] = gradient.sum((0, 1))
        for shift in range(min(weight.shape[-1], x.shape[1])):
            target, source = _shifted(shift, x.shape[1], backwards=backwards)
            dweight[i, :, -1 - shift] = (gradient[:, target] * x[:, source]).sum((0, 1))
    return dx, dweight, dbias


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = torch.promote_types(compute_dtype(x), weight.dtype)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *, backwards: bool) -> Tensor:
    """Convolves tokens (b, l, d) with taps (d, w) of one direction."""
    if x.numel() <= SMALL:
        return _sum_of_shifted(x, weight, bias, backwards=backwards)
    reach, taps = weight.shape[-1] - 1, weight.flip(-1) if backwards else weight
    maps = x.transpose(1, 2).unsqueeze(2)  # (b, d, 1, l): torch convolves channels-last maps as they are, but sequences
    y = F.conv2d(maps, taps[:, None, None], bias, padding=(0, reach), groups=x.shape[-1])
    y = y.squeeze(2).transpose(1, 2)  # (b, l + reach, d), with each token's result at either end of its window
    return y[:, reach:] if backwards else y[:, : x.shape[1]]


def _sum_of_shifted(x: Tensor, weight: Tensor, bias: Tensor | None, *, backwards: bool) -> Tensor:
    taps = weight.t().contiguous()  # (w, d)
    y = x * taps[-1] if bias is None else torch.addcmul(bias, x, taps[-1])
    for shift in range(1, min(len(taps), x.shape[1])):
        target, source = _shifted(shift, x.shape[1], backwards=backwards)
        y[:, target].addcmul_(x[:, source], taps[-1 - shift])
    return y


def _shifted(shift: int, tokens: int, *, backwards: bool) -> tuple[slice, slice]:
    """Tokens whose ``shift``-th predecessor in the order of the direction exists, and these predecessors."""
    later, earlier = slice(shift, None), slice(None, tokens - shift)
    return (earlier, later) if backwards else (later, earlier)
