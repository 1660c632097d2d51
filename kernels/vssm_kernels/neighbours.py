"""What the ops beside the scan share: they run where the scan runs, and see autocast as torch's own layers do."""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vssm_kernels.backend import backend_name


def implementation(op: str, *tensors: Tensor) -> ModuleType:
    """The module with ``forward`` and ``backward`` of ``op`` for these tensors.

    That is its Triton one where the scan runs in Triton, whose kernels compute in float32, and else its torch one.
    """
    narrow = all(tensor.dtype != torch.float64 for tensor in tensors)
    triton = narrow and backend_name(tensors[0].device.type) == "triton"
    return importlib.import_module(f"vssm_kernels.{op}_{'triton' if triton else 'torch'}")


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a convolution or a linear layer would take ``tensor`` in: half precision under autocast."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensor.dtype
    return tensor.dtype if tensor.dtype == torch.float64 else torch.get_autocast_dtype(device)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float32 for half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


def no_double_backward(ctx: Any, *gradients: Any) -> tuple[None, ...]:
    """Backward pass of a backward pass."""
    raise RuntimeError("vssm: gradients of gradients of a fused layer are not implemented")
