"""The ops in operators that every runtime has, for programs that are to run without this package.

The scan goes by chunks: the steps of a chunk run one after the other, those of all chunks side by side, and what the
chunks carry over is the same recurrence, over chunks. The graph therefore grows with the logarithm of the length. Only
products of decays appear, which are not above 1, so nothing overflows.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import statically_known_true

from vssm_kernels import causal_conv, library  # noqa: F401  they register the ops
from vssm_kernels.scan_call import ScanCall

CHUNK = 8  # steps of a chunk: fewer make more levels of chunks, more make larger graphs
LEVELS = 6  # of chunks of chunks, at most: enough for 8**6 steps


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Writes each op of the forward pass in operators of torch alone.

    Args:
        program: A program for inference. Sequences may have CHUNK**LEVELS steps at most; a max of its dynamic sizes
            spares levels of chunks that are not needed.

    Raises:
        ValueError: If a sequence is longer.
    """
    # Else sizes that are 1 for the example, such as the number of chunks on some level, would be 1 for good.
    with cast(Any, torch.fx.experimental._config).patch(backed_size_oblivious=True):
        return program.run_decompositions(PLAIN)


def plain_scan(*args: Any) -> tuple[Tensor, Tensor]:
    """The op ``vssm::scan``; arguments and results as there."""
    call = ScanCall(*args)
    table = _Table(call)
    x = _take_tokens(call.x, table.x_rows, call.compute_dtype)
    step, decay_step = _steps(call, table)
    rates = call.A.to(step.dtype).transpose(-1, -2)[:, None]  # (k, 1, n, d)
    decay = torch.exp(decay_step[..., None, :] * rates)  # (t, k, b, n, d)
    states = linear_scan(decay, _matrix(call.B, table, step.dtype) * (step * x)[..., None, :])
    y = states.squeeze(-2) if call.C is None else _sum_over_states(_matrix(call.C, table, step.dtype), states)
    if call.D is not None:
        y = y + call.D.to(y.dtype)[:, None] * x
    result = table.place(y)
    if call.z is not None:
        result = result * F.silu(call.z.to(result.dtype))
    if not call.return_last_state:
        return result.to(call.result_dtype), result.new_empty(0)
    steps = call.steps * call.directions // call.sequences
    return result.to(call.result_dtype), states[steps - 1].permute(1, 0, 3, 2).contiguous()


def linear_scan(decay: Tensor, source: Tensor, *, levels: int = LEVELS) -> Tensor:
    """Computes h[s] = decay[s]·h[s−1] + source[s] from h[−1] = 0.

    Args:
        decay: (t, ...), from 0 to 1; that of the first step is not used.
        source: (t, ...).
        levels: Levels of chunks that there may be; a length that is a symbol without a bound has all of them.

    Returns:
        h, (t, ...).

    Raises:
        ValueError: If there are more steps than so many levels can take.
    """
    steps = source.shape[0]
    if statically_known_true(steps > CHUNK**levels):
        raise ValueError(f"linear_scan: expected at most {CHUNK**levels} steps, got {steps}")
    last = levels == 1 or statically_known_true(_chunks(steps) == 1)
    chunks = 1 if last else _chunks(steps)
    decays, sources = (_padded(each).unflatten(0, (chunks, CHUNK)).split(1, dim=1) for each in (decay, source))
    states = [sources[0]]
    for each, added in zip(decays[1:], sources[1:], strict=True):
        states.append(each * states[-1] + added)
    h = torch.cat(states, dim=1)
    if not last:
        across = [decays[0]]  # decay from the chunk before to each step
        for each in decays[1:]:
            across.append(each * across[-1])
        carried = linear_scan(across[-1].squeeze(1), states[-1].squeeze(1), levels=levels - 1)
        before = torch.cat([torch.zeros_like(carried[:1]), carried[:-1]])
        h = h + torch.cat(across, dim=1) * before[:, None]
    h = h.flatten(0, 1)
    return h if statically_known_true(h.shape[0] == steps) else h.narrow(0, 0, steps)


def _padded(rows: Tensor) -> Tensor:
    """Rows (t, ...) with as many zeros as the last chunk lacks."""
    whole = _chunks(rows.shape[0]) * CHUNK
    if statically_known_true(whole == rows.shape[0]):
        return rows
    # First as many zeros as are ever missing: a number of them that may be 0 or 1 is a case of its own to torch.export.
    return torch.cat([rows, rows.new_zeros(CHUNK - 1, *rows.shape[1:])]).narrow(0, 0, whole)


def _chunks(steps: int) -> int:
    return (steps + CHUNK - 1) // CHUNK


