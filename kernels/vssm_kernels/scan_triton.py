"""The scan as Triton kernels. ``launch.py`` allocates, chooses sizes and launches them.

A program owns one sequence of one sample (a walk), a block of channels and a chunk of steps. It takes the steps one
after the other with the state, (n, block), in registers, and reads the row of channels of whatever token the order
names, so rows are contiguous in every direction. Loads of ``UNROLL`` steps are issued before their arithmetic.

Names: h is the state, g its gradient, a raw step is a step before softplus; the rest as in kernels/README.md, where the
derivation is. Everything per channel is stored with channels last: A (k, n, d), weight (k, r, d), states (..., n, d).

Lanes of a warp are channels, so that sums over states and ranks stay inside a thread. ``unaligned`` is 0, but the
compiler must not know: it would load four channels of a state at once, spread the states over lanes instead, and sum
with shuffles.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _exp2(x, NVIDIA: tl.constexpr):
    """2^x. The bare NVIDIA instruction takes denormals for 0, as a decay may."""
    if NVIDIA:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@triton.jit
def _decay(x, PRECISE: tl.constexpr, NVIDIA: tl.constexpr):
    """2^x of a decay. The instruction errs to one side near 1, which thousands of steps add up."""
    decay = _exp2(x, NVIDIA)
    if PRECISE:
        t = x * LN_2
        series = 1.0 + t * (1.0 + t * (0.5 + t * (0.1666666667 + t * 0.0416666667)))
        decay = tl.where(t > -0.03, series, decay)
    return decay


@triton.jit
def _log2(x, NVIDIA: tl.constexpr):
    if NVIDIA:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def _softplus(x, PRECISE: tl.constexpr, NVIDIA: tl.constexpr):
    """max(x, 0) + log(1 + exp(−|x|)). A logarithm near 1 loses small steps, so ``PRECISE`` has a series for them."""
    t = _exp2(-tl.abs(x) * LOG2_E, NVIDIA)
    tail = LN_2 * _log2(1.0 + t, NVIDIA)
    if PRECISE:
        series = t * (1.0 + t * (-0.5 + t * (0.3333333333 + t * (-0.25 + t * (0.2 - t * 0.1666666667)))))
        tail = tl.where(t < 0.08, series, tail)
    return tl.maximum(x, 0.0) + tail


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def _visits(
    order, first, end, sequence, steps,
    CHAIN: tl.constexpr, STEP_PARAMS: tl.constexpr, UNROLL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Of each step of a group: the visited token, the row of its parameters, its direction, whether there is one."""
    tokens, parameters, directions, exist = (), (), (), ()
    for u in tl.static_range(UNROLL):
        s = first + u
        direction = s // steps if CHAIN else sequence
        token = tl.load(order + (s if CHAIN else sequence * steps + s), mask=s < end, other=0).to(INDEX)
        position = s - direction * steps if CHAIN else s
        tokens = tokens + (token,)
        parameters = parameters + (position + tl.zeros((), INDEX) if STEP_PARAMS else token,)
        directions = directions + (direction,)
        exist = exist + (s < end,)
    return tokens, parameters, directions, exist


@triton.jit
def _load_rows(base, rows, directions, row_stride, direction_stride, columns, inside, exist, UNROLL: tl.constexpr):
    """A row of ``columns`` for each step, in float32; 0 where there is no such step or column."""
    loaded = ()
    for u in tl.static_range(UNROLL):
        pointer = base + rows[u] * row_stride + directions[u] * direction_stride
        loaded = loaded + (tl.load(pointer + columns, mask=inside & exist[u], other=0.0).to(tl.float32),)
    return loaded


@triton.jit
def _load_gaps(gap, first, sequence, steps, exist, CHAIN: tl.constexpr, HAS_GAP: tl.constexpr, UNROLL: tl.constexpr):
    gaps = ()
    for u in tl.static_range(UNROLL):
        value = 0.0
        if HAS_GAP:
            s = first + u
            value = tl.load(gap + (s if CHAIN else sequence * steps + s), mask=exist[u], other=0).to(tl.float32)
        gaps = gaps + (value,)
    return gaps


