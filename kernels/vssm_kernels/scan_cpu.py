"""The scan compiled for the CPU by numba: prepares what the loops of ``scan_cpu_kernels.py`` read, and runs them.

The low-rank product is torch's. float64 runs in ``scan_torch.py``.
"""

import math

import torch
from torch import Tensor

from vssm_kernels import scan_cpu_kernels as kernels
from vssm_kernels import scan_torch
from vssm_kernels.scan_call import ScanCall
from vssm_kernels.scan_cpu_threads import on_threads

CHUNK = 16  # steps taken at a time, and between the states that the backward pass keeps
THREAD_WORK = 1 << 16  # elements of (b, k, d, t, n) that are worth a thread


def forward(call: ScanCall) -> tuple[Tensor, Tensor]:
    """Result and last state of ``call`` (the state empty unless asked for)."""
    if call.compute_dtype == torch.float64:
        return scan_torch.forward(call)
    result, state, _ = _forward(call, _inputs(call), for_backward=False)
    last = _packed(state.transpose(-1, -2)) if call.return_last_state else result.new_empty(0)
    return result.to(call.result_dtype), last


def backward(call: ScanCall, dy: Tensor, dstate: Tensor) -> dict[str, Tensor]:
    """Gradients of the differentiable inputs of ``call``, by name, in float32 (float64 for float64 inputs)."""
    if call.compute_dtype == torch.float64:
        return scan_torch.backward(call, dy, dstate)
    inputs = _inputs(call)
    result, state, starts = _forward(call, inputs, for_backward=True)
    dresult = dy = dy.float()
    dz = None
    if call.z is not None:
        z = call.z.float()
        gate = torch.sigmoid(z)
        dresult = dy * z * gate
        dz = dy * result * gate * (1 + z * (1 - gate))
    dstate = dstate.float().transpose(-1, -2) if call.return_last_state else torch.zeros_like(state)
    gradients = _backward(call, inputs, dresult, starts, dstate)
    return gradients if dz is None else gradients | {"z": dz}


def _inputs(call: ScanCall) -> kernels.Inputs:
    b, l, d, k, t = call.batch, call.tokens, call.width, call.directions, call.steps
    sets = call.sequences
    raw_step = call.dt.permute(2, 0, 1, 3).reshape(sets, b * l, call.dt.shape[-1])
    if call.dt_weight is not None:
        raw_step = torch.bmm(raw_step.float(), call.dt_weight.float().transpose(1, 2))
    zeros = call.A.new_zeros(sets, d)
    B_token, B_channel = _factors(call.B, call)
    C_token, C_channel = _factors(zeros.new_ones(sets, 1) if call.C is None else call.C, call)
    order = torch.arange(t, dtype=torch.int32).expand(1, k, t) if call.order is None else call.order
    gap = zeros.new_zeros(1, k, t) if call.gap is None else call.gap
    return kernels.Inputs(
        x=_array(call.x.view(b, l, 1, d) if call.x.ndim == 3 else call.x),
        raw_step=_array(raw_step.view(sets, b, l, 1, d)),
        A_log2=_array(call.A.transpose(-1, -2) * math.log2(math.e)),
        B_token=B_token,
        B_channel=B_channel,
        C_token=C_token,
        C_channel=C_channel,
        D=_array(zeros if call.D is None else call.D),
        bias=_array(zeros if call.dt_bias is None else call.dt_bias),
        order=_array(scan_torch.per_sample(order), torch.int32),
        gap=_array(scan_torch.per_sample(gap)),
        softplus=call.softplus,
        by_step=call.params == "step",
        chunk=CHUNK,
        lanes=_lanes(d),
    )


def _factors(matrix: Tensor, call: ScanCall) -> tuple[Tensor, Tensor]:
    """B or C as a factor per token, (b, l or 1, sets, n), and one per channel, (sets, n, d) or empty for 1."""
    one = matrix.new_ones(())
    if matrix.ndim == 3:
        return _array(one.expand(call.batch, 1, *call.A.shape[::2])), _array(matrix.transpose(-1, -2))
    rows = matrix if matrix.ndim == 4 else matrix.expand(call.batch, 1, *matrix.shape)
    return _array(rows), _array(one.expand(0, 0, 0))


