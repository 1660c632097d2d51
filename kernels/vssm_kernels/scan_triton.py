"""The scan as Triton kernels. ``launch.py`` allocates, chooses sizes and launches them.

A program owns a block of channels of a walk, one sequence of one sample, and takes its steps tile by tile: it reads the
row of channels of whatever token the order names, carries the state through the tile in registers, and does everything
else elementwise or as small matrix products (``tiles_triton.py``). States are taken one after the other, so the body is
that of a single state whatever their number; the states of a walk wait in memory meanwhile. Several warps, each a slot,
may share the states of a program: they compute steps together, each scans its own states, y is the sum over slots.

Names: h is the state, g its gradient, q = a·g what g hands to the step before; the rest is as in kernels/README.md,
where the derivation is. Everything per channel is stored channels last: A (k, n, d), states (..., n, d). What belongs
to steps comes in their order, as ``pack_kernel`` leaves it: pairs of rows of parameters and visits, (tables, tiles, 2,
STEPS), and pairs of B and C, (b·k, tiles, n, 2, STEPS), which a tile loads a register a lane.

A slot has ``own`` states, the first of slot i being ``i·own``. A wide row or tile has COLUMNS = slots·channels columns.
``unaligned`` is 0, but the compiler must not know: it would give a thread several neighbouring channels and spread
steps over lanes.
"""

import triton
import triton.language as tl

from vssm_kernels import tiles_triton as tiles

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Kernels of a scan are the same for all sizes: their loads are a lane wide, so nothing is gained by knowing multiples.
_ROWS = ("x", "dt", "z", "y", "dy", "dx", "draw")
_SIZES = [
    *("samples", "sequences", "chained", "length", "padded", "chunk", "chunks", "walks", "width", "N", "rank"),
    *("tables", "unaligned", *(f"{rows}_{axis}" for rows in _ROWS for axis in ("sample", "token", "direction"))),
]


