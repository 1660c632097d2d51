"""The scan in vectorised torch: forward, and a backward written by hand. Runs on every device torch has.

Steps are taken in segments, so that the temporaries of size (b, k, n, d) a step stay in the cache and memory does not
grow with the length of the sequence. Inside a segment tensors lie as (t, b, k, n, d): one step of the recurrence is
then one fused multiply-add over a contiguous slab. The backward pass keeps the state at segment boundaries only,
recomputes inside a segment and runs the adjoint recurrence backwards; derivation in kernels/README.md.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vssm_kernels.scan_call import DIFFERENTIABLE, ScanCall

SEGMENT_ELEMENTS = 1 << 18  # of one (t, b, k, n, d) temporary: 1 MiB in float32, measured best on two cores
CHUNK = 16  # steps that a chunked scan takes in one go
WIDE_STEP = 4096  # elements of a step from which the loop over steps is as fast as chunks


def forward(call: ScanCall) -> tuple[Tensor, Tensor]:
    """Result and last state of ``call`` (the state empty unless asked for)."""
    state = _start(call)
    result = call.A.new_zeros(_rows(call.result_shape), call.width, dtype=call.compute_dtype)
    for segment in _segments(call):
        inputs = _read(call, segment)
        states = _advance(call, inputs, state).states
        _add_rows(result, segment.result_rows, _output(call, inputs, states))
        state = states[-1]
    result = result.view(call.result_shape)
    if call.z is not None:
        result *= F.silu(call.z.to(result.dtype))
    last = state.transpose(-1, -2).clone(memory_format=torch.contiguous_format)
    return result.to(call.result_dtype), last if call.return_last_state else result.new_empty(0)


def backward(call: ScanCall, dy: Tensor, dstate: Tensor) -> dict[str, Tensor]:
    """Gradients of the differentiable inputs of ``call``, by name, in the dtype of the arithmetic."""
    dy = dy.to(call.compute_dtype)
    result, dresult = None, dy
    if call.z is not None:
        result = call.A.new_zeros(_rows(call.result_shape), call.width, dtype=call.compute_dtype)
        dresult = dy * F.silu(call.z.to(call.compute_dtype))
    dresult = dresult.reshape(-1, call.width)

    grads = _Gradients(call)
    segments = list(_segments(call))
    starts = [_start(call)]
    for segment in segments[:-1]:
        starts.append(_advance(call, _read(call, segment), starts[-1]).states[-1].clone())
    dlater = dstate.to(call.compute_dtype).transpose(-1, -2) if call.return_last_state else torch.zeros_like(starts[0])
    for segment in reversed(segments):
        inputs = _read(call, segment)
        path = _advance(call, inputs, starts.pop())
        if result is not None:
            _add_rows(result, segment.result_rows, _output(call, inputs, path.states))
        dy_rows = _take(dresult, segment.result_rows, call.compute_dtype)
        dlater = _adjoint(call, segment, inputs, path, dy_rows, dlater, grads)
    if call.z is not None and result is not None:
        z = call.z.to(call.compute_dtype)
        gate = torch.sigmoid(z)
        grads.by_name["z"] = dy * result.view(call.result_shape) * gate * (1 + z * (1 - gate))
    return grads.by_name


def linear_scan(decay: Tensor, state: Tensor, *, reverse: bool = False) -> None:
    """Computes state[s] += decay[s]·state[s−1] in place, step after step; ``reverse``: state[s] += decay[s]·state[s+1].

    Slabs too small to keep the cores busy are scanned in chunks side by side, then corrected by what the chunk before
    carries over, which is the same recurrence over chunks. Only products of decays appear, so nothing overflows.

    Args:
        decay: (t, ...), contiguous. The row that would link to a step outside is not used.
        state: (t, ...), contiguous.
        reverse: Run from the last step to the first.
    """
    steps = state.shape[0]
    chunks = steps // CHUNK
    if chunks < 2 or state[0].numel() >= WIDE_STEP:
        _loop(decay.unbind(0), state.unbind(0), reverse)
        return
    rest = steps - chunks * CHUNK
    whole = slice(rest, None) if reverse else slice(0, steps - rest)
    _chunked(decay[whole].unflatten(0, (chunks, CHUNK)), state[whole].unflatten(0, (chunks, CHUNK)), reverse)
    tail = slice(0, rest + 1) if reverse else slice(steps - rest - 1, None)
    _loop(decay[tail].unbind(0), state[tail].unbind(0), reverse)


def _loop(decays: tuple[Tensor, ...], states: tuple[Tensor, ...], reverse: bool) -> None:
    if reverse:
        decays, states = decays[::-1], states[::-1]
    for decay, state, before in zip(decays[1:], states[1:], states[:-1], strict=True):
        state.addcmul_(decay, before)


def _chunked(decay: Tensor, state: Tensor, reverse: bool) -> None:
    """:func:`linear_scan` over (chunks, steps of a chunk, ...)."""
    across = decay.clone()  # becomes the decay from outside the chunk to each of its steps
    _loop(decay.unbind(1), state.unbind(1), reverse)
    steps = across.unbind(1)[::-1] if reverse else across.unbind(1)
    for step, before in zip(steps[1:], steps[:-1], strict=True):
        step.mul_(before)
    edge = 0 if reverse else -1
    carried = state[:, edge].contiguous()
    linear_scan(across[:, edge].contiguous(), carried, reverse=reverse)
    if reverse:
        state[:-1].addcmul_(across[:-1], carried[1:, None])
    else:
        state[1:].addcmul_(across[1:], carried[:-1, None])


@dataclass(frozen=True)
class _Rows:
    """Rows of a tensor flattened to (rows, c) that the steps of a segment touch."""

    index: Tensor  # (t, b, k)
    shared: bool  # whether several directions touch the same row, so that writing means adding


@dataclass(frozen=True)
class _Segment:
    """A run of steps of all sequences."""

    x_rows: _Rows  # of (b·l, d) or (b·l·k, d)
    parameter_rows: _Rows  # of dt, B, C as (b·l·k, ...)
    result_rows: _Rows  # of (b·l, d) or (b·l·k, d)
    gap: Tensor | None  # (t, b or 1, k)


def per_sample(table: Tensor) -> Tensor:
    """An order or gaps with an axis of samples: (k, t) -> (1, k, t)."""
    return table[None] if table.ndim == 2 else table


def _segments(call: ScanCall) -> Iterator[_Segment]:
    """Segments in the order of time. One never crosses the joint of two chained rows, so its tokens are distinct."""
    device, b, k, t = call.x.device, call.batch, call.directions, call.steps
    order = torch.arange(t, device=device).expand(1, k, t) if call.order is None else per_sample(call.order).long()
    gap = None if call.gap is None else per_sample(call.gap)
    sequence = torch.arange(call.sequences, device=device)
    first_row = torch.arange(b, device=device)[:, None] * call.tokens
    length = max(CHUNK, SEGMENT_ELEMENTS // max(1, b * call.sequences * call.width * call.states))
    for rows in [slice(i, i + 1) for i in range(k)] if call.chain else [slice(0, k)]:
        direction = torch.arange(k, device=device)[rows]
        for start in range(0, t, length):
            steps = slice(start, start + length)
            token = first_row + order[:, rows, steps].permute(2, 0, 1)  # (t, b, k), counted through the batch
            row = token
            if call.params == "step":
                row = first_row + torch.arange(t, device=device)[steps, None, None]
            apart, several = token * k + direction, k > 1
            yield _Segment(
                x_rows=_Rows(token, several) if call.x.ndim == 3 else _Rows(apart, False),
                parameter_rows=_Rows(row * call.sequences + sequence, call.chain and several),
                result_rows=_Rows(token, several) if call.merge else _Rows(apart, False),
                gap=None if gap is None else gap[:, rows, steps].permute(2, 0, 1),
            )


@dataclass(frozen=True)
class _Inputs:
    """What one segment reads, in the dtype of the arithmetic."""

    x: Tensor  # (t, b, k, d)
    low_rank: Tensor | None  # (t, b, k, r)
    raw_step: Tensor  # (t, b, k, d), before softplus
    step: Tensor  # (t, b, k, d)
    decay_step: Tensor  # step, or step + gap·idle step
    B: Tensor  # broadcasts to (t, b, k, n, d)
    C: Tensor


def _read(call: ScanCall, segment: _Segment) -> _Inputs:
    dtype = call.compute_dtype
    raw = _take(call.dt, segment.parameter_rows, dtype)
    low_rank = None
    if call.dt_weight is not None:
        low_rank = raw
        raw = torch.einsum("tbkr,kdr->tbkd", low_rank, call.dt_weight.to(dtype))
    if call.dt_bias is not None:
        raw = raw + call.dt_bias.to(dtype)
    step = F.softplus(raw) if call.softplus else raw
    decay_step = step
    if segment.gap is not None:
        decay_step = torch.addcmul(step, segment.gap[..., None].to(dtype), _idle_step(call))
    C = call.A.new_ones(call.sequences, 1) if call.C is None else call.C
    return _Inputs(
        _take(call.x, segment.x_rows, dtype), low_rank, raw, step, decay_step,
        _read_matrix(call.B, segment, dtype), _read_matrix(C, segment, dtype),
    )  # fmt: skip


def _take(tensor: Tensor, rows: _Rows, dtype: torch.dtype) -> Tensor:
    """``rows`` of ``tensor`` flattened to (rows, c) -> (t, b, k, c)."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat.index_select(0, rows.index.reshape(-1)).to(dtype).unflatten(0, rows.index.shape)


