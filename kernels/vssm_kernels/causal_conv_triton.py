"""The causal convolutions as Triton kernels, and their launches.

A program owns a block of channels and a chunk of consecutive tokens of one sample. It takes the tokens one after the
other and keeps the last w rows of x in registers: at token t, a direction that reads forward is complete at t, and one
that reads backwards at t − (w − 1), from the same w rows. So x is read once for all directions. Loads of ``UNROLL``
tokens are issued before their arithmetic.

Everything per channel has channels last: weight (k, w, d), bias (k, d). ``REVERSED`` has bit i set if direction i reads
backwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class LaunchConfig:
    """Sizes of a launch."""

    block: int  # channels of a program
    chunk: int  # tokens of a program, a multiple of unroll
    unroll: int  # tokens whose loads are issued together
    warps: int


# Fastest of ten on an H100 at (128, 197, 768). A lane of a warp holds block/(32·warps) channels, 8 bytes of bfloat16.
FORWARD = LaunchConfig(block=128, chunk=16, unroll=8, warps=1)
# Windows, gradients and sums of two directions leave registers for 4 channels a lane. Sums go out once a chunk.
BACKWARD = LaunchConfig(block=128, chunk=100, unroll=2, warps=1)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def _silu_slope(x):
    gate = _sigmoid(x)
    return gate * (1.0 + x * (1.0 - gate))


@triton.jit
def _place(width, chunks, BLOCK: tl.constexpr):
    """Sample, chunk and channels of this program; offsets of samples may not fit 32 bits."""
    blocks = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    sample = (program // blocks // chunks).to(tl.int64)
    return sample, program // blocks % chunks, program % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _offset(token, stride):
    """Offset of a row inside a sample, in 64 bits; a token is a number where the kernel is interpreted."""
    return (token + tl.zeros((), tl.int64)) * stride


@triton.jit
def _load_row(rows, token, length, stride, channels, inside):
    """Row ``token`` in float32, zero outside the sequence."""
    exists = inside & (token >= 0) & (token < length)
    return tl.load(rows + _offset(token, stride) + channels, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _rows_before(rows, token, length, stride, channels, inside, count: tl.constexpr):
    """So many rows before ``token``, oldest first."""
    window = ()
    for j in tl.static_range(count):
        window = window + (_load_row(rows, token - count + j, length, stride, channels, inside),)
    return window


@triton.jit
def _load_parameters(weight, bias, width, channels, inside, K: tl.constexpr, W: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Taps in order of direction and tap, and the bias of each direction."""
    taps, biases = (), ()
    for i in tl.static_range(K * W):
        taps = taps + (tl.load(weight + i * width + channels, mask=inside, other=0.0).to(tl.float32),)
    for k in tl.static_range(K):
        if HAS_BIAS:
            biases = biases + (tl.load(bias + k * width + channels, mask=inside, other=0.0).to(tl.float32),)
        else:
            biases = biases + (tl.zeros_like(taps[0]),)
    return taps, biases


@triton.jit
def _token(newest, k: tl.constexpr, W: tl.constexpr, REVERSED: tl.constexpr):
    """The token whose result direction ``k`` completes with the row of token ``newest``."""
    return newest - (W - 1 if (REVERSED >> k) & 1 else 0)


@triton.jit
def _tapped(window, u: tl.constexpr, j: tl.constexpr, k: tl.constexpr, W: tl.constexpr, REVERSED: tl.constexpr):
    """The row that tap ``j`` of direction ``k`` weighs, of the w rows from row ``u`` of the window on."""
    return window[u + W - 1 - j if (REVERSED >> k) & 1 else u + j]


@triton.jit
def _convolve(window, taps, biases, u: tl.constexpr, k: tl.constexpr, W: tl.constexpr, REVERSED: tl.constexpr):
    """What direction ``k`` computes from the w rows from row ``u`` of the window on."""
    result = biases[k]
    for j in tl.static_range(W):
        result += taps[k * W + j] * _tapped(window, u, j, k, W, REVERSED)
    return result


