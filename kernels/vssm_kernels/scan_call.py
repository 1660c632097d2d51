"""The arguments of one scan, as every backend receives them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# The inputs that have a gradient, in the order of the op's arguments and of the gradients its backward returns.
DIFFERENTIABLE = ("x", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias", "z")


@dataclass(frozen=True)
class ScanCall:
    """Arguments of ``directional_scan`` after its checks; shapes as there.

    ``merge`` and ``z`` act on the result; everything else acts on the scan.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor | None
    D: Tensor | None
    dt_weight: Tensor | None
    dt_bias: Tensor | None
    z: Tensor | None
    order: Tensor | None
    gap: Tensor | None
    softplus: bool
    params: str
    chain: bool
    merge: bool
    return_last_state: bool
    out_dtype: torch.dtype | None

    @property
    def batch(self) -> int:
        """Samples, b."""
        return self.x.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens of a sample, l."""
        return self.x.shape[1]

    @property
    def width(self) -> int:
        """Channels of the scan, d."""
        return self.x.shape[-1]

    @property
    def states(self) -> int:
        """States of a channel, n."""
        return self.A.shape[-1]

    @property
    def directions(self) -> int:
        """Directions, k."""
        if self.order is not None:
            return self.order.shape[-2]
        return self.x.shape[2] if self.x.ndim == 4 else self.A.shape[0]

    @property
    def steps(self) -> int:
        """Steps of one direction, t."""
        return self.tokens if self.order is None else self.order.shape[-1]

    @property
    def sequences(self) -> int:
        """Sequences of a sample that run side by side, each with its own parameters and state: k, or 1 if chained."""
        return 1 if self.chain else self.directions

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the arithmetic and of the state: float32, or float64 where an input asks for it."""
        return torch.float64 if torch.float64 in (self.x.dtype, self.A.dtype) else torch.float32

    @property
    def result_shape(self) -> tuple[int, ...]:
        """(b, l, d), or (b, l, k, d) if directions are kept apart."""
        shape = (self.batch, self.tokens, self.width)
        return shape if self.merge else (*shape[:2], self.directions, shape[2])

    @property
    def result_dtype(self) -> torch.dtype:
        """Dtype of the result."""
        return self.x.dtype if self.out_dtype is None else self.out_dtype

    @cached_property
    def tokens_last(self) -> bool:
        """Whether tokens are contiguous in memory, not channels, as ``selective_scan`` has them; results then too."""
        plain = self.order is None and self.gap is None and self.dt_weight is None and not (self.chain or self.merge)
        maps = [tensor for tensor in (self.x, self.dt, self.z) if tensor is not None]
        return plain and all(tensor.ndim == 4 and tensor.stride(1) == 1 != tensor.stride(3) for tensor in maps)

    def laid_out(self, rows: Tensor) -> Tensor:
        """Rows (b, l, d) or (b, l, k, d) in the memory layout that the op promises for its result and gradients."""
        return tokens_contiguous(rows) if self.tokens_last else rows.contiguous()

    @property
    def state_shape(self) -> tuple[int, ...]:
        """(b, k, d, n), k = 1 if chained; (0,) where no state is asked for."""
        return (self.batch, self.sequences, self.width, self.states) if self.return_last_state else (0,)


def tokens_contiguous(rows: Tensor) -> Tensor:
    """Rows (b, l, k, d) that lie in memory as (b, k, d, l)."""
    return rows.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
