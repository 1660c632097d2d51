"""Depthwise convolutions along the sequence, one per scan direction, with SiLU: the op, as torch sees it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vssm_kernels.neighbours import autocast_dtype, implementation, no_double_backward

_Shape = tuple[int, ...]


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, reverse: Sequence[bool], activation: bool = False
) -> Tensor:
    """Convolves tokens along their sequence once for every direction, each causal in the order of its direction.

    Direction i computes y_t = act(bias_i + Σ_j weight_i[j]·x_{t−(w−1)+j}); a reversed one x_{t+(w−1)−j} instead. Tokens
    outside the sequence are zero. The arithmetic is in float32.

    Args:
        x: Tokens (b, l, d), with any strides.
        weight: Taps (k, d, w).
        bias: (k, d), or None for none.
        reverse: For each of the k directions, whether it reads the sequence backwards.
        activation: Whether SiLU follows.

    Returns:
        (b, l, k, d), contiguous, in the dtype of x; under autocast in its half precision, as of any convolution.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    _check(x, weight, bias, reverse)
    return torch.ops.vssm.causal_conv(x.to(autocast_dtype(x)), weight, bias, list(reverse), activation)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool]) -> None:
    if x.ndim != 3:
        raise ValueError(f"causal_conv: x must be (b, l, d), got {tuple(x.shape)}")
    k, d = len(reverse), x.shape[-1]
    if weight.ndim != 3 or weight.shape[:2] != (k, d) or not weight.shape[2]:
        raise ValueError(
            f"causal_conv: weight must be ({k}, {d}, w) for {k} directions and {d} channels, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (k, d):
        raise ValueError(f"causal_conv: bias must be ({k}, {d}), got {tuple(bias.shape)}")


@torch.library.custom_op("vssm::causal_conv", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool], activation: bool) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # it would reach into the body
        return implementation("causal_conv", x, weight).forward(x, weight, bias, reverse, activation=activation)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool], activation: bool) -> Tensor:
    b, l, d = x.shape
    return x.new_empty(b, l, len(reverse), d)


@torch.library.custom_op("vssm::causal_conv_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool], activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        dx, dweight, dbias = implementation("causal_conv", x, weight).backward(
            dy, x, weight, bias, reverse, activation=activation
        )
    # Contiguous, as the fake ones: the channel is the last axis of taps that are stored, but the first but one here.
    return dx.to(x.dtype), dweight.to(weight.dtype).contiguous(), dbias.to(weight.dtype).contiguous()


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool], activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.reverse, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    arguments = (dy, x, weight, bias, ctx.reverse, ctx.activation)
    dx, dweight, dbias = torch.ops.vssm.causal_conv_backward(*arguments)
    return dx, dweight, None if bias is None else dbias.to(bias.dtype), None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
_backward.register_autograd(no_double_backward)


@register_flop_formula(torch.ops.vssm.causal_conv)
def _flops(x: _Shape, weight: _Shape, *_: Any, **__: Any) -> int:
    """Floating-point operations of a convolution, 2·b·l·k·d·w, as torch counts any other."""
    return 2 * x[0] * x[1] * math.prod(weight)


@register_flop_formula(torch.ops.vssm.causal_conv_backward)
def _backward_flops(dy: _Shape, x: _Shape, weight: _Shape, *_: Any, **__: Any) -> int:
    return 2 * _flops(x, weight)
