"""RMSNorm that leaves autocast's half precision behind, in one pass over memory: the op, as torch sees it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vssm_kernels import rms_norm_torch
from vssm_kernels.neighbours import autocast_dtype, implementation, no_double_backward


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Computes x/√(mean(x²) + eps)·weight over the last axis, in float32.

    Without autocast this is torch's own function. Under it the result is in half precision, as the linear layer behind
    a norm takes it anyway, so that nobody writes it in float32 and converts it. A compiler makes one pass of plain
    operators by itself, together with the addition before them, and gets those.

    Args:
        x: Tokens (..., d), with any strides.
        weight: (d,).
        eps: What keeps a row of zeros from dividing by zero.

    Returns:
        The shape of x, contiguous; in the dtype of x, under autocast in its half precision.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must be {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    dtype = autocast_dtype(x)
    if dtype == x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    if torch.compiler.is_compiling():
        return rms_norm_torch.forward(x, weight, eps, dtype)
    return torch.ops.vssm.rms_norm(x, weight, eps, dtype)


@torch.library.custom_op("vssm::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return implementation("rms_norm", x, weight).forward(x, weight, eps, dtype).contiguous()


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("vssm::rms_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        dx, dweight = implementation("rms_norm", x, weight).backward(dy, x, weight, eps)
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight = torch.ops.vssm.rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps)
    return dx, dweight, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
_backward.register_autograd(no_double_backward)
