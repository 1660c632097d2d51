"""What the kernels of the scan do with a tile: arithmetic, layout, loads and the recurrences.

A tile is (STEPS, CHANNELS). Lanes are channels, and a thread holds all steps of its channels. Where slots, one warp
each, share the states, what depends on states is a wide tile (STEPS, COLUMNS), COLUMNS = SLOTS·CHANNELS, of which a
thread holds all steps; the threads of all warps divide the others among them. Steps, decays and rates
are in units of log 2, a = 2^(rate·step), since that is what the hardware computes.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
RANKS = tl.constexpr(16)  # of dt in one product; of two over 32, or one over 64, Triton 3.6 makes wrong code


@triton.jit
def exp2(x, NVIDIA: tl.constexpr):
    """2^x. The bare NVIDIA instruction takes denormals for 0, as a decay may."""
    if NVIDIA:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@triton.jit
def log2(x, NVIDIA: tl.constexpr):
    """log₂ x, by the bare NVIDIA instruction."""
    if NVIDIA:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def decay(x, PRECISE: tl.constexpr, NVIDIA: tl.constexpr):
    """2^x of a decay. The instruction errs to one side near 1, which thousands of steps add up."""
    decay = exp2(x, NVIDIA)
    if PRECISE:
        t = x * LN_2
        series = 1.0 + t * (1.0 + t * (0.5 + t * (0.1666666667 + t * 0.0416666667)))
        decay = tl.where(t > -0.03, series, decay)
    return decay


@triton.jit
def softplus(raw, PRECISE: tl.constexpr, NVIDIA: tl.constexpr):
    """log2(1 + 2^raw), of ``raw`` in units of log 2.

    A logarithm near 1 loses small steps, so ``PRECISE`` has a series for them.
    """
    if PRECISE:
        t = exp2(-tl.abs(raw), NVIDIA)
        series = t * (1.0 + t * (-0.5 + t * (0.3333333333 + t * (-0.25 + t * (0.2 - t * 0.1666666667)))))
        return tl.maximum(raw, 0.0) + tl.where(t < 0.08, series * LOG2_E, log2(1.0 + t, NVIDIA))
    return tl.maximum(log2(1.0 + exp2(tl.minimum(raw, 126.0), NVIDIA), NVIDIA), raw)


@triton.jit
def softplus_slope(step, PRECISE: tl.constexpr, NVIDIA: tl.constexpr):
    """The derivative of a softplus from its value: sigmoid(raw) = 1 − 2^(−step)."""
    slope = 1.0 - exp2(-step, NVIDIA)
    if PRECISE:
        t = step * LN_2
        series = t * (1.0 - t * (0.5 - t * (0.1666666667 - t * (0.0416666667 - t * (0.0083333333 - t * 0.0013888889)))))
        slope = tl.where(t < 0.08, series, slope)
    return slope


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(−x))."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def rows_of(tile, STEPS: tl.constexpr, LOG_STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """The steps of a tile as a tuple of (1, CHANNELS).

    Splitting also has a purpose of its own: it brings the tile into the layout with all steps in one thread. There the
    halves are nothing but names of registers.
    """
    parts = (tile,)
    for level in tl.static_range(LOG_STEPS):
        even, odd = (), ()
        for i in tl.static_range(2**level):
            pairs = tl.reshape(parts[i], (STEPS // 2 ** (level + 1), 2, CHANNELS))
            first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
            even, odd = even + (first,), odd + (second,)
        parts = even + odd
    return parts


@triton.jit
def tile_of(rows, STEPS: tl.constexpr, LOG_STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """The inverse of :func:`rows_of`."""
    parts = rows
    for level in tl.static_range(LOG_STEPS):
        joined = ()
        for i in tl.static_range(STEPS // 2 ** (level + 1)):
            pairs = tl.permute(tl.join(parts[i], parts[i + STEPS // 2 ** (level + 1)]), (0, 2, 1))
            joined = joined + (tl.reshape(pairs, (2 ** (level + 1), CHANNELS)),)
        parts = joined
    return parts[0]


@triton.jit
def pinned(tile, STEPS: tl.constexpr, LOG_STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """The tile itself. The compiler cannot move what follows in front of it.

    It would else compute operands of a matrix product a second time, in the layout that the product wants.
    """
    return tile_of(rows_of(tile, STEPS, LOG_STEPS, CHANNELS), STEPS, LOG_STEPS, CHANNELS)


@triton.jit
def halves(tile, STEPS: tl.constexpr, LOG_STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """The tile as the sum of two in bfloat16."""
    high = tile.to(tl.bfloat16)
    low = (tile - high.to(tl.float32)).to(tl.bfloat16)
    return pinned(high, STEPS, LOG_STEPS, CHANNELS), pinned(low, STEPS, LOG_STEPS, CHANNELS)


@triton.jit
def load_row(base, lanes, inside, FULL: tl.constexpr):
    """(1, CHANNELS) in float32."""
    row = tl.load(base + lanes, mask=None if FULL else inside, other=None if FULL else 0.0)
    return row.to(tl.float32)[None, :]


@triton.jit
def add_row(base, row, lanes, inside, FULL: tl.constexpr):
    """Adds (1, CHANNELS) to what is stored."""
    tl.store(base + lanes[None, :], load_row(base, lanes, inside, FULL) + row, mask=inside[None, :])


@triton.jit
def load_channels(
    bias, D, first, lanes, inside,
    HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISE: tl.constexpr,
    NVIDIA: tl.constexpr, FULL: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of each channel, (1, CHANNELS): the bias of its step, the step of an idle token, and the skip connection."""
    offset, skip = tl.zeros((1, CHANNELS), tl.float32), tl.zeros((1, CHANNELS), tl.float32)
    if HAS_BIAS:
        offset = load_row(bias + first, lanes, inside, FULL) * LOG2_E
    if HAS_SKIP:
        skip = load_row(D + first, lanes, inside, FULL)
    idle = softplus(offset, PRECISE, NVIDIA) if SOFTPLUS else offset
    return offset, idle, skip