@triton.jit
def _load_channels(base, sequence, rows, lanes, width, inside, ROWS: tl.constexpr):
    """(rows, block) of a tensor (k, ROWS, d), in float32."""
    at = base + sequence * width * ROWS + rows[:, None] * width + lanes[None, :]
    return tl.load(at, mask=(rows < ROWS)[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def _raw_step(dt_row, weight, bias, LOW_RANK: tl.constexpr):
    """(block,), of a row of dt: (rank,) or (block,)."""
    return (tl.sum(weight * dt_row[:, None], 0) if LOW_RANK else dt_row) + bias


@triton.jit
def _activated(raw, exists, SOFTPLUS: tl.constexpr, PRECISE: tl.constexpr, NVIDIA: tl.constexpr):
    """Step size; 0 where there is no step, which leaves the state as it is."""
    return tl.where(exists, _softplus(raw, PRECISE, NVIDIA) if SOFTPLUS else raw, 0.0)


@triton.jit(do_not_specialize=["unaligned"])
def scan_forward_kernel(
    x, dt, weight, bias, A, B, C, D, order, gap, start, y, saved, ends, totals,
    sequences, tokens, steps, length, chunk, unaligned,
    x_sample, dt_sample, B_sample, C_sample, order_sample, gap_sample,
    x_token: tl.constexpr, x_direction: tl.constexpr, dt_token: tl.constexpr, dt_direction: tl.constexpr,
    B_token: tl.constexpr, B_direction: tl.constexpr, C_token: tl.constexpr, C_direction: tl.constexpr,
    directions: tl.constexpr, width: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    LOW_RANK: tl.constexpr, B_PER_TOKEN: tl.constexpr, C_PER_TOKEN: tl.constexpr, HAS_GAP: tl.constexpr,
    SOFTPLUS: tl.constexpr, CHAIN: tl.constexpr, STEP_PARAMS: tl.constexpr, HAS_START: tl.constexpr,
    WRITE_Y: tl.constexpr, WRITE_SAVED: tl.constexpr, WRITE_ENDS: tl.constexpr,
    STATES: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
    PRECISE: tl.constexpr, NVIDIA: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Takes the steps of a chunk.

    Writes, as asked: y at its visits, (b, l, k, d); the state before every group of ``UNROLL`` steps, (groups, b·k,
    n, d); the state after the chunk and the sum of its decay steps, (chunks, b·k, ...).
    """
    blocks: tl.constexpr = (width + BLOCK - 1) // BLOCK
    walk = (tl.program_id(0) // blocks).to(tl.int64)
    walks = tl.num_programs(0) // blocks
    chunk_index = tl.program_id(1)
    sample, sequence = walk // sequences, (walk % sequences).to(tl.int32)
    channels = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    lanes, inside = channels + unaligned, channels < width
    states, ranks = tl.arange(0, STATES), tl.arange(0, RANKS)
    dt_columns = ranks if LOW_RANK else channels
    dt_inside = ranks < RANK if LOW_RANK else inside
    state_at = walk * width * N + states[:, None] * width + lanes[None, :]
    state_inside = (states < N)[:, None] & inside[None, :]

    rates = _load_channels(A, sequence, states, lanes, width, inside, N) * LOG2_E
    matrix = _load_channels(weight, sequence, ranks, lanes, width, inside, RANK)
    offsets = tl.load(bias + sequence * width + channels, mask=inside, other=0.0).to(tl.float32)
    skip = tl.load(D + sequence * width + channels, mask=inside, other=0.0).to(tl.float32)
    idle = _softplus(offsets, PRECISE, NVIDIA) if SOFTPLUS else offsets
    if not B_PER_TOKEN:
        B_all = _load_channels(B, sequence, states, lanes, width, inside, N)
    if not C_PER_TOKEN:
        C_all = _load_channels(C, sequence, states, lanes, width, inside, N)
    x += sample * x_sample
    dt += sample * dt_sample + sequence * dt_direction
    B += sample * B_sample + sequence * B_direction
    C += sample * C_sample + sequence * C_direction
    order, gap = order + sample * order_sample, gap + sample * gap_sample
    y += sample * tokens * directions * width

    h = tl.zeros((STATES, BLOCK), tl.float32)
    if HAS_START:
        h = tl.load(start + chunk_index * walks * width * N + state_at, mask=state_inside, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    end = tl.minimum((chunk_index + 1) * chunk, length)
    for first in range(chunk_index * chunk, end, UNROLL):
        if WRITE_SAVED:
            group = first // UNROLL + tl.zeros((), tl.int64)
            tl.store(saved + group * walks * width * N + state_at, h, mask=state_inside)
        visited, parameters, rows, exist = _visits(
            order, first, end, sequence, steps, CHAIN, STEP_PARAMS, UNROLL, INDEX
        )
        gaps = _load_gaps(gap, first, sequence, steps, exist, CHAIN, HAS_GAP, UNROLL)
        xs = _load_rows(x, visited, rows, x_token, x_direction, channels, inside, exist, UNROLL)
        dts = _load_rows(dt, parameters, rows, dt_token, 0, dt_columns, dt_inside, exist, UNROLL)
        if B_PER_TOKEN:
            Bs = _load_rows(B, parameters, rows, B_token, 0, states, states < N, exist, UNROLL)
        if WRITE_Y and C_PER_TOKEN:
            Cs = _load_rows(C, parameters, rows, C_token, 0, states, states < N, exist, UNROLL)
        for u in tl.static_range(UNROLL):
            step = _activated(_raw_step(dts[u], matrix, offsets, LOW_RANK), exist[u], SOFTPLUS, PRECISE, NVIDIA)
            decay_step = step + gaps[u] * idle if HAS_GAP else step
            total += decay_step
            B_u = Bs[u][:, None] if B_PER_TOKEN else B_all
            h = _decay(rates * decay_step[None, :], PRECISE, NVIDIA) * h + B_u * (step * xs[u])[None, :]
            if WRITE_Y:
                C_u = Cs[u][:, None] if C_PER_TOKEN else C_all
                result = tl.sum(C_u * h, 0) + skip * xs[u]
                at = (visited[u] * directions + rows[u]) * width + channels
                tl.store(y + at, result.to(y.dtype.element_ty), mask=inside & exist[u])
    if WRITE_ENDS:
        tl.store(ends + chunk_index * walks * width * N + state_at, h, mask=state_inside)
        tl.store(totals + (chunk_index * walks + walk) * width + channels, total, mask=inside)


@triton.jit(do_not_specialize=["unaligned"])
def carry_kernel(
    ends, totals, A, first, chunks, sequences, unaligned,
    width: tl.constexpr, N: tl.constexpr, HAS_FIRST: tl.constexpr, REVERSE: tl.constexpr,
    STATES: tl.constexpr, BLOCK: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Turns what every chunk adds to its own end into what it starts from, in place, (chunks, b·k, n, d).

    A chunk multiplies what it starts from by exp(A·total). ``REVERSE``: gradients, carried from the last chunk on.
    """
    blocks: tl.constexpr = (width + BLOCK - 1) // BLOCK
    walk = (tl.program_id(0) // blocks).to(tl.int64)
    walks = tl.num_programs(0) // blocks
    channels = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    lanes, inside, states = channels + unaligned, channels < width, tl.arange(0, STATES)
    state_at = walk * width * N + states[:, None] * width + lanes[None, :]
    state_inside = (states < N)[:, None] & inside[None, :]
    rates = _load_channels(A, walk % sequences, states, lanes, width, inside, N) * LOG2_E
    h = tl.zeros((STATES, BLOCK), tl.float32)
    if HAS_FIRST:
        h = tl.load(first + state_at, mask=state_inside, other=0.0)
    for i in range(chunks):
        chunk_index = (chunks - 1 - i if REVERSE else i) + tl.zeros((), tl.int64)
        at = ends + chunk_index * walks * width * N + state_at
        added = tl.load(at, mask=state_inside, other=0.0)
        total = tl.load(totals + (chunk_index * walks + walk) * width + channels, mask=inside, other=0.0)
        tl.store(at, h, mask=state_inside)
        h = _exp2(rates * total[None, :], NVIDIA) * h + added


@triton.jit(do_not_specialize=["unaligned"])
def scan_adjoint_kernel(
    x, dt, weight, bias, A, B, C, D, z, order, gap, saved, dy, later,
    dx, draw, dz, dB, dC, dA, dD, dbias, dweight, earlier,
    sequences, tokens, steps, length, chunk, batch, unaligned,
    x_sample, dt_sample, B_sample, C_sample, order_sample, gap_sample, dy_sample, z_sample,
    x_token: tl.constexpr, x_direction: tl.constexpr, dt_token: tl.constexpr, dt_direction: tl.constexpr,
    B_token: tl.constexpr, B_direction: tl.constexpr, C_token: tl.constexpr, C_direction: tl.constexpr,
    dy_token: tl.constexpr, dy_direction: tl.constexpr, z_token: tl.constexpr, z_direction: tl.constexpr,
    directions: tl.constexpr, width: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    LOW_RANK: tl.constexpr, B_PER_TOKEN: tl.constexpr, C_PER_TOKEN: tl.constexpr, HAS_GAP: tl.constexpr,
    SOFTPLUS: tl.constexpr, CHAIN: tl.constexpr, STEP_PARAMS: tl.constexpr, HAS_LATER: tl.constexpr,
    GATED: tl.constexpr, ONLY_EARLIER: tl.constexpr,
    STATES: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
    PRECISE: tl.constexpr, NVIDIA: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Takes the steps of a chunk backwards, group by group, from the states before each group that were saved.

    Writes gradients of x, z and the raw step at their visits (b, l, k, d), of B and C per block of channels
    (blocks, b, l, k, n), of everything else per walk and chunk. ``ONLY_EARLIER``: nothing but the gradient of the state
    before the chunk, given none from later ones.
    """
    blocks: tl.constexpr = (width + BLOCK - 1) // BLOCK
    walk = (tl.program_id(0) // blocks).to(tl.int64)
    walks = tl.num_programs(0) // blocks
    block_index, chunk_index = tl.program_id(0) % blocks, tl.program_id(1)
    sample, sequence = walk // sequences, (walk % sequences).to(tl.int32)
    channels = block_index * BLOCK + tl.arange(0, BLOCK)
    lanes, inside = channels + unaligned, channels < width
    states, ranks = tl.arange(0, STATES), tl.arange(0, RANKS)
    dt_columns = ranks if LOW_RANK else channels
    dt_inside = ranks < RANK if LOW_RANK else inside
    state_at = walk * width * N + states[:, None] * width + lanes[None, :]
    state_inside = (states < N)[:, None] & inside[None, :]

    rates = _load_channels(A, sequence, states, lanes, width, inside, N)
    log2_rates = rates * LOG2_E
    matrix = _load_channels(weight, sequence, ranks, lanes, width, inside, RANK)
    offsets = tl.load(bias + sequence * width + channels, mask=inside, other=0.0).to(tl.float32)
    skip = tl.load(D + sequence * width + channels, mask=inside, other=0.0).to(tl.float32)
    idle = _softplus(offsets, PRECISE, NVIDIA) if SOFTPLUS else offsets
    if not B_PER_TOKEN:
        B_all = _load_channels(B, sequence, states, lanes, width, inside, N)
    if not C_PER_TOKEN:
        C_all = _load_channels(C, sequence, states, lanes, width, inside, N)
    x, dy, z = x + sample * x_sample, dy + sample * dy_sample, z + sample * z_sample
    dt += sample * dt_sample + sequence * dt_direction
    B += sample * B_sample + sequence * B_direction
    C += sample * C_sample + sequence * C_direction
    order, gap = order + sample * order_sample, gap + sample * gap_sample
    visits = sample * tokens * directions
    dx, draw, dz = dx + visits * width, draw + visits * width, dz + visits * width
    matrix_visits = (block_index * batch + sample) * tokens * directions * N
    if B_PER_TOKEN:
        dB += matrix_visits
    if C_PER_TOKEN:
        dC += matrix_visits

    g = tl.zeros((STATES, BLOCK), tl.float32)
    if HAS_LATER:
        g = tl.load(later + chunk_index * walks * width * N + state_at, mask=state_inside, other=0.0)
    dA_sum, dB_sum, dC_sum, dweight_sum = tl.zeros_like(g), tl.zeros_like(g), tl.zeros_like(g), tl.zeros_like(matrix)
    dD_sum, dbias_sum, didle_sum = tl.zeros_like(offsets), tl.zeros_like(offsets), tl.zeros_like(offsets)
    begin = chunk_index * chunk
    end = tl.minimum(begin + chunk, length)
    groups = (end - begin + UNROLL - 1) // UNROLL
    for i in range(groups):
        first = begin + (groups - 1 - i) * UNROLL
        visited, parameters, rows, exist = _visits(
            order, first, end, sequence, steps, CHAIN, STEP_PARAMS, UNROLL, INDEX
        )
        gaps = _load_gaps(gap, first, sequence, steps, exist, CHAIN, HAS_GAP, UNROLL)
        dts = _load_rows(dt, parameters, rows, dt_token, 0, dt_columns, dt_inside, exist, UNROLL)
        dys = _load_rows(dy, visited, rows, dy_token, dy_direction, channels, inside, exist, UNROLL)
        if GATED:
            zs = _load_rows(z, visited, rows, z_token, z_direction, channels, inside, exist, UNROLL)
        if C_PER_TOKEN:
            Cs = _load_rows(C, parameters, rows, C_token, 0, states, states < N, exist, UNROLL)
        raws, step_sizes, decays = (), (), ()
        for u in tl.static_range(UNROLL):
            raw = _raw_step(dts[u], matrix, offsets, LOW_RANK)
            step = _activated(raw, exist[u], SOFTPLUS, PRECISE, NVIDIA)
            decay_step = step + gaps[u] * idle if HAS_GAP else step
            raws, step_sizes = raws + (raw,), step_sizes + (step,)
            decays = decays + (_decay(log2_rates * decay_step[None, :], PRECISE, NVIDIA),)

        if ONLY_EARLIER:
            for u in tl.static_range(UNROLL - 1, -1, -1):
                C_u = Cs[u][:, None] if C_PER_TOKEN else C_all
                dy_u = dys[u] * zs[u] * _sigmoid(zs[u]) if GATED else dys[u]
                g = decays[u] * (g + C_u * dy_u[None, :])
        else:
            xs = _load_rows(x, visited, rows, x_token, x_direction, channels, inside, exist, UNROLL)
            if B_PER_TOKEN:
                Bs = _load_rows(B, parameters, rows, B_token, 0, states, states < N, exist, UNROLL)
            group = first // UNROLL + tl.zeros((), tl.int64)
            h = tl.load(saved + group * walks * width * N + state_at, mask=state_inside, other=0.0)
            hs = (h,)
            for u in tl.static_range(UNROLL):
                B_u = Bs[u][:, None] if B_PER_TOKEN else B_all
                h = decays[u] * h + B_u * (step_sizes[u] * xs[u])[None, :]
                hs = hs + (h,)
            for u in tl.static_range(UNROLL - 1, -1, -1):
                B_u = Bs[u][:, None] if B_PER_TOKEN else B_all
                C_u = Cs[u][:, None] if C_PER_TOKEN else C_all
                stored = inside & exist[u]
                visit = (visited[u] * directions + rows[u]) * width + channels
                parameter_visit = parameters[u] * directions + rows[u]
                dy_u = dys[u]
                if GATED:
                    gate = _sigmoid(zs[u])
                    result = tl.sum(C_u * hs[u + 1], 0) + skip * xs[u]
                    dz_u = dy_u * result * gate * (1.0 + zs[u] * (1.0 - gate))
                    tl.store(dz + visit, dz_u.to(dz.dtype.element_ty), mask=stored)
                    dy_u *= zs[u] * gate
                g += C_u * dy_u[None, :]
                source = step_sizes[u] * xs[u]
                if B_PER_TOKEN:
                    dB_u = tl.sum(g * source[None, :], 1)
                    tl.store(dB + parameter_visit * N + states, dB_u, mask=(states < N) & exist[u])
                else:
                    dB_sum += g * source[None, :]
                if C_PER_TOKEN:
                    dC_u = tl.sum(hs[u + 1] * dy_u[None, :], 1)
                    tl.store(dC + parameter_visit * N + states, dC_u, mask=(states < N) & exist[u])
                else:
                    dC_sum += hs[u + 1] * dy_u[None, :]
                dsource = tl.sum(B_u * g, 0)
                g = decays[u] * g
                dexponent = g * hs[u]
                ddecay_step = tl.sum(dexponent * rates, 0)
                dA_sum += dexponent * (step_sizes[u] + gaps[u] * idle if HAS_GAP else step_sizes[u])[None, :]
                dD_sum += dy_u * xs[u]
                dx_u = step_sizes[u] * dsource + skip * dy_u
                tl.store(dx + visit, dx_u.to(dx.dtype.element_ty), mask=stored)
                draw_u = tl.where(exist[u], xs[u] * dsource + ddecay_step, 0.0)
                if SOFTPLUS:
                    draw_u *= _sigmoid(raws[u])
                tl.store(draw + parameter_visit * width + channels, draw_u.to(draw.dtype.element_ty), mask=stored)
                dbias_sum += draw_u
                if HAS_GAP:
                    didle_sum += ddecay_step * gaps[u]
                if LOW_RANK:
                    dweight_sum += dts[u][:, None] * draw_u[None, :]

    walk_states = chunk_index * walks * width * N + state_at
    if ONLY_EARLIER:
        tl.store(earlier + walk_states, g, mask=state_inside)
    else:
        tl.store(dA + walk_states, dA_sum, mask=state_inside)
        if not B_PER_TOKEN:
            tl.store(dB + walk_states, dB_sum, mask=state_inside)
        if not C_PER_TOKEN:
            tl.store(dC + walk_states, dC_sum, mask=state_inside)
        walk_row = (chunk_index * walks + walk) * width
        tl.store(dD + walk_row + channels, dD_sum, mask=inside)
        if HAS_GAP:
            dbias_sum += didle_sum * (_sigmoid(offsets) if SOFTPLUS else 1.0)
        tl.store(dbias + walk_row + channels, dbias_sum, mask=inside)
        if LOW_RANK:
            at = walk_row * RANK + ranks[:, None] * width + lanes[None, :]
            tl.store(dweight + at, dweight_sum, mask=(ranks < RANK)[:, None] & inside[None, :])


@triton.jit
def merge_kernel(parts, z, out, rows, directions, width, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Out (rows, d) = Σ parts (rows, k, d) over directions, times silu(z) if gated."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    channels = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (channels < width)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for direction in range(directions):
        part = tl.load(parts + (row * directions + direction) * width + channels, mask=inside, other=0.0)
        total += part.to(tl.float32)
    if GATED:
        gate = tl.load(z + row * width + channels, mask=inside, other=0.0).to(tl.float32)
        total *= gate * _sigmoid(gate)
    tl.store(out + row * width + channels, total.to(out.dtype.element_ty), mask=inside)