@triton.jit
def pack_kernel(
    B, C, order, gap, places, gaps, matrices,
    sequences, steps, length, padded, states, tables,
    B_sample, B_token, B_direction, B_state, C_sample, C_token, C_direction, C_state, order_tables, gap_tables,
    HAS_ORDER: tl.constexpr, HAS_GAP: tl.constexpr, CHAIN: tl.constexpr, STEP_PARAMS: tl.constexpr,
    B_PER_TOKEN: tl.constexpr, C_PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    STATES: tl.constexpr,
):  # fmt: skip
    """Brings what belongs to steps into the order of the steps.

    Writes per walk the pairs of B·log 2 and C, 0 beyond ``length``; and tables, one per sequence or, where orders
    differ, one per walk: the pairs of rows and visits, and gaps. Chained sequences count rows and visits as
    token·k + direction.
    """
    walk = tl.program_id(0).to(tl.int64)
    sample, sequence = walk // sequences, walk % sequences
    s = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists, stored = s < length, s < padded
    position = s % steps if CHAIN else s
    token = position
    if HAS_ORDER:
        token = tl.load(order + walk % order_tables * length + s, mask=exists, other=0).to(tl.int32)
    row = tl.where(exists, position if STEP_PARAMS else token, 0)
    if walk < tables:
        visit, of_row = token, row
        if CHAIN:
            chained = length // steps
            visit, of_row = token * chained + s // steps, row * chained + s // steps
        at = places + 2 * (walk * padded + s - s % STEPS) + s % STEPS
        tl.store(at, tl.where(exists, of_row, 0), mask=stored)
        tl.store(at + STEPS, tl.where(exists, visit, 0), mask=stored)
        if HAS_GAP:
            value = tl.load(gap + walk % gap_tables * length + s, mask=exists, other=0)
            tl.store(gaps + walk * padded + s, value.to(tl.float32), mask=stored)
    n = tl.arange(0, STATES)[None, :]
    inside = (n < states) & stored[:, None]
    loaded = (n < states) & exists[:, None]
    row = row.to(tl.int64)[:, None]
    at = matrices + 2 * states * (walk * padded + s - s % STEPS)[:, None] + 2 * n * STEPS + (s % STEPS)[:, None]
    if B_PER_TOKEN:
        from_B = B + sample * B_sample + sequence * B_direction + row * B_token + n * B_state
        tl.store(at, tl.load(from_B, mask=loaded, other=0.0).to(tl.float32) * LN_2, mask=inside)
    if C_PER_TOKEN:
        from_C = C + sample * C_sample + sequence * C_direction + row * C_token + n * C_state
        tl.store(at + STEPS, tl.load(from_C, mask=loaded, other=0.0).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def scan_forward_kernel(
    x, dt, weight, bias, A, B, C, D, z, places, gaps, matrices, start, y, states, totals,
    samples, sequences, chained, length, padded, chunk, width, N, rank, tables, unaligned,
    x_sample, x_token, x_direction, dt_sample, dt_token, dt_direction,
    z_sample, z_token, z_direction, y_sample, y_token, y_direction,
    LOW_RANK: tl.constexpr, TWO_A_WORD: tl.constexpr, PARTS: tl.constexpr, HALF_DOT: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GAP: tl.constexpr, HAS_SKIP: tl.constexpr, CHAIN: tl.constexpr,
    TOKENS_LAST: tl.constexpr, SHARED_X: tl.constexpr, B_PER_TOKEN: tl.constexpr, C_PER_TOKEN: tl.constexpr,
    ONE_STATE: tl.constexpr, UNROLL: tl.constexpr, GATED: tl.constexpr, HAS_START: tl.constexpr, WRITE_Y: tl.constexpr,
    WRITE_STATES: tl.constexpr, WRITE_TOTALS: tl.constexpr, STEPS: tl.constexpr, LOG_STEPS: tl.constexpr,
    CHANNELS: tl.constexpr, SLOTS: tl.constexpr, LOG_SLOTS: tl.constexpr, FULL: tl.constexpr, MASKED: tl.constexpr,
    PRECISE: tl.constexpr, NVIDIA: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Takes the steps of a chunk.

    Writes y at its visits. ``WRITE_STATES``: the state before every tile, (tiles + chunks, b·k, n, d), with one more
    after each chunk; else the state after every chunk, (chunks, b·k, n, d). ``WRITE_TOTALS``: the sum of the decay
    steps of the chunk, (chunks, b·k, d).
    """
    blocks = tl.cdiv(width, CHANNELS)
    walk, chunk_index = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1)
    sample, sequence = walk // sequences, walk % sequences
    walks = (samples + tl.zeros((), tl.int64)) * sequences
    channels = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside = channels < width
    # In 64 bits the compiler sees that the two channels of a lane are 32 apart, and gives them one address.
    lanes = tl.arange(0, CHANNELS).to(tl.int64 if CHANNELS > 32 else tl.int32)
    lanes += tl.program_id(0) % blocks * CHANNELS + unaligned
    across = lanes.to(INDEX) * length if TOKENS_LAST else lanes
    offsets = tl.arange(0, STEPS)
    COLUMNS: tl.constexpr = SLOTS * CHANNELS
    own = N // SLOTS
    columns = tl.arange(0, COLUMNS)
    channels = tl.program_id(0) % blocks * CHANNELS + columns % CHANNELS
    wide, wide_inside = channels + columns // CHANNELS * own * width + unaligned, channels < width
    begin = chunk_index * chunk
    end = tl.minimum(begin + chunk, length)
    last = begin + (end - begin - 1) // STEPS * STEPS

    x += sample * x_sample + (0 if CHAIN else sequence * x_direction)
    x_block = x + tl.program_id(0) % blocks * CHANNELS
    y += sample * y_sample + (0 if CHAIN else sequence * y_direction)
    z += sample * z_sample + (0 if CHAIN else sequence * z_direction)
    dt += sample * dt_sample + sequence * dt_direction
    A, B, C = A + sequence * width * N, B + sequence * width * N, C + sequence * width * N
    places += walk % tables * 2 * padded
    gaps += walk % tables * padded
    matrices += walk * 2 * N * padded
    matrix = tiles.load_weight(weight + sequence * rank * width, rank, lanes, inside, PARTS)
    offset, idle, skip = tiles.load_channels(
        bias, D, sequence * width, lanes, inside, HAS_BIAS, HAS_SKIP, SOFTPLUS, PRECISE, NVIDIA, FULL, CHANNELS
    )

    entry = walks * N * width  # of one state of every walk
    kept = states + chunk_index * entry + walk * N * width
    if WRITE_STATES:
        kept += begin // STEPS * entry
    total = tl.zeros((1, CHANNELS), tl.float32)
    h = tl.zeros((1, COLUMNS), tl.float32)
    for n in range(own):
        if HAS_START:
            h = tiles.load_row(start + chunk_index * entry + (walk * N + n) * width, wide, wide_inside, FULL)
        if not ONE_STATE:
            tl.store(kept + n * width + wide[None, :], h, mask=wide_inside[None, :])
    if ONE_STATE:
        A_n = tiles.load_row(A, wide, wide_inside, FULL)
        next_BC = tiles.load_pairs(matrices + 2 * N * begin, own, SLOTS, STEPS)

    # Loads are issued a tile ahead of their use, after two tiles in which their rows come into the cache; those of
    # places three; those of states one group of states ahead.
    next_place = tiles.load_pair(places + 2 * begin, STEPS)
    later_place = tiles.load_pair(places + 2 * tl.minimum(begin + STEPS, last), STEPS)
    latest_place = tiles.load_pair(places + 2 * tl.minimum(begin + 2 * STEPS, last), STEPS)
    row, visit = tiles.rows_and_visits(next_place, begin, STEPS, TOKENS_LAST)
    row, visit = row // chained if CHAIN else row, visit // chained if CHAIN and SHARED_X else visit
    next_dts = tiles.load_dt(
        dt, row.to(INDEX), dt_token, rank, across, begin, end, inside,
        LOW_RANK, TWO_A_WORD, PARTS, STEPS, FULL, TOKENS_LAST,
    )  # fmt: skip
    next_xs = tiles.load_tokens(x, visit.to(INDEX), x_token, across, begin, end, inside, STEPS, FULL, TOKENS_LAST)
    for first in range(begin, end, STEPS):
        steps = first + offsets
        following = tl.minimum(first + STEPS, last)
        place, next_place, later_place = next_place, later_place, latest_place
        latest_place = tiles.load_pair(places + 2 * tl.minimum(first + 3 * STEPS, last), STEPS)
        dts = tiles.dts_of(next_dts, dt.dtype.element_ty, PARTS, TOKENS_LAST, STEPS, LOG_STEPS, CHANNELS)
        xs = next_xs.to(tl.float32)
        if TOKENS_LAST:
            xs = tiles.pinned(xs, STEPS, LOG_STEPS, CHANNELS)
        row, visit = tiles.rows_and_visits(next_place, following, STEPS, TOKENS_LAST)
        row, visit = row // chained if CHAIN else row, visit // chained if CHAIN and SHARED_X else visit
        next_dts = tiles.load_dt(
            dt, row.to(INDEX), dt_token, rank, across, following, end, inside,
            LOW_RANK, TWO_A_WORD, PARTS, STEPS, FULL, TOKENS_LAST,
        )  # fmt: skip
        next_xs = tiles.load_tokens(
            x, visit.to(INDEX), x_token, across, following, end, inside, STEPS, FULL, TOKENS_LAST
        )
        tiles.prefetch(
            dt,
            dt_token,
            x_block,
            x_token,
            later_place,
            chained,
            STEPS,
            CHAIN and not SHARED_X,
            NVIDIA and not TOKENS_LAST,
        )
        if ONE_STATE:
            BC_n = next_BC
            next_BC = tiles.load_pairs(matrices + 2 * N * following, own, SLOTS, STEPS)
        else:
            of_tile = matrices + 2 * N * first
            group = tiles.load_states(A, kept, of_tile, 0, own, width, wide, wide_inside, UNROLL, SLOTS, STEPS, FULL)
        gap = tl.load(gaps + steps) if HAS_GAP else 0.0
        raw = tiles.raw_steps(dts, matrix, offset, LOW_RANK, PARTS, HALF_DOT, STEPS, CHANNELS)
        step, decay_step = tiles.steps_of_tile(
            raw, gap, idle, steps < end, SOFTPLUS, HAS_GAP, MASKED, PRECISE, NVIDIA, STEPS, LOG_STEPS, CHANNELS, SLOTS
        )
        if WRITE_TOTALS:
            total += tl.sum(decay_step, 0, keep_dims=True)
        source = step * xs
        if SLOTS > 1:
            decay_step = tiles.widened(decay_step, SLOTS, CHANNELS)
            source = tiles.widened(source, SLOTS, CHANNELS)
        out = tl.zeros_like(source)
        if ONE_STATE and WRITE_STATES:
            tl.store(kept + wide[None, :], h, mask=wide_inside[None, :])
            kept += entry
        for n0 in range(0, 1 if ONE_STATE else own, UNROLL):
            if not ONE_STATE:
                rates, hs, pairs = group
                group = tiles.load_states(
                    A, kept, of_tile, tl.minimum(n0 + UNROLL, own - UNROLL), own, width, wide, wide_inside,
                    UNROLL, SLOTS, STEPS, FULL,
                )  # fmt: skip
            for i in tl.static_range(UNROLL):
                n = n0 + i
                if not ONE_STATE:
                    A_n, h, BC_n = rates[i], hs[i], pairs[i]
                decay = tiles.decay(decay_step * A_n, PRECISE, NVIDIA)
                B_n, C_n = tiles.unpaired(BC_n, SLOTS, STEPS, CHANNELS)
                added = source * tiles.along(B_n, B, n, width, wide, wide_inside, B_PER_TOKEN, FULL)
                _, after, h = tiles.states_of_tile(decay, added, h, STEPS, LOG_STEPS, COLUMNS)
                if not ONE_STATE:
                    at = kept + n * width + wide[None, :]
                    tl.store(at + entry if WRITE_STATES else at, h, mask=wide_inside[None, :])
                if WRITE_Y:
                    out += after * tiles.along(C_n, C, n, width, wide, wide_inside, C_PER_TOKEN, FULL)
        if not ONE_STATE and WRITE_STATES:
            kept += entry
        if WRITE_Y:
            out = tiles.over_slots(out, LOG_SLOTS, STEPS, CHANNELS)
            if HAS_SKIP:
                out += skip * xs
            _, visited = tiles.rows_and_visits(place, first, STEPS, TOKENS_LAST)
            visited = visited.to(INDEX)
            if GATED:
                gate = tiles.load_tokens(z, visited, z_token, across, first, end, inside, STEPS, FULL, TOKENS_LAST)
                gate = gate.to(tl.float32)
                out *= gate * tiles.sigmoid(gate)
            y_at = tiles.rows_at(y, visited, y_token, across, TOKENS_LAST)
            tiles.store_tokens(y_at, out, first, end, inside, STEPS, FULL)
    if ONE_STATE:
        tl.store(kept + wide[None, :], h, mask=wide_inside[None, :])
    if WRITE_TOTALS:
        tl.store(totals + (chunk_index * walks + walk) * width + lanes[None, :], total, mask=inside[None, :])


@triton.jit(do_not_specialize=_SIZES)
def carry_kernel(
    ends, totals, A, first, chunks, walks, sequences, width, N, unaligned,
    HAS_FIRST: tl.constexpr, REVERSE: tl.constexpr, CHANNELS: tl.constexpr, PRECISE: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Turns what every chunk adds to its own end into what it starts from, in place, (chunks, b·k, n, d).

    A chunk multiplies what it starts from by 2^(A·total). ``REVERSE``: gradients, carried from the last chunk on.
    """
    walk = (tl.program_id(0) // N).to(tl.int64)
    n = tl.program_id(0) % N
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS) + unaligned
    inside = channels < width
    rate = tl.load(A + (walk % sequences * N + n) * width + channels, mask=inside, other=0.0)
    carried = (walk * N + n) * width + channels
    h = tl.zeros((CHANNELS,), tl.float32)
    if HAS_FIRST:
        h = tl.load(first + carried, mask=inside, other=0.0)
    for i in range(chunks):
        chunk_index = (chunks - 1 - i if REVERSE else i) + tl.zeros((), tl.int64)
        at = ends + chunk_index * walks * N * width + carried
        added = tl.load(at, mask=inside, other=0.0)
        total = tl.load(totals + (chunk_index * walks + walk) * width + channels, mask=inside, other=0.0)
        tl.store(at, h, mask=inside)
        h = tiles.decay(rate * total, PRECISE, NVIDIA) * h + added


@triton.jit(do_not_specialize=_SIZES)
def scan_adjoint_kernel(
    x, dt, weight, bias, A, B, C, D, places, gaps, matrices, states, dy, later,
    dx, draw, dmatrices, dB, dC, dA, dD, dbias,
    samples, sequences, chained, length, padded, chunk, width, N, rank, tables, unaligned,
    x_sample, x_token, x_direction, dt_sample, dt_token, dt_direction,
    dy_sample, dy_token, dy_direction, dx_sample, dx_token, dx_direction, draw_sample, draw_token, draw_direction,
    LOW_RANK: tl.constexpr, TWO_A_WORD: tl.constexpr, PARTS: tl.constexpr, HALF_DOT: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GAP: tl.constexpr, HAS_SKIP: tl.constexpr, CHAIN: tl.constexpr,
    TOKENS_LAST: tl.constexpr, SHARED_X: tl.constexpr, SHARED_DY: tl.constexpr, SAME_ROWS: tl.constexpr,
    B_PER_TOKEN: tl.constexpr, C_PER_TOKEN: tl.constexpr, ONE_STATE: tl.constexpr, UNROLL: tl.constexpr,
    HAS_STATES: tl.constexpr, HAS_LATER: tl.constexpr, ONLY_EARLIER: tl.constexpr, STEPS: tl.constexpr,
    LOG_STEPS: tl.constexpr, CHANNELS: tl.constexpr, SLOTS: tl.constexpr, LOG_SLOTS: tl.constexpr, FULL: tl.constexpr,
    MASKED: tl.constexpr, PRECISE: tl.constexpr, EXACT_DOT: tl.constexpr, SPLIT: tl.constexpr, NVIDIA: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Takes the steps of a chunk backwards, tile by tile, from the states before each tile that were saved.

    Writes gradients of x at its visits; ``draw``, of weight·dt + bias, at the rows of dt; of B and C that belong to
    steps, per block of channels and walk, to ``dmatrices`` (tiles, n, 2, STEPS); of constants, as of everything else,
    per walk and chunk. ``later`` (chunks, b·k, n, d) is the gradient of the state after each chunk
    and becomes that of the state before it. ``ONLY_EARLIER``: nothing else.
    """
    blocks = tl.cdiv(width, CHANNELS)
    walk, chunk_index = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1)
    block = tl.program_id(0) % blocks
    sample, sequence = walk // sequences, walk % sequences
    walks = (samples + tl.zeros((), tl.int64)) * sequences
    channels = block * CHANNELS + tl.arange(0, CHANNELS)
    lanes, inside = channels + unaligned, channels < width
    across = lanes.to(INDEX) * length if TOKENS_LAST else lanes
    offsets = tl.arange(0, STEPS)
    COLUMNS: tl.constexpr = SLOTS * CHANNELS
    own = N // SLOTS
    columns = tl.arange(0, COLUMNS)
    of_columns = block * CHANNELS + columns % CHANNELS
    wide, wide_inside = of_columns + columns // CHANNELS * own * width + unaligned, of_columns < width
    begin = chunk_index * chunk
    end = tl.minimum(begin + chunk, length)
    count = tl.cdiv(end - begin, STEPS)

    x += sample * x_sample + (0 if CHAIN else sequence * x_direction)
    dx += sample * dx_sample + (0 if CHAIN else sequence * dx_direction)
    dy += sample * dy_sample + (0 if CHAIN else sequence * dy_direction)
    dt += sample * dt_sample + sequence * dt_direction
    A, B, C = A + sequence * width * N, B + sequence * width * N, C + sequence * width * N
    places += walk % tables * 2 * padded
    gaps += walk % tables * padded
    matrices += walk * 2 * N * padded
    dmatrices += (block * walks + walk) * 2 * N * padded
    draw += sample * draw_sample + (0 if CHAIN else sequence * draw_direction)
    matrix = tiles.load_weight(weight + sequence * rank * width, rank, lanes, inside, PARTS)
    offset, idle, skip = tiles.load_channels(
        bias, D, sequence * width, lanes, inside, HAS_BIAS, HAS_SKIP, SOFTPLUS, PRECISE, NVIDIA, FULL, CHANNELS
    )

    entry = walks * N * width  # of one state of every walk
    of_walk = chunk_index * entry + walk * N * width
    kept, A_sums, B_sums, C_sums = later + of_walk, dA + of_walk, dB + of_walk, dC + of_walk
    saved = states + of_walk + (begin // STEPS + count - 1) * entry
    dD_sum = tl.zeros((1 if SLOTS == 1 else STEPS, CHANNELS), tl.float32)
    dbias_sum, didle_sum = dD_sum, dD_sum
    wide_zero = tl.zeros((1, COLUMNS), tl.float32)
    SAVED: tl.constexpr = HAS_STATES and not ONLY_EARLIER
    q, dA_sum = wide_zero, wide_zero
    if ONE_STATE and HAS_LATER:
        q = tiles.load_row(kept, wide, wide_inside, FULL)
    for n in range(own):
        at = n * width + wide[None, :]
        if not ONE_STATE and not HAS_LATER:
            tl.store(kept + at, wide_zero, mask=wide_inside[None, :])
        if not ONE_STATE and not ONLY_EARLIER:
            tl.store(A_sums + at, wide_zero, mask=wide_inside[None, :])
        if not B_PER_TOKEN and not ONLY_EARLIER:
            tl.store(B_sums + at, wide_zero, mask=wide_inside[None, :])
        if not C_PER_TOKEN and not ONLY_EARLIER:
            tl.store(C_sums + at, wide_zero, mask=wide_inside[None, :])

    # While a tile is at work, the rows of the next one come into the cache, and places of the one after it are loaded;
    # states are loaded one group ahead.
    first = begin + (count - 1) * STEPS
    place = tiles.load_pair(places + 2 * first, STEPS)
    next_place = tiles.load_pair(places + 2 * tl.maximum(first - STEPS, begin), STEPS)
    if ONE_STATE:
        A_n = tiles.load_row(A, wide, wide_inside, FULL)
        next_BC = tiles.load_pairs(matrices + 2 * N * first, own, SLOTS, STEPS)
        next_h = wide_zero
        if SAVED:
            next_h = tiles.load_row(saved, wide, wide_inside, FULL)
    for _tile in range(count):
        steps = first + offsets
        exists = steps < end
        ahead = tl.maximum(first - STEPS, begin)
        row, visit = tiles.rows_and_visits(place, first, STEPS, TOKENS_LAST)
        row, visit = row.to(INDEX), visit.to(INDEX)
        dts = tiles.load_dt(
            dt, row // chained if CHAIN else row, dt_token, rank, across, first, end, inside,
            LOW_RANK, TWO_A_WORD, PARTS, STEPS, FULL, TOKENS_LAST,
        )  # fmt: skip
        dts = tiles.dts_of(dts, dt.dtype.element_ty, PARTS, TOKENS_LAST, STEPS, LOG_STEPS, CHANNELS)
        of_result = visit // chained if CHAIN and SHARED_DY else visit
        dy_at = tiles.rows_at(dy, of_result, dy_token, across, TOKENS_LAST)
        dys = tiles.load_steps(dy_at, first, end, inside, STEPS, FULL)
        seen = visit // chained if CHAIN and SHARED_X else visit
        xs = tiles.load_tokens(x, seen, x_token, across, first, end, inside, STEPS, FULL, TOKENS_LAST)
        of_tile = matrices + 2 * N * first
        if ONE_STATE:
            BC_n, h = next_BC, next_h
            next_BC = tiles.load_pairs(matrices + 2 * N * ahead, own, SLOTS, STEPS)
            if SAVED:
                next_h = tiles.load_row(saved - tl.where(first > begin, entry, 0), wide, wide_inside, FULL)
        else:
            group = tiles.load_states(A, kept, of_tile, 0, own, width, wide, wide_inside, UNROLL, SLOTS, STEPS, FULL)
            befores = tiles.load_rows(saved, 0, width, wide, wide_inside, SAVED, UNROLL, FULL)
            sums = tiles.load_rows(A_sums, 0, width, wide, wide_inside, not ONLY_EARLIER, UNROLL, FULL)
        x_block, dy_block = x + block * CHANNELS, dy + block * CHANNELS
        tiles.prefetch(
            dt,
            dt_token,
            x_block,
            x_token,
            next_place,
            chained,
            STEPS,
            CHAIN and not SHARED_X,
            NVIDIA and not TOKENS_LAST,
        )
        tiles.prefetch(
            dt,
            dt_token,
            dy_block,
            dy_token,
            next_place,
            chained,
            STEPS,
            CHAIN and not SHARED_DY,
            NVIDIA and not TOKENS_LAST,
        )
        place = next_place
        next_place = tiles.load_pair(places + 2 * tl.maximum(first - 2 * STEPS, begin), STEPS)
        gap = tl.load(gaps + steps) if HAS_GAP else 0.0
        raw = tiles.raw_steps(dts, matrix, offset, LOW_RANK, PARTS, HALF_DOT, STEPS, CHANNELS)
        step, decay_step = tiles.steps_of_tile(
            raw, gap, idle, exists, SOFTPLUS, HAS_GAP, MASKED, PRECISE, NVIDIA, STEPS, LOG_STEPS, CHANNELS, SLOTS
        )
        dys, xs = dys.to(tl.float32), xs.to(tl.float32)
        if TOKENS_LAST:
            dys = tiles.pinned(dys, STEPS, LOG_STEPS, CHANNELS)
            xs = tiles.pinned(xs, STEPS, LOG_STEPS, CHANNELS)
        source, dys_wide, decays = step * xs, dys, decay_step
        if SLOTS > 1:
            source, dys_wide = tiles.widened(source, SLOTS, CHANNELS), tiles.widened(dys, SLOTS, CHANNELS)
            decays = tiles.widened(decay_step, SLOTS, CHANNELS)
        dsource, ddecay = tl.zeros_like(source), tl.zeros_like(source)
        for n0 in range(0, 1 if ONE_STATE else own, UNROLL):
            if not ONE_STATE:
                rates, qs, pairs = group
                hs, sums_now = befores, sums
                n_ahead = tl.minimum(n0 + UNROLL, own - UNROLL)
                group = tiles.load_states(
                    A, kept, of_tile, n_ahead, own, width, wide, wide_inside, UNROLL, SLOTS, STEPS, FULL
                )
                befores = tiles.load_rows(saved, n_ahead, width, wide, wide_inside, SAVED, UNROLL, FULL)
                sums = tiles.load_rows(A_sums, n_ahead, width, wide, wide_inside, not ONLY_EARLIER, UNROLL, FULL)
            for i in tl.static_range(UNROLL):
                n = n0 + i
                if not ONE_STATE:
                    A_n, q, BC_n, h = rates[i], qs[i], pairs[i], hs[i]
                B_n, C_n = tiles.unpaired(BC_n, SLOTS, STEPS, CHANNELS)
                decay = tiles.decay(decays * A_n, PRECISE, NVIDIA)
                C_n = tiles.along(C_n, C, n, width, wide, wide_inside, C_PER_TOKEN, FULL)
                g_tile, q_tile, q = tiles.gradients_of_tile(decay, C_n * dys_wide, q, STEPS, LOG_STEPS, COLUMNS)
                if not ONE_STATE:
                    tl.store(kept + n * width + wide[None, :], q, mask=wide_inside[None, :])
                if not ONLY_EARLIER:
                    B_n = tiles.along(B_n, B, n, width, wide, wide_inside, B_PER_TOKEN, FULL)
                    before, after, _ = tiles.states_of_tile(decay, source * B_n, h, STEPS, LOG_STEPS, COLUMNS)
                    dsource += B_n * g_tile
                    dexponent = q_tile * before
                    ddecay += A_n * dexponent
                    dA_n = tl.sum(dexponent * decays, 0, keep_dims=True) * LN_2
                    dB_n, dC_n = g_tile * source, after * dys_wide
                    if ONE_STATE:
                        dA_sum += dA_n
                    else:
                        tl.store(A_sums + n * width + wide[None, :], sums_now[i] + dA_n, mask=wide_inside[None, :])
                    if not B_PER_TOKEN:
                        dB_sum = tl.sum(dB_n, 0, keep_dims=True) * LN_2
                        tiles.add_row(B_sums + n * width, dB_sum, wide, wide_inside, FULL)
                    if not C_PER_TOKEN:
                        dC_sum = tl.sum(dC_n, 0, keep_dims=True)
                        tiles.add_row(C_sums + n * width, dC_sum, wide, wide_inside, FULL)
                    if B_PER_TOKEN or C_PER_TOKEN:
                        of_state = dmatrices + 2 * N * first + n * 2 * STEPS
                        tiles.store_sums(of_state, dB_n, dC_n, own, EXACT_DOT, SPLIT, STEPS, LOG_STEPS, CHANNELS, SLOTS)
        saved -= entry
        if not ONLY_EARLIER:
            if SLOTS > 1:
                dsource = tiles.settled(tiles.over_slots(dsource, LOG_SLOTS, STEPS, CHANNELS), NVIDIA)
                ddecay = tiles.settled(tiles.over_slots(ddecay, LOG_SLOTS, STEPS, CHANNELS), NVIDIA)
            draw_tile = xs * dsource * LOG2_E + ddecay
            if SOFTPLUS:
                draw_tile *= tiles.softplus_slope(step, PRECISE, NVIDIA)
            if MASKED:
                draw_tile = tl.where(exists[:, None], draw_tile, 0.0)
            dx_tile = step * dsource
            if HAS_SKIP:
                dx_tile += skip * dys
                dD_sum += tiles.over_steps(dys * xs, SLOTS)
            dx_at = tiles.rows_at(dx, visit, x_token if SAME_ROWS else dx_token, across, TOKENS_LAST)
            tiles.store_tokens(dx_at, dx_tile, first, end, inside, STEPS, FULL)
            draw_at = tiles.rows_at(draw, row, draw_token, across, TOKENS_LAST)
            tiles.store_tokens(draw_at, draw_tile, first, end, inside, STEPS, FULL)
            dbias_sum += tiles.over_steps(draw_tile, SLOTS)
            if HAS_GAP:
                didle_sum += tiles.over_steps(ddecay * gap[:, None], SLOTS)
        first = ahead

    if ONE_STATE:
        tl.store(kept + wide[None, :], q, mask=wide_inside[None, :])
    if not ONLY_EARLIER:
        at = (chunk_index * walks + walk) * width + lanes[None, :]
        if ONE_STATE:
            tl.store(A_sums + wide[None, :], dA_sum, mask=wide_inside[None, :])
        if HAS_SKIP:
            tl.store(dD + at, tl.sum(dD_sum, 0, keep_dims=True), mask=inside[None, :])
        dbias_sum = tl.sum(dbias_sum, 0, keep_dims=True)
        if HAS_GAP:
            didle_sum = tl.sum(didle_sum, 0, keep_dims=True)
            dbias_sum += didle_sum * (tiles.softplus_slope(idle, PRECISE, NVIDIA) if SOFTPLUS else 1.0)
        tl.store(dbias + at, dbias_sum, mask=inside[None, :])


@triton.jit
def unpack_kernel(
    dmatrices, places, dB, dC,
    blocks, walks, sequences, length, padded, N, tables,
    dB_sample, dB_token, dB_direction, dC_sample, dC_token, dC_direction,
    B_PER_TOKEN: tl.constexpr, C_PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    STATES: tl.constexpr,
):  # fmt: skip
    """Sums gradients of B and C over blocks of channels, and writes them to the rows of tokens."""
    walk = tl.program_id(0).to(tl.int64)
    sample, sequence = walk // sequences, walk % sequences
    s = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)[None, :]
    inside = (s < length)[:, None] & (n < N)
    row = tl.load(places + 2 * (walk % tables * padded + s - s % STEPS) + s % STEPS, mask=s < length, other=0)
    row = row.to(tl.int64)[:, None]
    of_block = (walks + tl.zeros((), tl.int64)) * 2 * N * padded
    dmatrices += walk * 2 * N * padded + tl.program_id(1) * BLOCK * 2 * N
    if B_PER_TOKEN:
        total = _sum_of_matrix(dmatrices, blocks, of_block, padded, N, BLOCK, STEPS, STATES)
        to = dB + sample * dB_sample + sequence * dB_direction + row * dB_token + n
        tl.store(to, total.to(dB.dtype.element_ty), mask=inside)
    if C_PER_TOKEN:
        total = _sum_of_matrix(dmatrices + STEPS, blocks, of_block, padded, N, BLOCK, STEPS, STATES)
        to = dC + sample * dC_sample + sequence * dC_direction + row * dC_token + n
        tl.store(to, total.to(dC.dtype.element_ty), mask=inside)


@triton.jit
def _sum_of_matrix(
    dmatrices, blocks, of_block, padded, N, BLOCK: tl.constexpr, STEPS: tl.constexpr, STATES: tl.constexpr
):
    """The gradient of B or C, (BLOCK, STATES), summed over blocks of channels as it lies there, state by state."""
    TILES: tl.constexpr = BLOCK // STEPS
    tile = tl.arange(0, TILES)[:, None, None]
    n, step = tl.arange(0, STATES)[None, :, None], tl.arange(0, STEPS)[None, None, :]
    inside = (tl.program_id(1) * BLOCK + tile * STEPS < padded) & (n < N)
    total = tl.zeros((TILES, STATES, STEPS), tl.float32)
    for block in range(blocks):
        at = dmatrices + block * of_block + (tile * N + n) * 2 * STEPS + step
        total += tl.load(at, mask=inside, other=0.0)
    return tl.reshape(tl.permute(total, (0, 2, 1)), (BLOCK, STATES))


@triton.jit(do_not_specialize=["rows", "rows_each"])
def dt_gradient_kernel(
    draw, matrix, ddt, rows, width, rank, rows_each, draw_row, draw_direction, ddt_row, ddt_direction,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Gradient of the low-rank dt, (rows, k, r): draw (rows, k, d) times ``matrix``, the weight (k, d, r) in its dtype.

    A program has ``rows_each`` rows. Rows and blocks of channels are one loop, so that loads can be ahead of it.
    """
    direction = tl.program_id(1).to(tl.int64)
    channels, ranks = tl.arange(0, BLOCK), tl.arange(0, RANKS)[None, :]
    draw += direction * draw_direction
    matrix += direction * width * rank
    ddt += direction * ddt_direction + ranks
    begin = tl.program_id(0).to(tl.int64) * rows_each
    end = tl.minimum(begin + rows_each, rows)
    blocks = tl.cdiv(width, BLOCK)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for i in range(tl.cdiv(end - begin, ROWS) * blocks):
        row = begin + i // blocks * ROWS + tl.arange(0, ROWS)[:, None]
        channel = i % blocks * BLOCK + channels
        exists = (row < end) & (channel < width)[None, :]
        steps = tl.load(draw + row * draw_row + channel[None, :], mask=exists, other=0.0)
        inside = (channel < width)[:, None] & (ranks < rank)
        of_channels = tl.load(matrix + channel[:, None] * rank + ranks, mask=inside, other=0.0)
        total = tl.dot(steps, of_channels, total, input_precision="ieee")
        if i % blocks == blocks - 1:
            tl.store(ddt + row * ddt_row, total.to(ddt.dtype.element_ty), mask=(row < end) & (ranks < rank))
            total = tl.zeros((ROWS, RANKS), tl.float32)


@triton.jit(do_not_specialize=["rows", "rows_each"])
def weight_gradient_kernel(
    draw, dt, dweight, rows, width, rank, rows_each, draw_row, draw_direction, dt_row, dt_direction,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Gradient of the weight of dt: drawᵀ·dt of ``rows_each`` rows, (parts, k, d, r)."""
    direction = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    ranks = tl.arange(0, RANKS)[None, :]
    draw += direction * draw_direction + channel[None, :]
    dt += direction * dt_direction + ranks
    begin = tl.program_id(0).to(tl.int64) * rows_each
    end = tl.minimum(begin + rows_each, rows)
    total = tl.zeros((BLOCK, RANKS), tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        steps = tl.load(draw + row * draw_row, mask=(row < end) & (channel < width)[None, :], other=0.0)
        dts = tl.load(dt + row * dt_row, mask=(row < end) & (ranks < rank), other=0.0)
        total = tl.dot(tl.trans(steps), dts.to(steps.dtype), total, input_precision="ieee")
    at = ((tl.program_id(0) * tl.num_programs(1) + direction) * width + channel[:, None]) * rank + ranks
    tl.store(dweight + at, total, mask=(channel < width)[:, None] & (ranks < rank))


@triton.jit
def merge_kernel(
    parts, z, out, rows, directions, width, part_row, part_direction, z_row,
    GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Out (rows, d) = Σ parts (rows, k, d) over directions, times silu(z) if gated."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    channels = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (channels < width)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    parts += row * part_row + channels
    for _ in range(directions):
        total += tl.load(parts, mask=inside, other=0.0).to(tl.float32)
        parts += part_direction
    if GATED:
        gate = tl.load(z + row * z_row + channels, mask=inside, other=0.0).to(tl.float32)
        total *= gate * tiles.sigmoid(gate)
    tl.store(out + row * width + channels, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_adjoint_kernel(
    dy, z, result, dz, dresult, rows, width, dy_row, z_row, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradients of z and of ``result`` where y = result·silu(z); all (rows, d)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    channels = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (channels < width)
    gate = tl.load(z + row * z_row + channels, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(dy + row * dy_row + channels, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(result + row * width + channels, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tiles.sigmoid(gate)
    slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    at = row * width + channels
    tl.store(dz + at, (upstream * value * slope).to(dz.dtype.element_ty), mask=inside)
    tl.store(dresult + at, (upstream * gate * sigmoid).to(dresult.dtype.element_ty), mask=inside)
