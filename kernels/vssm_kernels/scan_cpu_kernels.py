"""The compiled loops of the CPU scan: time is sequential, and a vector register holds channels.

The unit of work is one sample and a block of channels, all directions: units share no output, so any number of threads
may take them, and the result has the same bits. Blocks are padded with zeros to whole registers. The steps are taken in
chunks, which are gathered into memory that stays in the first-level cache; each state of a channel then runs through a
chunk on its own. Derivation of the adjoint in kernels/README.md.

Everything compiled stands in this one file: numba's cache follows changes of the file that defines a function, not of
those that it calls.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy import float32, float64, int32

LANES = 64


class Inputs(NamedTuple):
    """What both passes read; float32 but for ``order``, contiguous, channels last.

    B and C are products of a factor per token and a factor per channel, of which one is 1 and left empty.
    """

    x: np.ndarray  # (b, l, k or 1, d)
    raw_step: np.ndarray  # (b, l, sets, d), without bias; sets is k, or 1 where directions are chained
    A_log2: np.ndarray  # (sets, n, d), A·log2(e): decays are powers of 2
    B_token: np.ndarray  # (b, l or 1, sets, n)
    B_channel: np.ndarray  # (sets, n, d)
    C_token: np.ndarray  # as B
    C_channel: np.ndarray
    D: np.ndarray  # (sets, d)
    bias: np.ndarray  # (sets, d)
    order: np.ndarray  # (b or 1, k, t), int32
    gap: np.ndarray  # (b or 1, k, t)
    softplus: bool
    by_step: bool  # params="step"
    chunk: int


class Outputs(NamedTuple):
    """What the forward pass writes."""

    result: np.ndarray  # (b, l, k or 1, d), zeros before
    starts: np.ndarray  # (b, k, chunks, n, d), the state before every chunk; empty if nobody needs it
    state: np.ndarray  # (b, sets, n, d)
    z: np.ndarray  # read: the gate, as result; empty if there is none


class Gradients(NamedTuple):
    """What the backward pass reads and writes; sums over samples and blocks of channels are left to the caller."""

    dresult: np.ndarray  # (b, l, k or 1, d)
    starts: np.ndarray  # (b, k, chunks, n, d)
    dstate: np.ndarray  # (b, sets, n, d)
    dx: np.ndarray  # as x, zeros before, like all that follow
    draw_step: np.ndarray  # as raw_step
    dA: np.ndarray  # (b, sets, n, d)
    dB_token: np.ndarray  # (blocks, b, l or 1, sets, n)
    dB_channel: np.ndarray  # (b, sets, n, d), or empty
    dC_token: np.ndarray
    dC_channel: np.ndarray
    dD: np.ndarray  # (b, sets, d)
    dbias: np.ndarray  # (b, sets, d)


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


def _compiled(*, keep: bool = False, reorder_sums: bool = False) -> Callable[[Callable], Any]:
    """Decorator: compiles at the first call; ``keep``: keeps the code on disk where there is a place for it.

    Only what Python calls is kept, and its arguments are of no type of ours: the index of numba's cache outlives an
    upgrade, and cannot be read where it names a type that is gone.
    """
    flags = {"contract", "reassoc", "nsz"} if reorder_sums else {"contract"}
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": flags}

    def decorate(function: Callable) -> Any:
        try:
            return numba.njit(cache=keep, **options)(function)
        except RuntimeError:  # neither beside this file nor in the user's home can anything be written
            return numba.njit(**options)(function)

    return decorate


# Constants are float32: a float64 among them would widen the arithmetic. Polynomials are fitted to float32's precision.
_ZERO, _ONE, _TWO = float32(0), float32(1), float32(2)
_LOG2_E, _LN2_HIGH, _LN2_LOW = float32(1.4426950408889634), float32(0.693145751953125), float32(1.42860682e-6)
_LN2 = float32(0.6931471805599453)
_ROUND = float32(3 << 22)  # added to a small number, leaves its nearest integer in the last bits
_MIN_POWER, _MAX_POWER = float32(-127), float32(128)  # 0 and infinity in the exponent bits
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
    return (_ONE + rest) * int32((float32(shifted).view(int32) << 23) + 0x3F800000).view(float32)


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


@_compiled(keep=True)
def forward(first: int, last: int, inputs: tuple, outputs: tuple) -> None:
    """Scans units ``first`` to ``last`` − 1, of batch · blocks; the tuples hold the fields of Inputs and Outputs."""
    _forward(first, last, Inputs(*inputs), Outputs(*outputs))


@_compiled(keep=True)
def backward(first: int, last: int, inputs: tuple, gradients: tuple) -> None:
    """Gradients of units ``first`` to ``last`` − 1; the tuples hold the fields of Inputs and Gradients."""
    _backward(first, last, Inputs(*inputs), Gradients(*gradients))


@_compiled()
def _forward(first: int, last: int, inputs: Inputs, outputs: Outputs) -> None:
    sets = inputs.A_log2.shape[0]
    k, steps = inputs.order.shape[1:]
    for unit in range(first, last):
        scratch = _new_scratch(inputs)
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
def _backward(first: int, last: int, inputs: Inputs, gradients: Gradients) -> None:
    """From the last chunk to the first."""
    sets = inputs.A_log2.shape[0]
    k, steps = inputs.order.shape[1:]
    for unit in range(first, last):
        scratch = _new_scratch(inputs)
        for i in range(k - 1, -1, -1):
            place = _place(inputs, unit, i, 0)
            if i == k - 1 or sets == k:  # the end of a sequence
                _load_parameters(inputs, place, scratch)
                _load_states(gradients.dstate[place.sample, place.parameters], place, scratch, _CARRY)
                for row in (_DA, _DB, _DC):
                    _clear(scratch, row)
                scratch.sums.fill(0)
            for begin in range((steps - 1) // inputs.chunk * inputs.chunk, -1, -inputs.chunk):
                place = _place(inputs, unit, i, begin)
                _load_steps(inputs, place, scratch)
                _load_rows(gradients.dresult, inputs, place, scratch, _Y)
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
def lanes_of_block(d: int) -> int:
    """Channels of a block: at most LANES, whole registers, and where ``d`` allows an even number of blocks."""
    pairs = max(1, (d + 2 * LANES - 1) // (2 * LANES))
    share = (d + 2 * pairs - 1) // (2 * pairs)
    return max(8, (share + 7) // 8 * 8)


@_compiled()
def _place(inputs: Inputs, unit: int, direction: int, begin: int) -> _Place:
    sets, _, d = inputs.A_log2.shape
    lanes = lanes_of_block(d)
    blocks = (d + lanes - 1) // lanes
    block = unit % blocks
    channel = block * lanes
    length = min(inputs.chunk, inputs.order.shape[2] - begin)
    width = min(lanes, d - channel)
    return _Place(unit // blocks, direction, min(direction, sets - 1), begin, length, block, channel, width, lanes)


@_compiled()
def _new_scratch(inputs: Inputs) -> _Scratch:
    n, chunk = inputs.A_log2.shape[1], inputs.chunk
    matrices = np.zeros((4, chunk, n), float32)
    return _Scratch(
        np.zeros((chunk, _STEP_ROWS), float32), np.zeros((n, _STATE_ROWS), float32),
        np.zeros(_CHANNEL_ROWS, float32), np.zeros(_SUM_ROWS, float64),
        matrices[0], matrices[1], matrices[2], matrices[3], inputs.B_channel.size > 0, inputs.C_channel.size > 0,
    )  # fmt: skip


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
def _load_rows(rows: np.ndarray, inputs: Inputs, place: _Place, scratch: _Scratch, row: int) -> None:
    """Channels of the visited tokens of ``rows``, (b, l, k or 1, d) -> one row of every step."""
    direction = min(place.direction, rows.shape[2] - 1)
    for s in range(place.length):
        token = _row(rows.shape[1], inputs, place, s, False)
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
    _load_rows(inputs.x, inputs, place, scratch, _X)
    _load_matrix(inputs.B_token, inputs, place, scratch.B)
    _load_matrix(inputs.C_token, inputs, place, scratch.C)
    gaps, channels = inputs.gap[min(place.sample, inputs.gap.shape[0] - 1), place.direction], scratch.channels
    for s in range(place.length):
        token = _row(inputs.raw_step.shape[1], inputs, place, s, inputs.by_step)
        raw_step = inputs.raw_step[place.sample, token, place.parameters, place.channel :]
        step, gap = scratch.steps[s], gaps[place.begin + s]
        for c in range(place.width):
            step[_RAW + c] = raw_step[c] + channels[_BIAS + c]
        for c in range(place.lanes):
            delta = softplus(step[_RAW + c]) if inputs.softplus else step[_RAW + c]
            step[_STEP + c] = delta
            step[_DECAY_STEP + c] = delta + gap * channels[_IDLE_STEP + c]
            step[_SOURCE + c] = delta * step[_X + c]
            step[_Y + c] = channels[_D + c] * step[_X + c]


@_compiled()
def _advance(place: _Place, scratch: _Scratch, j: int) -> None:
    """The recurrence of state ``j`` over one chunk; adds C·h to y."""
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
    _add_rows(scratch, _DRAW, gradients.draw_step, inputs, place, inputs.by_step)
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