@triton.jit
def rows_at(base, rows, stride, across, TOKENS_LAST: tl.constexpr):
    """Addresses of rows of channels, (STEPS, CHANNELS); ``across`` is what a channel adds."""
    return base + (rows if TOKENS_LAST else rows * stride)[:, None] + across[None, :]


@triton.jit
def load_tokens(
    base, tokens, stride, across, first, end, inside,
    STEPS: tl.constexpr, FULL: tl.constexpr, TOKENS_LAST: tl.constexpr,
):  # fmt: skip
    """The rows of channels of tokens, (STEPS, CHANNELS). A table has some token also for steps that do not exist."""
    at = rows_at(base, tokens, stride, across, TOKENS_LAST)
    if TOKENS_LAST:
        tile = load_steps(at, first, end, inside, STEPS, FULL)
    else:
        tile = tl.load(at, mask=None if FULL else inside[None, :], other=None if FULL else 0.0)
    return tile


@triton.jit
def load_steps(at, first, end, inside, STEPS: tl.constexpr, FULL: tl.constexpr):
    """The rows of channels of the steps from ``first`` that are before ``end``, else 0.

    Only the last tile of a sequence tests every row.
    """
    if first + STEPS <= end:
        tile = tl.load(at, mask=None if FULL else inside[None, :], other=None if FULL else 0.0)
    else:
        tile = tl.load(at, mask=_existing(first, end, inside, STEPS, FULL), other=0.0)
    return tile


@triton.jit
def store_tokens(at, tile, first, end, inside, STEPS: tl.constexpr, FULL: tl.constexpr):
    """Writes the rows of channels of the steps from ``first`` that are before ``end``; see :func:`load_steps`."""
    tile = tile.to(at.dtype.element_ty)
    if first + STEPS <= end:
        tl.store(at, tile, mask=None if FULL else inside[None, :])
    else:
        tl.store(at, tile, mask=_existing(first, end, inside, STEPS, FULL))


@triton.jit
def _existing(first, end, inside, STEPS: tl.constexpr, FULL: tl.constexpr):
    exists = (first + tl.arange(0, STEPS) < end)[:, None]
    return exists if FULL else exists & inside[None, :]


@triton.jit
def load_pair(base, STEPS: tl.constexpr):
    """Two values of every step of a tile that lie one row after the other, as one vector: a register a lane."""
    return tl.load(base + tl.arange(0, 2 * STEPS))


@triton.jit
def unpair(pair, STEPS: tl.constexpr):
    """The two rows, (STEPS,) each."""
    return tl.split(tl.trans(tl.reshape(pair, (2, STEPS))))


@triton.jit
def rows_and_visits(place, first, STEPS: tl.constexpr, TOKENS_LAST: tl.constexpr):
    """Rows of parameters and visited tokens of the steps from ``first``, those of ``place`` or the steps themselves."""
    if TOKENS_LAST:  # the compiler sees that they are neighbours in memory
        row = first + tl.arange(0, STEPS)
        visit = row
    else:
        row, visit = unpair(place, STEPS)
    return row, visit


