"""Hadamard transforms of channels, which spread outliers over many, before layers whose weights undo them."""

import torch
from torch import Tensor, nn

LARGEST_BLOCK = 32  # channels: a product with a matrix of this order costs little beside a linear layer's own


class RotatedLinear(nn.Module):
    """Linear layer of transformed tokens: linear(H·x), with the inverse of H in its weights.

    H is orthonormal, symmetric and block-diagonal, with the same Hadamard matrix for each block of channels.

    Args:
        linear: What reads the transformed tokens.
        in_features: Channels of the tokens.

    Reference:
        Chiang et al., "Quamba: A Post-Training Quantization Recipe for Selective State Space Models", 2024,
        https://arxiv.org/abs/2410.13229
    """

    matrix: Tensor

    def __init__(self, linear: nn.Module, in_features: int) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("matrix", hadamard_matrix(block_size(in_features)), persistent=False)

    @classmethod
    @torch.no_grad()
    def fold(cls, linear: nn.Module) -> "RotatedLinear":
        """The same function as a linear layer, which it takes over and whose weights (..., c) it transforms."""
        weight = linear.get_parameter("weight")
        rotated = cls(linear, weight.shape[-1]).to(weight.device)
        weight.copy_(multiply_blocks(weight.double(), rotated.matrix.double()))
        return rotated

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens (..., c)."""
        return self.linear(multiply_blocks(x, self.matrix.to(x.dtype)))


def block_size(channels: int) -> int:
    """Channels that are transformed together: the largest power of two that divides them, `LARGEST_BLOCK` at most."""
    return min(channels & -channels, LARGEST_BLOCK)


def hadamard_matrix(order: int) -> Tensor:
    """Sylvester's Hadamard matrix over its norm, (order, order), for a power of two; it is its own inverse."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(matrix, matrix.new_tensor([[1, 1], [1, -1]]))
    return (matrix / order**0.5).float()


def multiply_blocks(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiplies the last axis of (..., c) by a symmetric matrix, block by block."""
    return (x.reshape(-1, len(matrix)) @ matrix).view(x.shape)
