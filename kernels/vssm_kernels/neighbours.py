"""What the ops beside the scan share: they run where the scan runs, and see autocast as torch's own layers do."""

from typing import Any

import torch
from torch import Tensor

from vssm_kernels.backend import backend_for

_TRITON = "vssm_kernels.launch"


def runs_triton(tensor: Tensor) -> bool:
    """Whether the backend of the scan on the device of ``tensor`` is Triton, and the kernels can compute its dtype."""
    return tensor.dtype != torch.float64 and backend_for(tensor.device.type).__name__ == _TRITON


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
