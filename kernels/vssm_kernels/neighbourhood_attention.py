"""Neighbourhood attention, every token of a map to the window of tokens around it: the op, as torch sees it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vssm_kernels.neighbours import autocast_dtype, compute_dtype, implementation, no_double_backward

_Shape = tuple[int, ...]


def neighbourhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    size: tuple[int, int],
    window: int,
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """Averages the values of the neighbours of each token of a map: Σ softmax(q·k + bias)·v.

    Along an axis of n cells with dilation d, the neighbours of cell i are window cells of the same remainder modulo d,
    d apart and centred on i. At a border the window is shifted, never padded: each token has window² neighbours. The
    weights are never in memory as a whole where the op runs in Triton; the backward pass forms them again. The
    arithmetic is in float32, and products are of numbers in the dtype of the inputs.

    Args:
        q: Queries (b, l, heads, e) in raster order of the map, scaled already, with any strides.
        k: Keys (b, l, heads, e).
        v: Values (b, l, heads, f).
        bias: Relative position biases (heads, 2·window − 1, 2·window − 1): entry (window − 1 + y, window − 1 + x) is
            added for the neighbour y rows down and x columns to the right, both in units of the dilation.
        size: Rows and columns (h, w) of the map, l = h·w.
        window: Side of a window, odd, in tokens.
        dilation: Distance of neighbouring tokens of a window, by rows and by columns.

    Returns:
        (b, l, heads, f), contiguous, in the dtype of v; under autocast in its half precision, as of any product.

    Raises:
        ValueError: If the shapes do not fit each other, or a window does not fit into the map.

    Reference:
        Hassani and Shi, "Dilated Neighborhood Attention Transformer", 2022, https://arxiv.org/abs/2209.15001; borders
        and order of the biases as in NATTEN 0.17
    """
    check_windows(size, window, dilation)
    _check(q, k, v, bias, size=size, window=window)
    q, k, v = (each.to(autocast_dtype(each)) for each in (q, k, v))
    y, _ = torch.ops.vssm.neighbourhood_attention(q, k, v, bias, list(size), window, list(dilation))
    return y


def check_windows(size: tuple[int, int], window: int, dilation: tuple[int, int]) -> None:
    """Raises ValueError if a window does not fit into a map of ``size`` = (h, w)."""
    if window < 1 or window % 2 == 0 or min(dilation) < 1:
        raise ValueError(
            f"neighbourhood_attention: expected an odd window and dilations from 1 on, got {window} and "
            f"{dilation[0]}×{dilation[1]}"
        )
    needed = window * dilation[0], window * dilation[1]
    if size[0] < needed[0] or size[1] < needed[1]:
        raise ValueError(
            f"neighbourhood_attention: a window of {window}×{window} tokens with dilation {dilation[0]}×{dilation[1]} "
            f"needs a map of at least {needed[0]}×{needed[1]} tokens, got {size[0]}×{size[1]}; enlarge the images"
        )


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, size: tuple[int, int], window: int) -> None:
    if q.ndim != 4 or q.shape[1] != size[0] * size[1]:
        raise ValueError(
            f"neighbourhood_attention: q must be (b, {size[0] * size[1]}, heads, e) for a map of {size[0]}×{size[1]} "
            f"tokens, got {tuple(q.shape)}"
        )
    if k.shape != q.shape or k.dtype != q.dtype:
        raise ValueError(
            f"neighbourhood_attention: k must be {tuple(q.shape)} in {q.dtype} as q, got {tuple(k.shape)} in {k.dtype}"
        )
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"neighbourhood_attention: v must be {tuple(q.shape[:3])} and channels as q, got {tuple(v.shape)}"
        )
    expected = (q.shape[2], 2 * window - 1, 2 * window - 1)
    if bias.shape != expected:
        raise ValueError(
            f"neighbourhood_attention: bias must be {expected} for {expected[0]} heads and a window of {window}, "
            f"got {tuple(bias.shape)}"
        )


@torch.library.custom_op("vssm::neighbourhood_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, size: Sequence[int], window: int, dilation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of each token's sum of exponentials, (b, heads, l)."""
    with torch.autocast(q.device.type, enabled=False):  # it would reach into the body
        run = implementation("neighbourhood_attention", q, v, bias).forward
        return run(q, k, v, bias, size=size, window=window, dilation=dilation)


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, size: Sequence[int], window: int, dilation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    b, l, heads, _ = q.shape
    return v.new_empty(v.shape), q.new_empty(b, heads, l, dtype=compute_dtype(q))


@torch.library.custom_op("vssm::neighbourhood_attention_backward", mutates_args=())
def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    y: Tensor,
    lse: Tensor,
    size: Sequence[int],
    window: int,
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        run = implementation("neighbourhood_attention", q, v, bias).backward
        dq, dk, dv, dbias = run(dy, q, k, v, bias, y, lse, size=size, window=window, dilation=dilation)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias.to(bias.dtype)


@_backward.register_fake
def _(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    y: Tensor,
    lse: Tensor,
    size: Sequence[int],
    window: int,
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.size, ctx.window, ctx.dilation = inputs
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    options = ctx.size, ctx.window, ctx.dilation
    return (*torch.ops.vssm.neighbourhood_attention_backward(dy, *ctx.saved_tensors, *options), None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)
_backward.register_autograd(no_double_backward)


@register_flop_formula(torch.ops.vssm.neighbourhood_attention)
def _flops(q: _Shape, k: _Shape, v: _Shape, bias: _Shape, size: Any, window: int, *_: Any, **__: Any) -> int:
    """Floating-point operations of the two products, 2·b·l·heads·window²·(e + f), as torch counts any other."""
    return 2 * math.prod(q[:3]) * window**2 * (q[-1] + v[-1])


@register_flop_formula(torch.ops.vssm.neighbourhood_attention_backward)
def _backward_flops(dy: _Shape, q: _Shape, k: _Shape, v: _Shape, bias: _Shape, *others: Any, **_: Any) -> int:
    return 2 * _flops(q, k, v, bias, *others[2:])  # after y and lse
