"""The compiled loops of the CPU scan: time is sequential, and a vector register holds channels.

The unit of work is one sample and a block of channels, all directions: units share no output, so any number of threads
may take them, and the result has the same bits. Blocks are padded with zeros to whole registers. The steps are taken in
chunks, which are gathered into memory that stays in the first-level cache; each state of a channel then runs through a
chunk on its own. Derivation of the adjoint in kernels/README.md.

Threads come here without the interpreter, whose lock would make them wait for one another: what they read is a table of
addresses, and a counter in it hands out the units.

Everything compiled stands in this one file: numba's cache follows changes of the file that defines a function, not of
those that it calls. What it keeps names no type of ours: its index outlives an upgrade, and could not be read after one
that removes a type.
"""

import ctypes
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import event
from numba.extending import intrinsic
from numpy import float32, float64, int32, int64

_logger = logging.getLogger("vssm")

LANES = 64


_Array = Any  # a tensor where a table is made, a numpy array in compiled code


class Inputs(NamedTuple):
    """What both passes read; float32 but for ``order``, contiguous, channels last.

    B and C are products of a factor per token and a factor per channel, of which one is 1 and left empty.
    """

    x: _Array  # (b, l, k or 1, d)
    raw_step: _Array  # (sets, b, l, 1, d), without bias; sets is k, or 1 where directions are chained
    A_log2: _Array  # (sets, n, d), A·log2(e): decays are powers of 2
    B_token: _Array  # (b, l or 1, sets, n)
    B_channel: _Array  # (sets, n, d)
    C_token: _Array  # as B
    C_channel: _Array
    D: _Array  # (sets, d)
    bias: _Array  # (sets, d)
    order: _Array  # (b or 1, k, t), int32
    gap: _Array  # (b or 1, k, t)
    softplus: bool
    by_step: bool  # params="step"
    chunk: int  # steps taken at a time
    lanes: int  # channels of a block, with the padding: at most LANES


class Outputs(NamedTuple):
    """What the forward pass writes."""

    result: _Array  # (b, l, k or 1, d), zeros before
    starts: _Array  # (b, k, chunks, n, d), the state before every chunk; empty if nobody needs it
    state: _Array  # (b, sets, n, d)
    z: _Array  # read: the gate, as result; empty if there is none


class Gradients(NamedTuple):
    """What the backward pass reads and writes; sums over samples and blocks of channels are left to the caller."""

    dresult: _Array  # (b, l, k or 1, d)
    starts: _Array  # (b, k, chunks, n, d)
    dstate: _Array  # (b, sets, n, d)
    dx: _Array  # as x, zeros before, like all that follow
    draw_step: _Array  # as raw_step
    dA: _Array  # (b, sets, n, d)
    dB_token: _Array  # (blocks, b, l or 1, sets, n)
    dB_channel: _Array  # (b, sets, n, d), or empty
    dC_token: _Array
    dC_channel: _Array
    dD: _Array  # (b, sets, d)
    dbias: _Array  # (b, sets, d)


# A table of 64-bit integers: counters of units and threads taken, the number of units, the scratch memory and its size
# per thread, the options of Inputs, and for each tensor its address and 5 sizes.
_NEXT, _THREAD, _UNITS, _SCRATCH, _SCRATCH_SIZE, _OPTIONS = 0, 1, 2, 3, 4, 5
_TENSORS, _TENSOR = 9, 6


def table(units: int, scratch: Any, inputs: Inputs, others: Outputs | Gradients) -> Any:
    """What ``entry`` reads, for so many units, and a row of ``scratch`` per thread; the tensors must outlive it."""
    values = [0, 0, units, scratch.data_ptr(), scratch.stride(0), *inputs[11:]]
    for tensor in (*inputs[:11], *others):
        values += (tensor.data_ptr(), *(1,) * (5 - tensor.ndim), *tensor.shape)
    return (ctypes.c_int64 * len(values))(*values)


class _Place(NamedTuple):
    """A chunk of steps of one direction, in one block of channels of one sample."""

    sample: int
    direction: int
    parameters: int  # the set that the direction uses
    begin: int
    length: int  # at most inputs.chunk
    block: int
    channel: int  # the first one of the block
    width: int  # its number of channels
    lanes: int  # the same, with the padding