class _Table:
    """Which rows of its tensors each step of a scan reads, as (t, k), or (t, k, b) where samples differ.

    A chain is one sequence, k = 1. ``x_rows`` are tokens of (l, b, d) or rows of (l·k, b, d), ``parameter_rows`` rows
    of dt, B and C as (l·k, b, ...). ``gap`` is (t, k, 1 or b, 1). Steps fill whole chunks: those after the last one
    read the first row, for nobody, which costs less than zeros added to tensors with states.
    """

    def __init__(self, call: ScanCall) -> None:
        self._call = call
        k, t, device = call.directions, call.steps, call.x.device
        self._step = torch.arange(t, device=device)
        self._order = self._step.expand(k, t) if call.order is None else call.order.long()
        self._direction = torch.arange(k, device=device)[:, None]
        row = self._order if call.params == "token" else self._step.expand_as(self._order)
        self.x_rows = self._steps_first(self._order if call.x.ndim == 3 else self._order * k + self._direction)
        self.parameter_rows = self._steps_first(row if call.chain else row * k + self._direction)
        gap = None if call.gap is None else self._steps_first(call.gap)
        self.gap = gap if gap is None else gap.reshape(*gap.shape[:2], -1, 1)

    def place(self, y: Tensor) -> Tensor:
        """Puts steps (t, k, b, d) to the places of their tokens, 0 where a direction does not go, as the result has it.

        Each token looks its step up, rather than each step its token: reading is parallel everywhere, adding is not.
        """
        call, k, t = self._call, self._call.directions, self._call.steps
        if call.chain:
            y = y.narrow(0, 0, k * t).squeeze(1).unflatten(0, (k, t)).transpose(0, 1)
        if not statically_known_true(t == call.tokens):
            y = torch.cat([y.narrow(0, 0, t), torch.zeros_like(y[:1])])
        never = self._order.new_full((*self._order.shape[:-1], call.tokens), t)
        step = never.scatter(-1, self._order, self._step.expand_as(self._order))
        result = _take(y.flatten(0, 1), self._tokens_first(step * k + self._direction), y.dtype)  # (l, k, b, d)
        return result.sum(1).transpose(0, 1) if call.merge else result.permute(2, 0, 1, 3)

    def _steps_first(self, steps: Tensor) -> Tensor:
        """(k, t) or (b, k, t) as (t, k) or (t, k, b), a chain as (k·t, 1) or (k·t, 1, b), in whole chunks."""
        return _padded(self._tokens_first(steps.flatten(-2).unsqueeze(-2) if self._call.chain else steps))

    def _tokens_first(self, table: Tensor) -> Tensor:
        return table.permute(*reversed(range(table.ndim)))


def _take(tensor: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a tensor (rows, b, c): (t, k) ones, or (t, k, b) where samples differ, as (t, k, b, c)."""
    if rows.ndim == 3:
        batch = tensor.shape[1]
        tensor, rows = tensor.flatten(0, 1), rows * batch + torch.arange(batch, device=rows.device)
    return tensor.to(dtype).index_select(0, rows.reshape(-1)).unflatten(0, rows.shape)


def _take_tokens(tensor: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a tensor (b, l, c) or (b, l, k, c), as (t, k, b, c)."""
    return _take(tensor.transpose(0, 1) if tensor.ndim == 3 else tensor.permute(1, 2, 0, 3).flatten(0, 1), rows, dtype)


def _steps(call: ScanCall, table: _Table) -> tuple[Tensor, Tensor]:
    """Step sizes (t, k, b, d) of the input and of the decay, which differ where tokens are left out."""
    raw = _take_tokens(call.dt, table.parameter_rows, call.compute_dtype)
    if call.dt_weight is not None:
        raw = torch.einsum("tkbr,kdr->tkbd", raw, call.dt_weight.to(raw.dtype))
    bias = torch.zeros_like(call.A[..., 0]) if call.dt_bias is None else call.dt_bias
    idle = bias.to(raw.dtype)[:, None]
    step = raw + idle
    if call.softplus:
        step, idle = F.softplus(step), F.softplus(idle)
    return step, step if table.gap is None else step + table.gap.to(step.dtype) * idle


def _matrix(matrix: Tensor, table: _Table, dtype: torch.dtype) -> Tensor:
    """B or C, broadcasting to (t, k, b, n, d)."""
    if matrix.ndim == 4:
        return _take_tokens(matrix, table.parameter_rows, dtype)[..., None]
    constant = matrix[..., None] if matrix.ndim == 2 else matrix.transpose(-1, -2)
    return constant.to(dtype)[:, None]


def _sum_over_states(matrix: Tensor, states: Tensor) -> Tensor:
    """Σ_n matrix·states, (t, k, b, d)."""
    if states.shape[-2] == 1 or matrix.shape[-1] > 1:
        return (matrix * states).sum(-2)
    return (matrix.transpose(-1, -2) @ states).squeeze(-2)


def plain_causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool], activation: bool
) -> Tensor:
    """The op ``vssm::causal_conv``; arguments and result as there."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, torch.float32), weight.dtype)
    taps = weight.shape[-1]
    results = []
    for i, backwards in enumerate(reverse):
        padded = F.pad(x.to(dtype), (0, 0, 0, taps - 1) if backwards else (0, 0, taps - 1, 0))
        y = None if bias is None else bias[i].to(dtype)
        for j in range(taps):
            first = taps - 1 - j if backwards else j
            part = padded[:, first : first + x.shape[1]] * weight[i, :, j].to(dtype)
            y = part if y is None else y + part
        results.append(y)
    y = torch.stack(results, dim=2)
    return (F.silu(y) if activation else y).to(x.dtype)


PLAIN: dict[Any, Callable[..., Any]] = {
    torch.ops.vssm.scan.default: plain_scan,
    torch.ops.vssm.causal_conv.default: plain_causal_conv,
}
