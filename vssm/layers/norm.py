"""Norms that torch has, with the passes over memory that autocast adds left out."""

from torch import Tensor, nn

from vssm_kernels import rms_norm


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last axis whose result, under autocast, is in the half precision that the next layer reads.

    torch's own gives float32 there, which the next linear layer converts in a pass of its own.

    Args:
        dim: Channels d.
        eps: What keeps a row of zeros from dividing by zero.
    """

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Norms tokens (..., d)."""
        return rms_norm(x, self.weight, eps=self.eps or 0.0)
