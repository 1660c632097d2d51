"""The 2D selective scan, the token mixer that VMamba introduced and its relatives vary."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from vssm.layers.conv import TokenConv
from vssm.layers.ssm import SelectiveSSM
from vssm.scan_order import scan_order


class SS2D(nn.Module):
    """Token mixer: out_proj(out_norm(Σ_i SSM_i(silu(conv(x))))), x = in_proj(input), over four directions i.

    The directions are rows, columns, and both reversed. With a gate, [x | z] = in_proj(input) and out_proj reads the
    norm's result times silu(z). A family that walks the map in another way overrides `scan`, one that does more than a
    convolution, a scan and a norm overrides `mix`, and one with another activation `activate`.

    Args:
        d_model: Channels of the tokens.
        d_state: State size of the scan.
        expand: d_inner/d_model.
        gate: Whether there is a gate z.
        conv_bias: Whether the convolution has a bias.
        directions: Number of directions.

    Reference:
        Liu et al., "VMamba", 2024, section 4, https://arxiv.org/abs/2401.10166
    """

    token_prunable = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        expand: float = 2.0,
        gate: bool = True,
        conv_bias: bool = True,
        directions: int = 4,
    ) -> None:
        super().__init__()
        d_inner = int(expand * d_model)
        self.gate = gate
        self.in_proj = nn.Linear(d_model, 2 * d_inner if gate else d_inner, bias=False)
        self.conv = TokenConv(d_inner, bias=conv_bias)
        self.ssm = SelectiveSSM(d_inner, d_state=d_state, dt_rank=math.ceil(d_model / 16), directions=directions)
        self.out_norm = nn.LayerNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Mixes tokens (b, l, c) in raster order of a grid ``size`` = (h, w)."""
        x = self.in_proj(x)
        if not self.gate:
            return self.out_proj(self.mix(x, size))
        x, z = x.chunk(2, dim=-1)
        return self.out_proj(self.mix(x, size) * self.activate(z))

    def mix(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps the scan's input (b, l, d) in raster order of a grid ``size`` = (h, w) to what the gate multiplies."""
        return self.out_norm(self.scan(self.activate(self.conv(x, size)), size))

    def activate(self, x: Tensor) -> Tensor:
        """The activation of the scan's input and of the gate."""
        return F.silu(x)

    def scan(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Scans tokens (b, l, d) of a grid ``size`` = (h, w); returns the sum of all directions, (b, l, d)."""
        return self.ssm(x, order=scan_order("cross", *size, device=x.device))