class _Scratch(NamedTuple):
    """What one unit works on.

    What belongs to one step is one array of several rows of LANES, at constant distances: the compiler sees that they
    do not overlap, and vectorises without asking at run time. States likewise. The names of the rows are below.
    """

    steps: np.ndarray  # (chunk, rows of a step)
    states: np.ndarray  # (n, rows of a state)
    channels: np.ndarray  # (rows,)
    sums: np.ndarray  # (rows,), in float64: few numbers, and long sums that may cancel
    B: np.ndarray  # (chunk, n)
    C: np.ndarray
    dB: np.ndarray
    dC: np.ndarray
    B_per_channel: bool  # else the factor of the channels is 1
    C_per_channel: bool


_X, _RAW, _STEP, _DECAY_STEP, _SOURCE, _Y, _DECAY, _BEFORE, _AFTER, _DSTATE, _DSOURCE, _DDECAY_STEP, _DX, _DRAW = (
    row * LANES for row in range(14)
)
_STEP_ROWS = 14 * LANES
_A, _B, _C, _STATE, _CARRY, _DA, _DB, _DC = (row * LANES for row in range(8))
_STATE_ROWS = 8 * LANES
_D, _BIAS, _IDLE_STEP, _IDLE_SLOPE = (row * LANES for row in range(4))
_CHANNEL_ROWS = 4 * LANES
_DD, _DBIAS, _DIDLE = (row * LANES for row in range(3))
_SUM_ROWS = 3 * LANES


def _compiled(*, returns_arrays: bool = False, reorder_sums: bool = False) -> Callable[[Callable], Any]:
    """Decorator for what other compiled functions call; compiles with them.

    Only those that return arrays count references. Memory is never allocated here, and half of the code would do that.
    """
    options = _options(reorder_sums)
    options |= {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    if not returns_arrays:
        options["_nrt"] = False
    return numba.njit(**options)


def _options(reorder_sums: bool = False) -> dict[str, Any]:
    flags = {"contract", "reassoc", "nsz"} if reorder_sums else {"contract"}
    return {"error_model": "numpy", "fastmath": flags}


@functools.cache
def entry(name: str) -> Any:
    """``forward`` or ``backward`` as a C function of a table's address, from numba's cache or compiled now."""
    with event.install_listener("numba:compile", _Announcement(name)):
        return _callback(forward if name == "forward" else backward)


def _callback(function: Callable) -> Any:
    """Compiles a function of one pointer, and keeps the code on disk where there is a place for it."""
    try:
        return numba.cfunc(types.void(types.voidptr), cache=True, **_options())(function)
    except RuntimeError:  # neither beside this file nor in the user's home can anything be written
        return numba.cfunc(types.void(types.voidptr), **_options())(function)


class _Announcement(event.Listener):
    """Says in the log that something is being compiled: it takes long, and most other calls find it in the cache."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._said = False

    def on_start(self, event: Any) -> None:
        if not self._said:
            self._said = True
            _logger.warning("scan backend: compiling the %s scan for this CPU, once; some 10 s", self._name)

    def on_end(self, event: Any) -> None:
        pass


def _intrinsic(generate: Callable) -> Any:
    """Numba's decorator: calls of what it makes leave the first argument out."""
    return intrinsic(generate)


@_intrinsic
def _memory(typing: Any, address: Any) -> Any:
    """The pointer of an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), generate


@_intrinsic
def _increment(typing: Any, counts: Any, i: Any) -> Any:
    """Adds 1 to ``counts[i]`` whatever other threads do, and returns what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [arguments[1]]), ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(counts, types.intp), generate