def _array(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor, or a copy where it is not contiguous or of another dtype."""
    return tensor.to(dtype).contiguous()


def _forward(call: ScanCall, inputs: kernels.Inputs, *, for_backward: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Result in its shape, last state (b, sets, n, d), and the states at which chunks start.

    The backward pass needs these states, and the result as it is before the gate.
    """
    state = torch.empty(call.batch, call.sequences, call.states, call.width)
    chunks = -(-call.steps // CHUNK) if for_backward else 0
    starts = torch.empty(call.batch, call.directions, chunks, call.states, call.width)
    result = torch.zeros(call.result_shape)

    def rows(tensor: Tensor) -> Tensor:
        return tensor.reshape(call.batch, call.tokens, -1, call.width)

    gate = result.new_empty(0, 0, 0, 0) if call.z is None or for_backward else rows(call.z)
    _run("forward", call, inputs, kernels.Outputs(rows(result), starts, state, _array(gate)))
    return result, state, starts


def _backward(
    call: ScanCall, inputs: kernels.Inputs, dresult: Tensor, starts: Tensor, dstate: Tensor
) -> dict[str, Tensor]:
    """Gradients of everything but the gate."""
    b, blocks = call.batch, _blocks(call)
    sums = {
        "dx": torch.zeros(inputs.x.shape),
        "draw_step": torch.zeros(inputs.raw_step.shape),
        "dA": torch.zeros(b, *inputs.A_log2.shape),
        "dB_token": torch.zeros(blocks, *inputs.B_token.shape),
        "dB_channel": torch.zeros(b, *inputs.B_channel.shape),
        "dC_token": torch.zeros(blocks, *inputs.C_token.shape),
        "dC_channel": torch.zeros(b, *inputs.C_channel.shape),
        "dD": torch.zeros(b, *inputs.D.shape),
        "dbias": torch.zeros(b, *inputs.bias.shape),
    }
    rows = dresult.reshape(b, call.tokens, -1, call.width)
    _run("backward", call, inputs, kernels.Gradients(_array(rows), starts, _array(dstate), **sums))
    draw_step = sums["draw_step"].squeeze(3)  # (sets, b, l, d)
    by_name = {
        "x": sums["dx"].view(call.x.shape),
        "dt": draw_step.permute(1, 2, 0, 3),
        "A": sums["dA"].sum(0).transpose(-1, -2),
        "B": _matrix_gradient(call.B, sums["dB_token"], sums["dB_channel"]),
        "C": None if call.C is None else _matrix_gradient(call.C, sums["dC_token"], sums["dC_channel"]),
        "D": None if call.D is None else sums["dD"].sum(0),
        "dt_bias": None if call.dt_bias is None else sums["dbias"].sum(0),
    }
    if call.dt_weight is not None:
        by_name["dt_weight"] = torch.einsum("kbld,blkr->kdr", draw_step, call.dt.float())
        by_name["dt"] = torch.einsum("kbld,kdr->blkr", draw_step, call.dt_weight.float())
    return {name: _packed(gradient) for name, gradient in by_name.items() if gradient is not None}


def _matrix_gradient(matrix: Tensor, token: Tensor, channel: Tensor) -> Tensor:
    """Gradient of B or C from those of its factors, by block of channels and by sample."""
    if matrix.ndim == 3:
        return channel.sum(0).transpose(-1, -2)
    return token.sum(0) if matrix.ndim == 4 else token.sum((0, 1, 2))


def _packed(tensor: Tensor) -> Tensor:
    """The tensor with the strides of a new one; ``contiguous`` leaves those of axes of size 1 as they are."""
    return tensor.contiguous().view(-1).view(tensor.shape)


def _lanes(d: int) -> int:
    """Channels of a block: whole registers, at most LANES, and where ``d`` allows an even number of blocks."""
    pairs = max(1, -(-d // (2 * kernels.LANES)))
    return max(8, -(-d // (2 * pairs) // 8) * 8)


def _blocks(call: ScanCall) -> int:
    return -(-call.width // _lanes(call.width))


def _run(name: str, call: ScanCall, inputs: kernels.Inputs, others: kernels.Outputs | kernels.Gradients) -> None:
    """Runs all units of work on torch's threads, or on this one if there is little to do."""
    units = call.batch * _blocks(call)
    work = call.batch * call.width * call.directions * call.steps * call.states
    threads = torch.get_num_threads() if min(units, work // THREAD_WORK) > 1 else 1
    scratch = torch.empty(threads, kernels.scratch_size(call.states, inputs.chunk), dtype=torch.uint8)
    on_threads(kernels.entry(name).address, kernels.table(units, scratch, inputs, others), threads)
