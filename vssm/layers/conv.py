"""Depthwise convolutions of tokens: the only layers besides the scan in which a token sees its neighbours."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vssm.layers.grid import to_maps, to_tokens
from vssm_kernels import causal_conv


class TokenConv(nn.Module):
    """Depthwise convolution of tokens on their grid, zero-padded to keep the grid's size.

    Args:
        dim: Channels d.
        kernel_size: Side of the kernel, odd, or its rows and columns. A sequence is a grid of one row.
        stride: Tokens from one result to the next along each side of the grid.
        bias: Whether to add a bias per channel.
    """

    def __init__(self, dim: int, kernel_size: int | tuple[int, int] = 3, *, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        rows, columns = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        if rows % 2 == 0 or columns % 2 == 0:
            raise ValueError(f"TokenConv: kernel_size must be odd to keep the grid's size, got {kernel_size}")
        padding = rows // 2, columns // 2
        self.conv = nn.Conv2d(dim, dim, (rows, columns), stride=stride, padding=padding, groups=dim, bias=bias)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Convolves tokens on their grid.

        Args:
            x: Tokens (b, l, d) in raster order.
            size: Rows and columns (h, w) of their grid, h·w = l.

        Returns:
            (b, l', d), tokens of a grid of ceil(h/stride) rows and ceil(w/stride) columns.
        """
        return to_tokens(self.conv(to_maps(x, size)))


class CausalTokenConv(nn.Module):
    """Depthwise convolutions along the sequence, one per scan direction, each causal in the order of its direction.

    Direction i computes y_t = bias_i + Σ_j weight_i[j]·x_{t−(w−1)+j}. A reversed direction reads x backwards, so that
    in token order y_t = bias_i + Σ_j weight_i[j]·x_{t+(w−1)−j}: its convolution is anti-causal. Tokens outside the
    sequence are zero.

    Args:
        dim: Channels d.
        kernel_size: Taps w.
        reverse: For each of the k directions, whether it reads the sequence backwards.
        activation: Whether SiLU follows, in the same pass over memory.
    """

    def __init__(
        self, dim: int, kernel_size: int, *, reverse: Sequence[bool] = (False,), activation: bool = False
    ) -> None:
        super().__init__()
        self.reverse = tuple(reverse)
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(len(self.reverse), dim, kernel_size))  # (k, d, w)
        self.bias = nn.Parameter(torch.empty(len(self.reverse), dim))  # (k, d)
        bound = 1 / math.sqrt(kernel_size)  # PyTorch's default for a depthwise convolution
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves tokens (b, l, d), the same for every direction, or (b, l, k, d), a sequence for each.

        Returns:
            (b, l, k, d) in token order.

        Raises:
            ValueError: If there is a sequence for each direction, and one of them is read backwards.
        """
        if x.ndim == 3:
            return causal_conv(x, self.weight, self.bias, reverse=self.reverse, activation=self.activation)
        if any(self.reverse):
            raise ValueError("CausalTokenConv: sequences (b, l, k, d) are read forwards, got a reversed direction")
        weight, bias = self.weight.flatten(0, 1)[None], self.bias.flatten()[None]  # one direction of k·d channels
        y = causal_conv(x.flatten(2), weight, bias, reverse=(False,), activation=self.activation)
        return y.unflatten(3, self.bias.shape).squeeze(2)
