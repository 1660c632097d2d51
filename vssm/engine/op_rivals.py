"""What others run: the CUDA scan of mamba_ssm, and the composition that official code puts around a scan."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def cuda_scan(device: torch.device) -> Callable[..., Tensor] | None:
    """The CUDA scan of mamba_ssm with the arguments of ``selective_scan``; None where it cannot run."""
    if device.type != "cuda":
        return None
    try:
        module = importlib.import_module("selective_scan_cuda")
    except ImportError:
        return None

    def scan(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, delta_bias: Tensor, **_: Any
    ) -> Tensor:
        return _CudaScan.apply(module, u, delta, A, B, C, D, delta_bias)

    return scan


def official_composition(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    *,
    scan: Callable[..., Any],
) -> Tensor:
    """Cross scan, step, scan and cross merge as the authors' VMamba does them; one transpose each way for Vim.

    Args:
        x: Map (b, d, h, w), scanned in the order cross, or tokens (b, l, d), scanned in one direction.
        dt: (b, k, r, l), like B and C a view of a projection of the permuted copies.
        B: (b, k, n, l).
        C: As B.
        A: (k·d, n).
        D: (k·d,).
        dt_weight: (k, d, r).
        dt_bias: (k·d,).
        scan: With the arguments of ``selective_scan``.

    Returns:
        (b, d, l) from a map, (b, l, d) from tokens.

    Reference:
        Liu et al., "VMamba", 2024, https://github.com/MzeroMiko/VMamba (CrossScan, cross_selective_scan, CrossMerge)
    """
    u = _cross_scan(x) if x.ndim == 4 else x.mT.contiguous()
    delta = torch.einsum("bkrl,kdr->bkdl", dt, dt_weight).contiguous().flatten(1, 2)
    y = scan(u, delta, A, B.contiguous(), C.contiguous(), D, delta_bias=dt_bias, delta_softplus=True)
    return _cross_merge(y, x) if x.ndim == 4 else y.mT.contiguous()


def _cross_scan(x: Tensor) -> Tensor:
    """(b, d, h, w) -> (b, 4·d, l): rows, columns, and both reversed."""
    ahead = torch.stack([x.flatten(2), x.mT.flatten(2)], dim=1)
    return torch.cat([ahead, ahead.flip(-1)], dim=1).flatten(1, 2)


def _cross_merge(y: Tensor, x: Tensor) -> Tensor:
    """(b, 4·d, l) -> (b, d, l): every direction back at the tokens' places, and summed."""
    rows = y.unflatten(1, (4, -1))
    rows = rows[:, :2] + rows[:, 2:].flip(-1)
    return rows[:, 0] + rows[:, 1].unflatten(-1, (x.shape[3], -1)).mT.flatten(2)


class _CudaScan(torch.autograd.Function):
    """selective_scan_cuda with a bias, the softplus and no gate, as mamba_ssm calls it."""

    @staticmethod
    def forward(ctx: Any, module: Any, *inputs: Tensor) -> Tensor:
        u, delta, A, B, C, D, bias = inputs
        out, states, *_ = module.fwd(u, delta, A, B, C, D, None, bias, True)
        ctx.module = module
        ctx.save_for_backward(*inputs, states)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, bias, states = ctx.saved_tensors
        dy = gradients[0].contiguous()
        found = ctx.module.bwd(u, delta, A, B, C, D, None, bias, dy, states, None, None, True, False)
        return (None, *found[:7])