def _read_matrix(matrix: Tensor, segment: _Segment, dtype: torch.dtype) -> Tensor:
    """B or C of a segment, broadcasting to (t, b, k, n, d)."""
    if matrix.ndim == 4:
        return _take(matrix, segment.parameter_rows, dtype)[..., None]
    return matrix.to(dtype)[..., None] if matrix.ndim == 2 else matrix.to(dtype).transpose(-1, -2)


def _start(call: ScanCall) -> Tensor:
    """The zero state, (b, k, n, d)."""
    return call.A.new_zeros(call.batch, call.sequences, call.states, call.width, dtype=call.compute_dtype)


def _rows(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])


@dataclass(frozen=True)
class _Path:
    """The recurrence over one segment."""

    start: Tensor  # state before the first step, (b, k, n, d)
    decay: Tensor  # (t + 1, b, k, n, d); the last row is unused space
    states: Tensor  # (t, b, k, n, d)


def _advance(call: ScanCall, inputs: _Inputs, start: Tensor) -> _Path:
    steps = inputs.step.shape[0]
    decay = inputs.step.new_empty(steps + 1, *start.shape)
    _exp_(torch.mul(inputs.decay_step[..., None, :], _rates(call), out=decay[:steps]))
    states = inputs.B * (inputs.step * inputs.x)[..., None, :]
    states[0].addcmul_(decay[0], start)
    linear_scan(decay[:steps], states)
    return _Path(start, decay, states)


