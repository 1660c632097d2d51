"""Blocks: residual units around a token mixer."""

from timm.layers import DropPath
from torch import Tensor, nn


class MixerBlock(nn.Module):
    """x + mixer(norm1(x)), with stochastic depth.

    Args:
        mixer: Maps tokens (b, l, c) and their grid's ``size`` to tokens.
        norm1: Norm before it.
        drop_path: Probability of leaving a branch out for a sample in training.
    """

    token_prunable = True

    def __init__(self, mixer: nn.Module, norm1: nn.Module, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = norm1
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps tokens (b, l, c) in raster order of a grid ``size`` = (h, w) to tokens."""
        return x + self.drop_path(self.mixer(self.norm1(x), size))


class MixerMlpBlock(MixerBlock):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)), with stochastic depth on either branch.

    A family whose second branch is another one overrides `feed`.

    Args:
        mixer: Maps tokens (b, l, c) and their grid's ``size`` to tokens.
        norm1: Norm before it.
        mlp: Maps tokens (b, l, c) to tokens, each by itself.
        norm2: Norm before the MLP.
        drop_path: Probability of leaving a branch out for a sample in training.
    """

    token_prunable = True

    def __init__(
        self, mixer: nn.Module, norm1: nn.Module, *, mlp: nn.Module, norm2: nn.Module, drop_path: float = 0.0
    ) -> None:
        super().__init__(mixer, norm1, drop_path=drop_path)
        self.norm2 = norm2
        self.mlp = mlp

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps tokens (b, l, c) in raster order of a grid ``size`` = (h, w) to tokens."""
        x = super().forward(x, size)
        return x + self.drop_path(self.feed(x, size))

    def feed(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The second branch, mlp(norm2(x)), of tokens (b, l, c) in raster order of a grid ``size`` = (h, w)."""
        return self.mlp(self.norm2(x))


class MixerFfnBlock(MixerMlpBlock):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)), with a feed-forward network that sees the grid.

    Args:
        mixer: Maps tokens (b, l, c) and their grid's ``size`` to tokens.
        norm1: Norm before it.
        mlp: Maps tokens (b, l, c) and their grid's ``size`` to tokens.
        norm2: Norm before the feed-forward network.
        drop_path: Probability of leaving a branch out for a sample in training.
    """

    def feed(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The second branch, mlp(norm2(x)), of tokens (b, l, c) in raster order of a grid ``size`` = (h, w)."""
        return self.mlp(self.norm2(x), size)