@triton.jit
def widened(tile, SLOTS: tl.constexpr, CHANNELS: tl.constexpr):
    """A tile (STEPS, CHANNELS) once for every slot, (STEPS, COLUMNS)."""
    return _wide(tile[:, None, :], SLOTS, CHANNELS)


@triton.jit
def _wide(tile, SLOTS: tl.constexpr, CHANNELS: tl.constexpr):
    STEPS: tl.constexpr = tile.shape[0]
    return tl.reshape(tl.broadcast_to(tile, (STEPS, SLOTS, CHANNELS)), (STEPS, SLOTS * CHANNELS))


@triton.jit
def over_slots(tile, LOG_SLOTS: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """The sum of a wide tile over its slots, (STEPS, CHANNELS).

    Halves are added until one is left: a reduction proper would go through shuffles.
    """
    for level in tl.static_range(LOG_SLOTS):
        both = tl.reshape(tile, (STEPS, 2, 2 ** (LOG_SLOTS - level - 1) * CHANNELS))
        first, second = tl.split(tl.permute(both, (0, 2, 1)))
        tile = first + second
    return tile


@triton.jit
def over_steps(tile, SLOTS: tl.constexpr):
    """What to add up from tile to tile for a sum over steps: sums, or the tile itself where warps share its steps."""
    return tl.sum(tile, 0, keep_dims=True) if SLOTS == 1 else tile


@triton.jit
def settled(tile, NVIDIA: tl.constexpr):
    """The tile itself. The compiler cannot compute it a second time for a use that wants another layout."""
    if NVIDIA:
        tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [tile], tl.float32, is_pure=False, pack=1)
    return tile


@triton.jit
def along(values, constants, n, width, lanes, inside, PER_TOKEN: tl.constexpr, FULL: tl.constexpr):
    """B or C of state n beside a tile: ``values`` of steps, (STEPS, 1), or constants per channel, (1, CHANNELS)."""
    return values if PER_TOKEN else load_row(constants + n * width, lanes, inside, FULL)


@triton.jit
def load_pairs(matrices, own, SLOTS: tl.constexpr, STEPS: tl.constexpr):
    """B and C of a state of every slot, (SLOTS, 2·STEPS), a register a lane."""
    slots = tl.arange(0, SLOTS)[:, None] * (own * 2 * STEPS)
    return tl.load(matrices + slots + tl.arange(0, 2 * STEPS)[None, :])