def _exp_(exponent: Tensor) -> None:
    """Exponential in place. CUDA's errs to one side near 1, which thousands of steps add up; its expm1 does not."""
    if exponent.is_cuda:
        exponent.expm1_().add_(1)
    else:
        exponent.exp_()


def _rates(call: ScanCall) -> Tensor:
    """A as (k, n, d)."""
    return call.A.to(call.compute_dtype).transpose(-1, -2)


def _idle_step(call: ScanCall) -> Tensor:
    """The step of a token of zeros, (k, d): what a dropped token adds to the decay."""
    bias = torch.zeros_like(call.A[..., 0]) if call.dt_bias is None else call.dt_bias
    bias = bias.to(call.compute_dtype)
    return F.softplus(bias) if call.softplus else bias


def _output(call: ScanCall, inputs: _Inputs, states: Tensor) -> Tensor:
    """C·h + D·x of one segment, (t, b, k, d)."""
    y = _sum_over_states(inputs.C, states)
    return y if call.D is None else y.addcmul(call.D.to(y.dtype), inputs.x)


def _sum_over_states(matrix: Tensor, states: Tensor) -> Tensor:
    """Σ_n matrix·states, (t, b, k, d)."""
    if states.shape[-2] == 1:
        return (matrix * states).squeeze(-2)
    if matrix.shape[-1] > 1:
        return (matrix * states).sum(-2)
    return (matrix.transpose(-1, -2) @ states).squeeze(-2)


def _sum_over_channels(states: Tensor, rows: Tensor, matrix: Tensor) -> Tensor:
    """The gradient of ``matrix``, B or C, from Σ states·rows: (t, b, k, n), or for a constant (k, n) or (k, n, d)."""
    if matrix.shape[-1] > 1:  # a constant per channel
        return (states * rows[..., None, :]).sum((0, 1))
    product = (states @ rows[..., None]).squeeze(-1)
    return product if matrix.ndim == 5 else product.sum((0, 1))


