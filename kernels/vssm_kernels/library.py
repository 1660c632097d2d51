"""The one op behind both public functions, as torch sees it: schema, shapes, autograd and operation count.

``torch.ops.vssm.scan`` has one body for all devices, which asks ``backend.py`` for the implementation at run time and
is opaque to the compiler. Autograd does not run below the dispatcher, so the backward pass is an op of its own.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vssm_kernels.backend import backend_for
from vssm_kernels.checks import check_values
from vssm_kernels.scan_call import DIFFERENTIABLE, ScanCall

_Shape = tuple[int, ...]


# The fields of ScanCall, in their order.
_ARGUMENTS = """
    Tensor x, Tensor dt, Tensor A, Tensor B, Tensor? C, Tensor? D, Tensor? dt_weight, Tensor? dt_bias, Tensor? z,
    Tensor? order, Tensor? gap, bool softplus, str params, bool chain, bool merge, bool return_last_state,
    ScalarType? out_dtype
"""


@torch.library.custom_op("vssm::scan", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)")
def scan(*args: Any) -> tuple[Tensor, Tensor]:
    """Result and last state of a directional scan; the state is empty unless ``return_last_state``."""
    call = ScanCall(*args)
    check_values(call.tokens, call.A, call.order, call.gap)
    device = call.x.device.type
    with torch.autocast(device, enabled=False):  # it would reach into the body and round the products there
        result, state = backend_for(device).forward(call)
    return call.laid_out(result), state


@scan.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    call = ScanCall(*args)
    y = call.laid_out(call.x.new_empty(call.result_shape, dtype=call.result_dtype))
    return y, call.x.new_empty(call.state_shape, dtype=call.compute_dtype)


@torch.library.custom_op(
    "vssm::scan_backward", mutates_args=(), schema=f"(Tensor dy, Tensor dstate, {_ARGUMENTS}) -> Tensor[]"
)
def scan_backward(dy: Tensor, dstate: Tensor, *args: Any) -> list[Tensor]:
    """Gradients of the inputs that are present, in the order of ``DIFFERENTIABLE``."""
    call = ScanCall(*args)
    device = call.x.device.type
    with torch.autocast(device, enabled=False):
        gradients = backend_for(device).backward(call, dy, dstate)
    return [_laid_out(call, name, gradients[name].to(tensor.dtype)) for name, tensor in _differentiable(call)]


@scan_backward.register_fake
def _(dy: Tensor, dstate: Tensor, *args: Any) -> list[Tensor]:
    call = ScanCall(*args)
    return [_laid_out(call, name, tensor.new_empty(tensor.shape)) for name, tensor in _differentiable(call)]


def _differentiable(call: ScanCall) -> list[tuple[str, Tensor]]:
    present = ((name, getattr(call, name)) for name in DIFFERENTIABLE)
    return [(name, tensor) for name, tensor in present if tensor is not None]


def _laid_out(call: ScanCall, name: str, gradient: Tensor) -> Tensor:
    return call.laid_out(gradient) if name in ("x", "dt", "z") else gradient.contiguous()


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:11])
    ctx.options = inputs[11:]


def _scan_autograd(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    arguments = (*ctx.saved_tensors, *ctx.options)  # read once: activation checkpointing allows no second time
    call = ScanCall(*arguments)
    gradients = torch.ops.vssm.scan_backward(dy, dstate, *arguments)
    by_name = dict(zip((name for name, _ in _differentiable(call)), gradients, strict=True))
    return (*(by_name.get(name) for name in DIFFERENTIABLE), None, None, *(None for _ in ctx.options))


def _no_double_backward(ctx: Any, *gradients: Any) -> tuple[None, ...]:
    raise RuntimeError("vssm scan: gradients of gradients are not implemented; use vssm_kernels.reference for them")


scan.register_autograd(_scan_autograd, setup_context=_setup_context)
scan_backward.register_autograd(_no_double_backward)


@register_flop_formula(torch.ops.vssm.scan)
def scan_flops(x: _Shape, dt: _Shape, A: _Shape, *others: Any, **_: Any) -> int:
    """Floating-point operations of a scan, from the shapes of its tensors: 9·b·k·d·t·n, the convention of the field.

    A low-rank step adds its product, :func:`step_product_flops`.
    """
    dt_weight, order = others[3], others[6]  # after B, C, D, and after dt_bias, z
    sets, states = A[0], A[-1]
    directions, steps = (order[-2], order[-1]) if order is not None else (x[2] if len(x) == 4 else sets, x[1])
    return 9 * x[0] * directions * steps * x[-1] * states + step_product_flops(dt, dt_weight)


def step_product_flops(dt: _Shape, dt_weight: _Shape | None) -> int:
    """Floating-point operations of dt_weight·dt, the matrix product inside a scan: 2·b·l·k·d·r."""
    return 0 if dt_weight is None else 2 * dt[0] * dt[1] * math.prod(dt_weight)
