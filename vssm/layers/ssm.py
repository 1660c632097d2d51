"""The state-space model inside every mixer: projections to step, B and C, and the directional scan."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vssm.layers.group_linear import DirectionLinear
from vssm_kernels import directional_scan


class SelectiveSSM(nn.Module):
    """Selective state-space model that scans tokens in k directions.

    Each direction i computes [dt | B | C] = x_proj_i·x, step = softplus(dt_weight_i·dt + dt_bias_i) and the scan
    h_s = exp(step·A_i)·h_{s−1} + step·B·x, y = C·h_s + D_i·x with A_i = −exp(A_log_i), over the tokens in its order.

    Initially A = −(1 … d_state), D = 1, and steps are spread log-uniformly over ``dt_range``.

    Args:
        d_inner: Channels d of the scan.
        d_state: State size n of a channel.
        dt_rank: Rank r of the step's projection.
        directions: Number of directions k.
        dt_range: Smallest and largest step at the start of training.

    Reference:
        Gu and Dao, "Mamba", 2023, section 3, https://arxiv.org/abs/2312.00752
    """

    def __init__(
        self,
        d_inner: int,
        *,
        d_state: int = 16,
        dt_rank: int,
        directions: int = 1,
        dt_range: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__()
        self.d_state = d_state
        self.dt_rank = dt_rank
        self.directions = directions
        self.x_proj = DirectionLinear(d_inner, directions * (dt_rank + 2 * d_state), directions=directions)
        self.dt_weight = nn.Parameter(torch.empty(directions, d_inner, dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(directions, d_inner))
        self.A_log = nn.Parameter(torch.empty(directions, d_inner, d_state))
        self.D = nn.Parameter(torch.ones(directions, d_inner))
        self._init_parameters(dt_range)

    @torch.no_grad()
    def _init_parameters(self, dt_range: tuple[float, float]) -> None:
        bound = self.dt_rank**-0.5
        self.dt_weight.uniform_(-bound, bound)
        smallest, largest = (math.log(step) for step in dt_range)
        step = self.dt_bias.uniform_(smallest, largest).exp_()
        step.add_(torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.A_log.copy_(torch.arange(1, self.d_state + 1, dtype=torch.float32, device=self.A_log.device).log())

    def forward(
        self,
        x: Tensor,
        order: Tensor | None = None,
        *,
        gap: Tensor | None = None,
        idle: Tensor | None = None,
        z: Tensor | None = None,
        chain: bool = False,
        merge: bool = True,
    ) -> Tensor:
        """Scans tokens and sums the directions.

        Args:
            x: Tokens (b, l, d) that all directions read, or (b, l, k, d), one map for each.
            order: Scan order (k, t), or (b, k, t) if samples differ; raster order when not given.
            gap: Tokens dropped before each step, of the shape of ``order``; see `directional_scan`.
            idle: What would stand in the place of dropped tokens, (d,) or (k, d), for the length of their steps alone;
                zeros when not given.
            z: Gate (b, l, d), or (b, l, k, d) if not merged: the result is multiplied by silu(z).
            chain: Run the rows of ``order``, however many, as one sequence with the state carried over their joints;
                for the parameters of one direction.
            merge: Sum over the rows of ``order``; if false, keep their results apart.

        Returns:
            (b, l, d), or (b, l, k, d) if not merged, each token at its own place.
        """
        dt, B, C = self._project(x)
        dt, dt_bias = (dt, self.step_bias) if idle is None else self._count_from(idle, dt)
        A = self._state_matrix()
        y = directional_scan(
            x,
            dt,
            A,
            B,
            C,
            self.D,
            dt_weight=self.dt_weight,
            dt_bias=dt_bias,
            order=order,
            gap=gap,
            z=z,
            chain=chain,
            merge=merge,
        )
        return cast(Tensor, y)  # the last state, a second result, is not asked for

    def step(self, x: Tensor) -> Tensor:
        """Step sizes (b, l, k, d) of tokens ``x``, (b, l, d) or (b, l, k, d); the scan itself never stores them."""
        dt, _, _ = self._project(x)
        return F.softplus(torch.einsum("blkr,kdr->blkd", dt, self.dt_weight) + self.step_bias)

    @property
    def step_bias(self) -> Tensor:
        """What is added to the step before softplus, (k, d)."""
        return self.dt_bias

    def _count_from(self, idle: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        """Other dt and bias (k, d) that make the same steps, the bias alone making that of a token ``idle``."""
        origin, _, _ = self._project(idle.expand(self.directions, -1)[None, None])  # (1, 1, k, r)
        # A sum of products, not a product of matrices: autocast would round it, and the steps with it.
        shift = (origin.transpose(1, 2)[0] * self.dt_weight).sum(-1)
        return dt - origin, self.step_bias + shift

    def _state_matrix(self) -> Tensor:
        """A (k, d, n) in float32, or in float64 if that is the type of its logarithm."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step dt (b, l, k, r), B and C (b, l, k, n) of tokens (b, l, d) or (b, l, k, d)."""
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return dt, B, C


class TwiceBiasedSSM(SelectiveSSM):
    """State-space model whose steps are softplus(dt_weight·dt + 2·dt_bias), as trained weights of two families need.

    In their official codes the layer that forms the step adds its bias, and the scan adds it once more.
    """

    @property
    def step_bias(self) -> Tensor:
        """Twice the bias, (k, d)."""
        return 2 * self.dt_bias