def _add_rows(target: Tensor, rows: _Rows, values: Tensor) -> None:
    """Adds values (t, b, k, c) to ``rows`` of target (rows, c), which starts from zero."""
    if not rows.shared:
        target.index_copy_(0, rows.index.reshape(-1), values.flatten(0, 2))
        return
    for i in range(values.shape[2]):  # the rows of one direction are distinct
        index = rows.index[:, :, i].reshape(-1)
        target.index_copy_(0, index, target.index_select(0, index) + values[:, :, i].flatten(0, 1))


class _Gradients:
    """Sums of the gradients over segments, in the dtype of the arithmetic, rows flattened as in :class:`_Segment`."""

    def __init__(self, call: ScanCall) -> None:
        def zeros(tensor: Tensor) -> Tensor:
            return torch.zeros(tensor.shape, dtype=call.compute_dtype, device=tensor.device)

        present = ((name, getattr(call, name)) for name in DIFFERENTIABLE if name != "z")
        self.by_name = {name: zeros(tensor) for name, tensor in present if tensor is not None}

    def add_rows(self, name: str, rows: _Rows, values: Tensor) -> None:
        """Adds (t, b, k, c) to the rows of a token tensor."""
        target = self.by_name[name]
        _add_rows(target.view(-1, target.shape[-1]), rows, values)

    def add_matrix(self, name: str, rows: _Rows, values: Tensor) -> None:
        """Adds the gradient of B or C as :func:`_sum_over_channels` gives it."""
        target = self.by_name[name]
        if target.ndim == 4:
            self.add_rows(name, rows, values)
        else:  # a constant, (k, n) or (k, d, n)
            target += values.transpose(-1, -2) if values.ndim == 3 else values.view(target.shape)


def _adjoint(
    call: ScanCall, segment: _Segment, inputs: _Inputs, path: _Path, dy: Tensor, dlater: Tensor, grads: "_Gradients"
) -> Tensor:
    """Runs one segment backwards, adds to ``grads`` and returns the gradient of the state before the segment.

    Consumes ``path.decay``, the largest temporary beside the states.
    """
    dstates = inputs.C * dy[..., None, :]  # (t, b, k, n, d)
    dstates[-1] += dlater
    linear_scan(path.decay[1:], dstates, reverse=True)
    dearlier = path.decay[0] * dstates[0]

    source = inputs.step * inputs.x
    grads.add_matrix("B", segment.parameter_rows, _sum_over_channels(dstates, source, inputs.B))
    if call.C is not None:
        grads.add_matrix("C", segment.parameter_rows, _sum_over_channels(path.states, dy, inputs.C))
    dsource = _sum_over_states(inputs.B, dstates)

    dexponent = path.decay[:-1]  # d loss / d (decay_step·A), in the memory of the decay
    dexponent[1:] *= path.states[:-1]
    dexponent[0] *= path.start
    dexponent *= dstates
    ddecay_step = (dexponent * _rates(call)).sum(-2)
    grads.by_name["A"] += dexponent.mul_(inputs.decay_step[..., None, :]).sum((0, 1)).transpose(-1, -2)

    dx = inputs.step * dsource
    if call.D is not None:
        dx.addcmul_(call.D.to(dx.dtype), dy)
        grads.by_name["D"] += (dy * inputs.x).sum((0, 1))
    grads.add_rows("x", segment.x_rows, dx)
    _adjoint_of_step(call, segment, inputs, ddecay_step.addcmul(inputs.x, dsource), ddecay_step, grads)
    return dearlier


def _adjoint_of_step(
    call: ScanCall, segment: _Segment, inputs: _Inputs, dstep: Tensor, ddecay_step: Tensor, grads: "_Gradients"
) -> None:
    """From the gradient of the step, (t, b, k, d), to those of dt, dt_weight and dt_bias."""
    draw = dstep * torch.sigmoid(inputs.raw_step) if call.softplus else dstep
    if call.dt_bias is not None:
        grads.by_name["dt_bias"] += draw.sum((0, 1))
        if segment.gap is not None:
            didle = (ddecay_step * segment.gap[..., None]).sum((0, 1))
            bias = call.dt_bias.to(didle.dtype)
            grads.by_name["dt_bias"] += didle * torch.sigmoid(bias) if call.softplus else didle
    if call.dt_weight is not None:
        grads.by_name["dt_weight"] += torch.einsum("tbkd,tbkr->kdr", draw, inputs.low_rank)
        draw = torch.einsum("tbkd,kdr->tbkr", draw, call.dt_weight.to(draw.dtype))
    grads.add_rows("dt", segment.parameter_rows, draw)
