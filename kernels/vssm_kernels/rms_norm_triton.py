"""RMSNorm as Triton kernels, and their launches: rows of channels (rows, d), some of them a program."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class LaunchConfig:
    """Sizes of a launch."""

    elements: int  # of the rows that a program holds at once
    warps: int


FORWARD = LaunchConfig(elements=2048, warps=4)
BACKWARD = LaunchConfig(elements=2048, warps=4)
# Programs of the backward pass, each of which sums its rows' gradients of weight: fixed, for the same bits everywhere.
PROGRAMS = 1056  # 8 on each multiprocessor of an H100


@triton.jit
def norm_forward_kernel(x, weight, y, rows, width, x_token, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes y (rows, d)."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    channels = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (channels < width)
    value = tl.load(x + row * x_token + channels, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
    result = value * scale * tl.load(weight + channels, mask=channels < width, other=0.0).to(tl.float32)
    tl.store(y + row * width + channels, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    x, weight, dy, dx, sums, rows, width, x_token, dy_token, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes dx (rows, d) and, per program, the sum of its rows' gradients of weight (programs, d)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    channels = tl.arange(0, BLOCK)[None, :]
    factor = tl.load(weight + channels, mask=channels < width, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(program * ROWS, rows, programs * ROWS):
        row = (first + tl.arange(0, ROWS))[:, None].to(tl.int64)
        inside = (row < rows) & (channels < width)
        value = tl.load(x + row * x_token + channels, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(dy + row * dy_token + channels, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
        normed = value * scale
        total += gradient * normed
        gradient *= factor
        result = scale * (gradient - normed * (tl.sum(gradient * normed, 1) / width)[:, None])
        tl.store(dx + row * width + channels, result.to(dx.dtype.element_ty), mask=inside)
    column = tl.arange(0, BLOCK)
    tl.store(sums + program * width + column, tl.sum(total, 0), mask=column < width)


def forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Result in ``dtype``."""
    rows = _rows(x)
    y = torch.empty(rows.shape, dtype=dtype, device=x.device)
    sizes = _sizes(rows, FORWARD)
    _run(norm_forward_kernel, triton.cdiv(len(rows), sizes["ROWS"]), rows, weight, eps, y=y, **sizes)
    return y.view(x.shape)


def backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its dtype, and of weight (d,) in float32."""
    rows, dy = _rows(x), _rows(dy)
    sizes = _sizes(rows, BACKWARD)
    programs = min(PROGRAMS, triton.cdiv(len(rows), sizes["ROWS"]))
    dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    sums = torch.empty(programs, rows.shape[-1], dtype=torch.float32, device=x.device)
    gradients = {"dy": dy, "dx": dx, "sums": sums, "dy_token": dy.stride(0)}
    _run(norm_backward_kernel, programs, rows, weight, eps, **gradients, **sizes)
    return dx.view(x.shape), sums.sum(0)


def _run(kernel: Any, programs: int, rows: Tensor, weight: Tensor, eps: float, **arguments: Any) -> None:
    if rows.numel():
        numbers = {"rows": len(rows), "width": rows.shape[-1], "x_token": rows.stride(0), "eps": eps}
        with torch.accelerator.device_index(rows.device.index):
            kernel[(programs,)](x=rows, weight=weight.contiguous(), **numbers, **arguments)


def _sizes(rows: Tensor, config: LaunchConfig) -> dict[str, int]:
    block = triton.next_power_of_2(rows.shape[-1])
    return {"ROWS": max(1, config.elements // block), "BLOCK": block, "num_warps": config.warps}


def _rows(tensor: Tensor) -> Tensor:
    """(rows, d), each row contiguous."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
