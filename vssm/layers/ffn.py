"""Feed-forward networks that see a token's neighbours; timm has `Mlp`, which does not."""

from torch import Tensor, nn

from vssm.layers.conv import TokenConv


class ConvFFN(nn.Module):
    """Feed-forward network fc2(gelu(conv(fc1(x)))) with a depthwise 3×3 convolution.

    A family that convolves in another way overrides `convolve`.

    Args:
        dim: Channels of the tokens.
        hidden_dim: Channels in between.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.conv = TokenConv(hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps tokens (b, l, c) in raster order of a grid ``size`` = (h, w) to tokens."""
        return self.fc2(self.act(self.convolve(self.fc1(x), size)))

    def convolve(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps the hidden tokens (b, l, hidden_dim) to what is activated."""
        return self.conv(x, size)
