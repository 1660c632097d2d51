"""Gates of channels by what is in the whole map."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class TokenSqueezeExcite(nn.Module):
    """x·sigmoid(expand(act(reduce(mean(norm(x)))))), with the mean over all tokens: one gate for each channel.

    Args:
        dim: Channels of the tokens.
        reduction: ``dim`` over the channels in between.
        bias: Whether the two linear layers have biases.
        norm_layer: Makes the norm of what is averaged, not of what is gated, from ``dim``; none when not given.
        act_layer: Makes the activation in between.
    """

    def __init__(
        self,
        dim: int,
        *,
        reduction: int = 8,
        bias: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.Identity,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.norm = norm_layer(dim)
        self.reduce = nn.Linear(dim, dim // reduction, bias=bias)
        self.act = act_layer()
        self.expand = nn.Linear(dim // reduction, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Gates tokens (b, l, c)."""
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """The gates (b, 1, c) that tokens (b, l, c) give, for these or for others."""
        pooled = self.norm(x).mean(1, keepdim=True)  # (b, 1, c)
        return torch.sigmoid(self.expand(self.act(self.reduce(pooled))))