@_intrinsic
def _use_wide_registers(typing: Any) -> Any:
    """Lets the loops of the calling function use registers of 512 bits, where LLVM would take half of them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # its own add knows no such attributes
        return context.get_dummy_value()

    return types.void(), generate


# Constants are float32: a float64 among them would widen the arithmetic. Polynomials are fitted to float32's precision.
_ZERO, _ONE, _TWO = float32(0), float32(1), float32(2)
_LOG2_E, _LN2_HIGH, _LN2_LOW = float32(1.4426950408889634), float32(0.693145751953125), float32(1.42860682e-6)
_LN2 = float32(0.6931471805599453)
_ROUND = float32((3 << 22) + 127)  # added to a small number, leaves its nearest integer + 127 in the last bits
_MIN_POWER, _MAX_POWER = float32(-127), float32(128.25)  # 0 and infinity in the exponent bits; infinity·0 is NaN
_P1, _P2, _P3, _P4, _P5, _P6 = (
    float32(c) for c in (0.693147188, 0.240226509, 0.055503571, 0.00961805667, 0.00133908674, 0.000154614475)
)
_L3, _L5, _L7, _L9 = (float32(c) for c in (0.33333319, 0.2000386, 0.1411654, 0.13436028))


@_compiled()
def exp2(x: Any) -> Any:
    """2^x."""
    clipped = _MAX_POWER if x > _MAX_POWER else x  # written so that NaN stays NaN
    clipped = _MIN_POWER if clipped < _MIN_POWER else clipped
    shifted = clipped + _ROUND
    return _power(shifted, clipped - (shifted - _ROUND))


@_compiled()
def exp(x: Any) -> Any:
    """e^x, with the remainder in two steps: |x| log2(e) is not rounded."""
    clipped = float32(89) if x > float32(89) else x
    clipped = float32(-88) if clipped < float32(-88) else clipped
    shifted = clipped * _LOG2_E + _ROUND
    k = shifted - _ROUND
    return _power(shifted, (clipped - k * _LN2_HIGH - k * _LN2_LOW) * _LOG2_E)


@_compiled()
def _power(shifted: Any, r: Any) -> Any:
    """2^(k + r) from ``_ROUND`` + k and |r| ≤ 1/2; 1 is added last, so that decays near 1 are right to the last bit."""
    rest = r * (_P1 + r * (_P2 + r * (_P3 + r * (_P4 + r * (_P5 + r * _P6)))))
    power = int32(float32(shifted).view(int32) << 23).view(float32)  # k + 127 is its exponent
    return power + power * rest


@_compiled()
def softplus(x: Any) -> Any:
    """max(x, 0) + log(1 + e^−|x|), the logarithm as 2 artanh(e / (2 + e))."""
    e = exp(-abs(x))
    s = e / (_TWO + e)
    w = s * s
    return max(x, _ZERO) + _TWO * (s + s * w * (_L3 + w * (_L5 + w * (_L7 + w * _L9))))


@_compiled()
def sigmoid(x: Any) -> Any:
    """Derivative of softplus."""
    e = exp(-abs(x))
    return (_ONE if x > _ZERO else e) / (_ONE + e)


def forward(address: Any) -> None:
    """Scans units until none is left; the table holds Inputs and Outputs."""
    table = carray(address, (_TENSORS + 15 * _TENSOR,), int64)
    inputs = _inputs(table)
    rows = _rows(table)
    result, starts, state, z = _tensor(rows[11]), _tensor(rows[12]), _tensor(rows[13]), _tensor(rows[14])
    outputs = Outputs(result[0], starts, state[0], z[0])
    scratch = _scratch(table[_SCRATCH] + _increment(table, _THREAD) * table[_SCRATCH_SIZE], inputs)
    unit = _increment(table, _NEXT)
    while unit < table[_UNITS]:
        _forward(unit, inputs, outputs, scratch)
        unit = _increment(table, _NEXT)


def backward(address: Any) -> None:
    """Gradients of units until none is left; the table holds Inputs and Gradients."""
    table = carray(address, (_TENSORS + 23 * _TENSOR,), int64)
    inputs = _inputs(table)
    gradients = _gradients(table)
    scratch = _scratch(table[_SCRATCH] + _increment(table, _THREAD) * table[_SCRATCH_SIZE], inputs)
    unit = _increment(table, _NEXT)
    while unit < table[_UNITS]:
        _backward(unit, inputs, gradients, scratch)
        unit = _increment(table, _NEXT)


@_compiled(returns_arrays=True)
def _rows(table: np.ndarray) -> np.ndarray:
    """Those of the tensors: address and sizes."""
    return table[_TENSORS:].reshape(-1, _TENSOR)


@_compiled(returns_arrays=True)
def _tensor(row: np.ndarray) -> np.ndarray:
    """With 5 axes, of which the first ones may be of size 1."""
    return carray(_memory(row[0]), (row[1], row[2], row[3], row[4], row[5]), float32)


@_compiled(returns_arrays=True)
def _inputs(table: np.ndarray) -> Inputs:
    options, rows = table[_OPTIONS:], _rows(table)
    return Inputs(
        _tensor(rows[0])[0], _tensor(rows[1]), _tensor(rows[2])[0, 0], _tensor(rows[3])[0],
        _tensor(rows[4])[0, 0], _tensor(rows[5])[0], _tensor(rows[6])[0, 0], _tensor(rows[7])[0, 0, 0],
        _tensor(rows[8])[0, 0, 0], _tensor(rows[9])[0, 0].view(int32), _tensor(rows[10])[0, 0],
        options[0] != 0, options[1] != 0, options[2], options[3],
    )  # fmt: skip


@_compiled(returns_arrays=True)
def _gradients(table: np.ndarray) -> Gradients:
    rows = _rows(table)
    return Gradients(
        _tensor(rows[11])[0], _tensor(rows[12]), _tensor(rows[13])[0], _tensor(rows[14])[0], _tensor(rows[15]),
        _tensor(rows[16])[0], _tensor(rows[17]), _tensor(rows[18])[0], _tensor(rows[19]), _tensor(rows[20])[0],
        _tensor(rows[21])[0, 0], _tensor(rows[22])[0, 0],
    )  # fmt: skip


@_compiled()
def _forward(unit: int, inputs: Inputs, outputs: Outputs, scratch: _Scratch) -> None:
    sets = inputs.A_log2.shape[0]
    k, steps = inputs.order.shape[1:]
    _empty(scratch)
    for i in range(k):
        place = _place(inputs, unit, i, 0)
        if i < sets:  # the start of a sequence; else the row before goes on
            _load_parameters(inputs, place, scratch)
            _clear(scratch, _STATE)
        for begin in range(0, steps, inputs.chunk):
            place = _place(inputs, unit, i, begin)
            if outputs.starts.size:
                _store_states(scratch, _STATE, outputs.starts[place.sample, i, begin // inputs.chunk], place)
            _load_steps(inputs, place, scratch)
            for j in range(scratch.B.shape[1]):
                _advance(place, scratch, j)
            _add_rows(scratch, _Y, outputs.result, inputs, place, False)
        if i == k - 1 or sets == k:
            _store_states(scratch, _STATE, outputs.state[place.sample, place.parameters], place)
    if outputs.z.size:
        _apply_gate(_place(inputs, unit, 0, 0), outputs)


@_compiled()
def _backward(unit: int, inputs: Inputs, gradients: Gradients, scratch: _Scratch) -> None:
    """From the last chunk to the first."""
    sets = inputs.A_log2.shape[0]
    k, steps = inputs.order.shape[1:]
    _empty(scratch)
    for i in range(k - 1, -1, -1):
        place = _place(inputs, unit, i, 0)
        if i == k - 1 or sets == k:  # the end of a sequence
            _load_parameters(inputs, place, scratch)
            _load_states(gradients.dstate[place.sample, place.parameters], place, scratch, _CARRY)
            for row in (_DA, _DB, _DC):
                _clear(scratch, row)
            scratch.sums[:] = 0
        for begin in range((steps - 1) // inputs.chunk * inputs.chunk, -1, -inputs.chunk):
            place = _place(inputs, unit, i, begin)
            _load_steps(inputs, place, scratch)
            _load_rows(gradients.dresult, inputs, place, scratch, _Y, False)
            starts = gradients.starts[place.sample, i, begin // inputs.chunk]
            for j in range(scratch.B.shape[1]):
                _recompute(place, scratch, j, starts[j])
                _adjoint_recurrence(place, scratch, j)
                _adjoint_of_matrices(gradients, place, scratch, j)
            _adjoint_of_step(inputs, place, scratch)
            _add_gradients(inputs, place, scratch, gradients)
        if i < sets:
            _store_sums(scratch, place, gradients)


@_compiled()
def _place(inputs: Inputs, unit: int, direction: int, begin: int) -> _Place:
    sets, _, d = inputs.A_log2.shape
    lanes = inputs.lanes
    blocks = (d + lanes - 1) // lanes
    block = unit % blocks
    channel = block * lanes
    length = min(inputs.chunk, inputs.order.shape[2] - begin)
    width = min(lanes, d - channel)
    return _Place(unit // blocks, direction, min(direction, sets - 1), begin, length, block, channel, width, lanes)


def scratch_size(states: int, chunk: int) -> int:
    """Bytes that one thread needs."""
    return 8 * _SUM_ROWS + 4 * (chunk * (_STEP_ROWS + 4 * states) + states * _STATE_ROWS + _CHANNEL_ROWS)


@_compiled(returns_arrays=True)
def _scratch(address: int, inputs: Inputs) -> _Scratch:
    """Parts of the memory at an address, zeros at first: the padding is read, but never written to."""
    n, chunk = inputs.A_log2.shape[1], inputs.chunk
    sums = carray(_memory(address), (_SUM_ROWS,), float64)
    address += 8 * _SUM_ROWS
    steps = carray(_memory(address), (chunk, _STEP_ROWS), float32)
    address += 4 * chunk * _STEP_ROWS
    states = carray(_memory(address), (n, _STATE_ROWS), float32)
    address += 4 * n * _STATE_ROWS
    channels = carray(_memory(address), (_CHANNEL_ROWS,), float32)
    address += 4 * _CHANNEL_ROWS
    matrices = carray(_memory(address), (4, chunk, n), float32)
    return _Scratch(
        steps, states, channels, sums, matrices[0], matrices[1], matrices[2], matrices[3],
        inputs.B_channel.size > 0, inputs.C_channel.size > 0,
    )  # fmt: skip


@_compiled()
def _empty(scratch: _Scratch) -> None:
    """Zeros for a new unit, whose block may be narrower than the one before."""
    scratch.steps[:] = _ZERO
    scratch.states[:] = _ZERO
    scratch.channels[:] = _ZERO


@_compiled()
def _clear(scratch: _Scratch, row: int) -> None:
    """One row of every state."""
    for state in scratch.states:
        for c in range(LANES):
            state[row + c] = _ZERO


@_compiled()
def _load_states(source: np.ndarray, place: _Place, scratch: _Scratch, row: int) -> None:
    """(n, d) -> one row of every state."""
    for j in range(source.shape[0]):
        state, values = scratch.states[j], source[j, place.channel :]
        for c in range(place.width):
            state[row + c] = values[c]


@_compiled()
def _store_states(scratch: _Scratch, row: int, target: np.ndarray, place: _Place) -> None:
    """The reverse."""
    for j in range(target.shape[0]):
        state, values = scratch.states[j], target[j, place.channel :]
        for c in range(place.width):
            values[c] = state[row + c]


@_compiled()
def _row(rows: int, inputs: Inputs, place: _Place, s: int, by_step: bool) -> int:
    """Where a tensor of so many rows has that of step ``s`` of a chunk; one row serves all."""
    if rows == 1:
        return 0
    step = place.begin + s
    return step if by_step else inputs.order[min(place.sample, inputs.order.shape[0] - 1), place.direction, step]


@_compiled()
def _load_rows(rows: np.ndarray, inputs: Inputs, place: _Place, scratch: _Scratch, row: int, by_step: bool) -> None:
    """Channels of the visited tokens of ``rows``, (b, l, k or 1, d) -> one row of every step."""
    direction = min(place.direction, rows.shape[2] - 1)
    for s in range(place.length):
        token = _row(rows.shape[1], inputs, place, s, by_step)
        source, step = rows[place.sample, token, direction, place.channel :], scratch.steps[s]
        for c in range(place.width):
            step[row + c] = source[c]


@_compiled()
def _add_rows(scratch: _Scratch, row: int, rows: np.ndarray, inputs: Inputs, place: _Place, by_step: bool) -> None:
    """The reverse: adds to the channels of ``rows``."""
    direction = min(place.direction, rows.shape[2] - 1)
    for s in range(place.length):
        token = _row(rows.shape[1], inputs, place, s, by_step)
        target, step = rows[place.sample, token, direction, place.channel :], scratch.steps[s]
        for c in range(place.width):
            target[c] += step[row + c]


@_compiled()
def _load_matrix(matrix: np.ndarray, inputs: Inputs, place: _Place, target: np.ndarray) -> None:
    """Rows of the steps of a chunk, (b, l or 1, sets, n) -> (chunk, n)."""
    for s in range(place.length):
        row = matrix[place.sample, _row(matrix.shape[1], inputs, place, s, inputs.by_step), place.parameters]
        for j in range(row.shape[0]):
            target[s, j] = row[j]


@_compiled()
def _add_matrix(values: np.ndarray, matrix: np.ndarray, inputs: Inputs, place: _Place) -> None:
    """The reverse: adds to the rows."""
    for s in range(place.length):
        row = matrix[place.sample, _row(matrix.shape[1], inputs, place, s, inputs.by_step), place.parameters]
        for j in range(row.shape[0]):
            row[j] += values[s, j]


@_compiled()
def _load_parameters(inputs: Inputs, place: _Place, scratch: _Scratch) -> None:
    which, channels = place.parameters, scratch.channels
    _load_states(inputs.A_log2[which], place, scratch, _A)
    for state in scratch.states:
        for c in range(LANES):
            state[_B + c] = _ONE
            state[_C + c] = _ONE
    if inputs.B_channel.size:
        _load_states(inputs.B_channel[which], place, scratch, _B)
    if inputs.C_channel.size:
        _load_states(inputs.C_channel[which], place, scratch, _C)
    for c in range(place.width):
        bias = inputs.bias[which, place.channel + c]
        channels[_D + c] = inputs.D[which, place.channel + c]
        channels[_BIAS + c] = bias
        channels[_IDLE_STEP + c] = softplus(bias) if inputs.softplus else bias
        channels[_IDLE_SLOPE + c] = sigmoid(bias) if inputs.softplus else _ONE


@_compiled()
def _load_steps(inputs: Inputs, place: _Place, scratch: _Scratch) -> None:
    """Gathers a chunk; y becomes D·x."""
    _use_wide_registers()
    _load_rows(inputs.x, inputs, place, scratch, _X, False)
    _load_rows(inputs.raw_step[place.parameters], inputs, place, scratch, _RAW, inputs.by_step)
    _load_matrix(inputs.B_token, inputs, place, scratch.B)
    _load_matrix(inputs.C_token, inputs, place, scratch.C)
    gaps, channels = inputs.gap[min(place.sample, inputs.gap.shape[0] - 1), place.direction], scratch.channels
    for s in range(place.length):
        step, gap = scratch.steps[s], gaps[place.begin + s]
        for c in range(place.lanes):
            raw = step[_RAW + c] + channels[_BIAS + c]
            delta = softplus(raw) if inputs.softplus else raw
            step[_RAW + c] = raw
            step[_STEP + c] = delta
            step[_DECAY_STEP + c] = delta + gap * channels[_IDLE_STEP + c]
            step[_SOURCE + c] = delta * step[_X + c]
            step[_Y + c] = channels[_D + c] * step[_X + c]


@_compiled()
def _advance(place: _Place, scratch: _Scratch, j: int) -> None:
    """The recurrence of state ``j`` over one chunk; adds C·h to y."""
    _use_wide_registers()
    state = scratch.states[j]
    for s in range(place.length):
        step, B, C = scratch.steps[s], scratch.B[s, j], scratch.C[s, j]
        for c in range(place.lanes):
            B_c = B * state[_B + c] if scratch.B_per_channel else B
            C_c = C * state[_C + c] if scratch.C_per_channel else C
            h = exp2(step[_DECAY_STEP + c] * state[_A + c]) * state[_STATE + c] + B_c * step[_SOURCE + c]
            state[_STATE + c] = h
            step[_Y + c] += C_c * h


@_compiled()
def _apply_gate(place: _Place, outputs: Outputs) -> None:
    """Multiplies the result of one unit by silu(z)."""
    for token in range(outputs.result.shape[1]):
        for i in range(outputs.result.shape[2]):
            result = outputs.result[place.sample, token, i, place.channel :]
            z = outputs.z[place.sample, token, i, place.channel :]
            for c in range(place.width):
                result[c] *= z[c] * sigmoid(z[c])


@_compiled()
def _recompute(place: _Place, scratch: _Scratch, j: int, start: np.ndarray) -> None:
    """Decays and states of state ``j`` in a chunk."""
    _use_wide_registers()
    state, values = scratch.states[j], start[place.channel :]
    for c in range(place.width):
        state[_STATE + c] = values[c]
    for s in range(place.length):
        step, B = scratch.steps[s], scratch.B[s, j]
        for c in range(place.lanes):
            decay = exp2(step[_DECAY_STEP + c] * state[_A + c])
            before = state[_STATE + c]
            after = decay * before + B * state[_B + c] * step[_SOURCE + c]
            step[_DECAY + c] = decay
            step[_BEFORE + c] = before
            step[_AFTER + c] = after
            state[_STATE + c] = after


@_compiled()
def _adjoint_recurrence(place: _Place, scratch: _Scratch, j: int) -> None:
    """The recurrence of g for state ``j``, backwards over one chunk; a·g is carried on."""
    _use_wide_registers()
    state = scratch.states[j]
    for s in range(place.length - 1, -1, -1):
        step, B, C = scratch.steps[s], scratch.B[s, j], scratch.C[s, j]
        for c in range(place.lanes):
            g = state[_CARRY + c] + C * state[_C + c] * step[_Y + c]
            carry = step[_DECAY + c] * g
            dexponent = carry * step[_BEFORE + c]
            state[_CARRY + c] = carry
            state[_DA + c] += dexponent * step[_DECAY_STEP + c]
            step[_DSTATE + c] = g
            step[_DSOURCE + c] += B * state[_B + c] * g
            step[_DDECAY_STEP + c] += dexponent * state[_A + c]  # in powers of 2


@_compiled()
def _adjoint_of_matrices(gradients: Gradients, place: _Place, scratch: _Scratch, j: int) -> None:
    """Gradients of B and C: sums over channels, or over steps for their factors per channel."""
    for s in range(place.length):
        scratch.dB[s, j] = _dot(scratch.steps[s], _DSTATE, _SOURCE, place.lanes)
        scratch.dC[s, j] = _dot(scratch.steps[s], _AFTER, _Y, place.lanes)
    if gradients.dB_channel.size:
        _add_products(place, scratch, _DSTATE, _SOURCE, j, _DB)
    if gradients.dC_channel.size:
        _add_products(place, scratch, _AFTER, _Y, j, _DC)


@_compiled(reorder_sums=True)
def _dot(step: np.ndarray, a: int, b: int, lanes: int) -> Any:
    total = _ZERO
    for c in range(lanes):
        total += step[a + c] * step[b + c]
    return total


@_compiled()
def _add_products(place: _Place, scratch: _Scratch, a: int, b: int, j: int, row: int) -> None:
    """Products of two rows of every step, summed over steps into a row of state ``j``."""
    state = scratch.states[j]
    for s in range(place.length):
        step = scratch.steps[s]
        for c in range(place.lanes):
            state[row + c] += step[a + c] * step[b + c]


@_compiled()
def _adjoint_of_step(inputs: Inputs, place: _Place, scratch: _Scratch) -> None:
    """From the gradients of source and decay step to those of x and of the raw step."""
    _use_wide_registers()
    channels, sums = scratch.channels, scratch.sums
    gaps = inputs.gap[min(place.sample, inputs.gap.shape[0] - 1), place.direction]
    for s in range(place.length):
        step, gap = scratch.steps[s], gaps[place.begin + s]
        for c in range(place.lanes):
            x, dy, dsource = step[_X + c], step[_Y + c], step[_DSOURCE + c]
            ddecay_step = step[_DDECAY_STEP + c] * _LN2
            slope = sigmoid(step[_RAW + c]) if inputs.softplus else _ONE
            draw = (x * dsource + ddecay_step) * slope
            step[_DX + c] = step[_STEP + c] * dsource + channels[_D + c] * dy
            step[_DRAW + c] = draw
            step[_DSOURCE + c] = _ZERO
            step[_DDECAY_STEP + c] = _ZERO
            sums[_DD + c] += x * dy
            sums[_DBIAS + c] += draw
            sums[_DIDLE + c] += gap * ddecay_step


@_compiled()
def _add_gradients(inputs: Inputs, place: _Place, scratch: _Scratch, gradients: Gradients) -> None:
    """Adds those of one chunk to their rows."""
    _add_rows(scratch, _DX, gradients.dx, inputs, place, False)
    _add_rows(scratch, _DRAW, gradients.draw_step[place.parameters], inputs, place, inputs.by_step)
    _add_matrix(scratch.dB, gradients.dB_token[place.block], inputs, place)
    _add_matrix(scratch.dC, gradients.dC_token[place.block], inputs, place)


@_compiled()
def _store_sums(scratch: _Scratch, place: _Place, gradients: Gradients) -> None:
    """Writes what was summed over the steps of a sequence."""
    sample, which, sums = place.sample, place.parameters, scratch.sums
    _store_states(scratch, _DA, gradients.dA[sample, which], place)
    if gradients.dB_channel.size:
        _store_states(scratch, _DB, gradients.dB_channel[sample, which], place)
    if gradients.dC_channel.size:
        _store_states(scratch, _DC, gradients.dC_channel[sample, which], place)
    for c in range(place.width):
        gradients.dD[sample, which, place.channel + c] = sums[_DD + c]
        dbias = sums[_DBIAS + c] + sums[_DIDLE + c] * scratch.channels[_IDLE_SLOPE + c]
        gradients.dbias[sample, which, place.channel + c] = dbias
