"""Linear layers of groups of channels and of scan directions, each of which has weights of its own."""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn


class GroupLinear(nn.Module):
    """A linear layer without bias for each group of channels.

    Args:
        groups: Number of groups k.
        in_features: Channels of a group before.
        out_features: Channels of a group after.
    """

    def __init__(self, groups: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features))
        trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens (b, l, k, in_features) to (b, l, k, out_features)."""
        return torch.einsum("blkd,ked->blke", x, self.weight)


class DirectionLinear(nn.Linear):
    """A linear layer without bias for each scan direction, whose weights lie one after the other.

    Args:
        in_features: Channels of the tokens.
        out_features: Channels of all directions together.
        directions: Number of directions k.
    """

    def __init__(self, in_features: int, out_features: int, *, directions: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.directions = directions

    def forward(self, input: Tensor) -> Tensor:
        """Maps tokens (b, l, d) that all directions read, or (b, l, k, d), one map for each, to (b, l, k, e)."""
        if input.ndim == 3:
            return super().forward(input).unflatten(-1, (self.directions, -1))
        return torch.einsum("blkd,kcd->blkc", input, self.grouped_weight)

    @property
    def grouped_weight(self) -> Tensor:
        """Weights by direction, (k, e, d)."""
        return self.weight.unflatten(0, (self.directions, -1))
