"""RMSNorm in plain torch: the reference, and what runs where Triton does not."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vssm_kernels.neighbours import compute_dtype


def forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Result in ``dtype``, of arithmetic in float32 or wider."""
    wide = x.to(torch.promote_types(compute_dtype(x), weight.dtype))
    with torch.autocast(x.device.type, enabled=False):  # where a compiler traces it
        return F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps).to(dtype)


def backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and of weight (d,), in the precision of the arithmetic."""
    x = x.to(torch.promote_types(compute_dtype(x), weight.dtype))
    dy = dy.to(x.dtype)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed, gradient = x * scale, dy * weight
    dx = scale * (gradient - normed * (gradient * normed).mean(-1, keepdim=True))
    return dx, (dy * normed).reshape(-1, x.shape[-1]).sum(0)