@triton.jit
def _items(values, first: tl.constexpr, count: tl.constexpr):
    """So many items of a tuple, from ``first`` on."""
    items = ()
    for i in tl.static_range(count):
        items = items + (values[first + i],)
    return items


@triton.jit
def _zeros(count: tl.constexpr, BLOCK: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(count):
        zeros = zeros + (tl.zeros((BLOCK,), tl.float32),)
    return zeros


@triton.jit
def conv_forward_kernel(
    x, weight, bias, y, length, width, chunks, x_sample, x_token,
    K: tl.constexpr, W: tl.constexpr, REVERSED: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes y (b, l, k, d). Chunks cover l + w − 1 tokens: behind the last, backwards directions end."""
    sample, chunk, channels = _place(width, chunks, BLOCK)
    inside = channels < width
    x += sample * x_sample
    y += sample * length * K * width
    taps, biases = _load_parameters(weight, bias, width, channels, inside, K, W, HAS_BIAS)
    begin = chunk * CHUNK
    window = _rows_before(x, begin, length, x_token, channels, inside, W - 1)
    for first in range(begin, tl.minimum(begin + CHUNK, length + W - 1), UNROLL):
        for u in tl.static_range(UNROLL):
            window = window + (_load_row(x, first + u, length, x_token, channels, inside),)
        for u in tl.static_range(UNROLL):
            for k in tl.static_range(K):
                result = _convolve(window, taps, biases, u, k, W, REVERSED)
                if ACTIVATION:
                    result *= _sigmoid(result)
                token = _token(first + u, k, W, REVERSED)
                at = y + _offset(token, K * width) + k * width + channels
                tl.store(at, result.to(y.dtype.element_ty), mask=inside & (token >= 0) & (token < length))
        window = _items(window, UNROLL, W - 1)


@triton.jit
def conv_backward_kernel(
    x, weight, bias, dy, dx, sums, length, width, chunks, x_sample, x_token, dy_sample, dy_token, dy_direction,
    K: tl.constexpr, W: tl.constexpr, REVERSED: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes dx (b, l, d) and, per sample and chunk, sums (b·chunks, k, w + 1, d): gradients of taps, then of bias.

    With the row of token t come the gradients of the results at t, or at t − (w − 1) where backwards; with those of the
    w − 1 tokens before, they complete dx at t − (w − 1). So a chunk takes w − 1 tokens more than it owns.
    """
    sample, chunk, channels = _place(width, chunks, BLOCK)
    inside = channels < width
    x += sample * x_sample
    dy += sample * dy_sample
    dx += sample * length * width
    taps, biases = _load_parameters(weight, bias, width, channels, inside, K, W, HAS_BIAS)
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, length)
    window = _rows_before(x, begin, length, x_token, channels, inside, W - 1)
    gradients, totals = _zeros(K * (W - 1), BLOCK), _zeros(K * (W + 1), BLOCK)
    for first in range(begin, end + W - 1, UNROLL):
        dys = ()
        for u in tl.static_range(UNROLL):
            window = window + (_load_row(x, first + u, length, x_token, channels, inside),)
            for k in tl.static_range(K):
                token = _token(first + u, k, W, REVERSED)
                dys = dys + (_load_row(dy + k * dy_direction, token, length, dy_token, channels, inside),)
        for u in tl.static_range(UNROLL):
            dx_row = tl.zeros((BLOCK,), tl.float32)
            later_gradients, later_totals = (), ()
            for k in tl.static_range(K):
                gradient = dys[u * K + k]
                if ACTIVATION:
                    gradient *= _silu_slope(_convolve(window, taps, biases, u, k, W, REVERSED))
                token = _token(first + u, k, W, REVERSED)
                owned = tl.where((token >= begin) & (token < end), gradient, 0.0)
                for j in tl.static_range(W):
                    total = totals[k * (W + 1) + j] + owned * _tapped(window, u, j, k, W, REVERSED)
                    later_totals = later_totals + (total,)
                later_totals = later_totals + (totals[k * (W + 1) + W] + owned,)
                latest = _items(gradients, k * (W - 1), W - 1) + (gradient,)
                for j in tl.static_range(W):  # the adjoint looks the other way
                    dx_row += taps[k * W + j] * _tapped(latest, 0, j, k, W, ~REVERSED)
                later_gradients = later_gradients + _items(latest, 1, W - 1)
            gradients, totals = later_gradients, later_totals
            token = first + u - (W - 1)
            at = dx + _offset(token, width) + channels
            tl.store(at, dx_row.to(dx.dtype.element_ty), mask=inside & (token >= begin) & (token < end))
        window = _items(window, UNROLL, W - 1)
    sums += (sample * chunks + chunk) * K * (W + 1) * width
    for i in tl.static_range(K * (W + 1)):
        tl.store(sums + i * width + channels, totals[i], mask=inside)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool], *, activation: bool
) -> Tensor:  # fmt: skip
    """Result (b, l, k, d) in the dtype of ``x``."""
    b, l, d = x.shape
    y = x.new_empty(b, l, len(reverse), d)
    arguments = _arguments(x, weight, bias, reverse, FORWARD, activation=activation)
    chunks = triton.cdiv(l + weight.shape[-1] - 1, FORWARD.chunk)
    _run(conv_forward_kernel, FORWARD, chunks, y=y, **arguments)
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool], *, activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (b, l, d), of weight (k, d, w) and of bias (k, d), the latter two in float32."""
    b, l, d = x.shape
    chunks = triton.cdiv(l, BACKWARD.chunk)
    dy = _rows(dy)
    dx = x.new_empty(x.shape)
    # One row a program, summed in a fixed order: same input, same bits.
    sums = torch.empty(b * chunks, len(reverse), weight.shape[-1] + 1, d, dtype=torch.float32, device=x.device)
    arguments = _arguments(x, weight, bias, reverse, BACKWARD, activation=activation)
    arguments |= {"dy_sample": dy.stride(0), "dy_token": dy.stride(1), "dy_direction": dy.stride(2)}
    _run(conv_backward_kernel, BACKWARD, chunks, dy=dy, dx=dx, sums=sums, **arguments)
    total = sums.sum(0)  # (k, w + 1, d)
    return dx, total[:, :-1].transpose(1, 2), total[:, -1]


def _run(kernel: Any, config: LaunchConfig, chunks: int, **arguments: Any) -> None:
    x = arguments["x"]
    if x.numel():
        grid = (x.shape[0] * chunks * triton.cdiv(x.shape[-1], arguments["BLOCK"]),)
        with torch.accelerator.device_index(x.device.index):
            kernel[grid](chunks=chunks, **arguments, num_warps=config.warps)


def _arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool], config: LaunchConfig, *, activation: bool
) -> dict[str, Any]:
    x = _rows(x)
    weight = weight.transpose(-1, -2).contiguous()  # (k, w, d)
    return {
        "x": x,
        "weight": weight,
        "bias": weight if bias is None else bias.contiguous(),
        "length": x.shape[1],
        "width": x.shape[-1],
        "x_sample": x.stride(0),
        "x_token": x.stride(1),
        "K": len(reverse),
        "W": weight.shape[1],
        "REVERSED": sum(backwards << i for i, backwards in enumerate(reverse)),
        "HAS_BIAS": bias is not None,
        "ACTIVATION": activation,
        "CHUNK": config.chunk,
        "UNROLL": config.unroll,
        "BLOCK": min(config.block, max(16, triton.next_power_of_2(x.shape[-1]))),
    }


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with contiguous rows of channels."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