@triton.jit
def unpaired(pairs, SLOTS: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """B and C beside a wide tile, (STEPS, COLUMNS)."""
    B, C = tl.split(tl.permute(tl.reshape(pairs, (SLOTS, 2, STEPS)), (2, 0, 1)))
    return _wide(B[:, :, None], SLOTS, CHANNELS), _wide(C[:, :, None], SLOTS, CHANNELS)


@triton.jit
def load_rows(base, n, width, lanes, inside, EXISTS: tl.constexpr, UNROLL: tl.constexpr, FULL: tl.constexpr):
    """Rows of ``UNROLL`` states from n on, (1, COLUMNS) each; 0 unless they exist."""
    rows = ()
    for i in tl.static_range(UNROLL):
        if EXISTS:
            rows = rows + (load_row(base + (n + i) * width, lanes, inside, FULL),)
        else:
            rows = rows + (tl.zeros(lanes.shape, tl.float32)[None, :],)
    return rows


@triton.jit
def load_states(
    A, states, matrices, n, own, width, lanes, inside,
    UNROLL: tl.constexpr, SLOTS: tl.constexpr, STEPS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """What a tile reads of ``UNROLL`` states from n on: their rates, they themselves, and B and C as pairs."""
    pairs = ()
    for i in tl.static_range(UNROLL):
        pairs = pairs + (load_pairs(matrices + (n + i) * 2 * STEPS, own, SLOTS, STEPS),)
    rates = load_rows(A, n, width, lanes, inside, True, UNROLL, FULL)
    return rates, load_rows(states, n, width, lanes, inside, True, UNROLL, FULL), pairs


@triton.jit
def load_weight(weight, rank, lanes, inside, PARTS: tl.constexpr):
    """The weight of dt in units of log 2, in parts (RANKS, CHANNELS)."""
    parts = ()
    for part in tl.static_range(PARTS):
        ranks = part * RANKS + tl.arange(0, RANKS)
        exists = (ranks < rank)[:, None] & inside[None, :]
        at = weight + ranks[:, None] + lanes[None, :] * rank
        parts = parts + (tl.load(at, mask=exists, other=0.0).to(tl.float32) * LOG2_E,)
    return parts


@triton.jit
def load_dt(
    dt, rows, stride, rank, across, first, end, inside,
    LOW_RANK: tl.constexpr, TWO_A_WORD: tl.constexpr, PARTS: tl.constexpr,
    STEPS: tl.constexpr, FULL: tl.constexpr, TOKENS_LAST: tl.constexpr,
):  # fmt: skip
    """The rows of dt that a tile reads, for :func:`dts_of`: parts (STEPS, RANKS) or, of a full step, (STEPS, CHANNELS).

    ``TWO_A_WORD``: (STEPS, RANKS / 2) words of two neighbours.
    """
    parts = ()
    for part in tl.static_range(PARTS):
        if LOW_RANK and TWO_A_WORD:
            words = part * (RANKS // 2) + tl.arange(0, RANKS // 2)
            at = dt.to(tl.pointer_type(tl.uint32)) + rows[:, None] * (stride // 2) + words[None, :]
            dts = tl.load(at, mask=(words < rank // 2)[None, :], other=0)
        elif LOW_RANK:
            ranks = part * RANKS + tl.arange(0, RANKS)
            dts = tl.load(dt + rows[:, None] * stride + ranks[None, :], mask=(ranks < rank)[None, :], other=0.0)
        else:
            dts = load_tokens(dt, rows, stride, across, first, end, inside, STEPS, FULL, TOKENS_LAST)
        parts = parts + (dts,)
    return parts


@triton.jit
def dts_of(
    loaded, dtype: tl.constexpr, PARTS: tl.constexpr, TOKENS_LAST: tl.constexpr,
    STEPS: tl.constexpr, LOG_STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The rows of dt in their own ``dtype``."""
    parts = ()
    for part in tl.static_range(PARTS):
        dts = loaded[part]
        if dts.dtype == tl.uint32:
            both = tl.join(dts.to(tl.uint16), (dts >> 16).to(tl.uint16))
            dts = tl.reshape(both, (dts.shape[0], 2 * dts.shape[1])).to(dtype, bitcast=True)
        if TOKENS_LAST:  # loaded with neighbouring tokens on neighbouring lanes
            dts = pinned(dts, STEPS, LOG_STEPS, CHANNELS)
        parts = parts + (dts,)
    return parts


@triton.jit
def prefetch(
    dt, dt_token, x, x_token, place, chained, STEPS: tl.constexpr, OF_VISITS: tl.constexpr, NVIDIA: tl.constexpr
):
    """Has the rows of dt and x that a later tile will load brought into the L2 cache, a row a lane.

    ``OF_VISITS``: a sequence that is one of several chained ones has its rows of x apart from theirs.
    """
    if NVIDIA:
        row = (place // chained).to(tl.int64)
        visit = place.to(tl.int64) if OF_VISITS else row
        of_x = x.to(tl.int64) + visit * x_token * (x.dtype.element_ty.primitive_bitwidth // 8)
        of_dt = dt.to(tl.int64) + row * dt_token * (dt.dtype.element_ty.primitive_bitwidth // 8)
        at = tl.where(tl.arange(0, 2 * STEPS) < STEPS, of_dt, of_x)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], tl.uint32, is_pure=False, pack=1
        )


@triton.jit
def raw_steps(
    dts, weight, bias,
    LOW_RANK: tl.constexpr, PARTS: tl.constexpr, HALF_DOT: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """weight·dt + bias in units of log 2, (STEPS, CHANNELS)."""
    if LOW_RANK:
        raw = tl.broadcast_to(bias, (STEPS, CHANNELS))
        for part in tl.static_range(PARTS):
            rows, matrix = dts[part], weight[part]
            if HALF_DOT:  # dt is exact in its own dtype, and so is the weight as the sum of two
                high = matrix.to(rows.dtype)
                raw = tl.dot(rows, (matrix - high.to(tl.float32)).to(rows.dtype), raw)
                raw = tl.dot(rows, high, raw)
            else:
                raw = tl.dot(rows.to(tl.float32), matrix, raw, input_precision="ieee")
    else:
        raw = dts[0].to(tl.float32) * LOG2_E + bias
    return raw


@triton.jit
def steps_of_tile(
    raw, gaps, idle, exists,
    SOFTPLUS: tl.constexpr, HAS_GAP: tl.constexpr, MASKED: tl.constexpr, PRECISE: tl.constexpr, NVIDIA: tl.constexpr,
    STEPS: tl.constexpr, LOG_STEPS: tl.constexpr, CHANNELS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Steps and decay steps of a tile, (STEPS, CHANNELS), in units of log 2; 0 where there is no step."""
    steps = softplus(raw, PRECISE, NVIDIA) if SOFTPLUS else raw
    if SLOTS > 1:
        steps = settled(steps, NVIDIA)
    else:
        steps = tile_of(rows_of(steps, STEPS, LOG_STEPS, CHANNELS), STEPS, LOG_STEPS, CHANNELS)
    if MASKED:
        steps = tl.where(exists[:, None], steps, 0.0)
    return steps, steps + gaps[:, None] * idle if HAS_GAP else steps


@triton.jit
def states_of_tile(decay, added, h, STEPS: tl.constexpr, LOG_STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """The recurrence h = decay·h + added over a tile: states before the steps, after them, and the last one."""
    decays, addeds = rows_of(decay, STEPS, LOG_STEPS, CHANNELS), rows_of(added, STEPS, LOG_STEPS, CHANNELS)
    before, after = (), ()
    for t in tl.static_range(STEPS):
        before = before + (h,)
        h = decays[t] * h + addeds[t]
        after = after + (h,)
    return tile_of(before, STEPS, LOG_STEPS, CHANNELS), tile_of(after, STEPS, LOG_STEPS, CHANNELS), h


@triton.jit
def gradients_of_tile(decay, added, q, STEPS: tl.constexpr, LOG_STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """The recurrence g = added + q, q = decay·g over a tile backwards: g and q of the steps, and the last q."""
    decays, addeds = rows_of(decay, STEPS, LOG_STEPS, CHANNELS), rows_of(added, STEPS, LOG_STEPS, CHANNELS)
    g_steps, q_steps = (), ()
    for t in tl.static_range(STEPS - 1, -1, -1):
        g = addeds[t] + q
        q = decays[t] * g
        g_steps, q_steps = (g,) + g_steps, (q,) + q_steps
    return tile_of(g_steps, STEPS, LOG_STEPS, CHANNELS), tile_of(q_steps, STEPS, LOG_STEPS, CHANNELS), q


@triton.jit
def of_slots(tile, SLOTS: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """A wide tile as one tile of every slot, (SLOTS, STEPS, CHANNELS)."""
    return tl.permute(tl.reshape(tile, (STEPS, SLOTS, CHANNELS)), (1, 0, 2))


@triton.jit
def sums_over_channels(
    tile, column: tl.constexpr, sums, SPLIT: tl.constexpr,
    STEPS: tl.constexpr, LOG_STEPS: tl.constexpr, CHANNELS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Adds a wide tile's sums over channels to a column of ``sums`` (SLOTS, STEPS, 16), by a product with ones."""
    one = tl.where(tl.arange(0, 16) == column, 1.0, 0.0).to(tl.bfloat16)
    one = tl.broadcast_to(one[None, None, :], (SLOTS, CHANNELS, 16))
    high, low = halves(tile, STEPS, LOG_STEPS, SLOTS * CHANNELS)
    sums = tl.dot(of_slots(high, SLOTS, STEPS, CHANNELS), one, sums)
    if SPLIT:
        sums = tl.dot(of_slots(low, SLOTS, STEPS, CHANNELS), one, sums)
    return sums


@triton.jit
def store_sums(
    at, dB, dC, own, EXACT_DOT: tl.constexpr, SPLIT: tl.constexpr,
    STEPS: tl.constexpr, LOG_STEPS: tl.constexpr, CHANNELS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of B and C of a state of every slot: sums over channels of two wide tiles."""
    column = tl.arange(0, 16)[None, None, :]
    if EXACT_DOT:
        dB = tl.sum(of_slots(dB, SLOTS, STEPS, CHANNELS), 2, keep_dims=True)
        dC = tl.sum(of_slots(dC, SLOTS, STEPS, CHANNELS), 2, keep_dims=True)
        both = tl.where(column == 0, dB, dC)
    else:
        both = tl.zeros((SLOTS, STEPS, 16), tl.float32)
        both = sums_over_channels(dB, 0, both, SPLIT, STEPS, LOG_STEPS, CHANNELS, SLOTS)
        both = sums_over_channels(dC, 1, both, SPLIT, STEPS, LOG_STEPS, CHANNELS, SLOTS)
    both *= tl.where(column == 0, LN_2, 1.0)
    at += tl.arange(0, SLOTS)[:, None, None] * (own * 2 * STEPS) + tl.arange(0, STEPS)[None, :, None]
    tl.store(at + column * STEPS, both, mask=column < 2)
