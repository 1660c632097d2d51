"""What the Triton kernels of neighbourhood attention are made of: tiles, their partners, biases, loads and products.

With dilation, cells of one remainder along either axis form a grid of their own, and windows are connected in it. Ranks
are places in such a grid, tokens places in the map.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
SIGNS = tl.constexpr(-0x7FFF8000)  # the sign bits of two packed numbers
LOWEST = tl.constexpr(-1e30)  # not −∞, whose difference to itself is no number
NOWHERE = tl.constexpr(4096)  # a row or column that is in no window

# Of which kernels learn nothing: they are compiled once for all maps.
SIZES = ("heads", "height", "width", "dilation_y", "dilation_x", "tiles_y", "tiles_x", "samples", "chunk")


@triton.jit
def members_of(cells, dilation, remainder):
    """How many cells of an axis have this remainder."""
    return (cells - remainder + dilation - 1) // dilation


@triton.jit
def start_of(rank, members, WINDOW: tl.constexpr):
    """The first neighbour of a query along an axis."""
    return tl.minimum(tl.maximum(rank - WINDOW // 2, 0), members - WINDOW)


@triton.jit
def _first_query(rank, WINDOW: tl.constexpr):
    """The first query that sees a key along an axis; windows that are shifted at the border begin with key 0."""
    return tl.where(rank < WINDOW, 0, rank - WINDOW // 2)


@triton.jit
def _last_query(rank, members, WINDOW: tl.constexpr):
    return tl.where(rank >= members - WINDOW, members - 1, rank + WINDOW // 2)


@triton.jit
def place(program, heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x):
    """Group of samples, head, remainders, sizes of the grid and tile of a program; offsets may not fit 32 bits."""
    tile_x, program = program % tiles_x, program // tiles_x
    tile_y, program = program % tiles_y, program // tiles_y
    remainder_x, program = program % dilation_x, program // dilation_x
    remainder_y, program = program % dilation_y, program // dilation_y
    members_y = members_of(height, dilation_y, remainder_y)
    members_x = members_of(width, dilation_x, remainder_x)
    return (
        (program // heads).to(tl.int64),
        program % heads,
        remainder_y,
        remainder_x,
        members_y,
        members_x,
        tile_y,
        tile_x,
    )


@triton.jit
def _divided(index, by):
    """The quotient of numbers below 2²⁰, in 3 instructions: half a unit is more than the error of the product."""
    return ((index.to(tl.float32) + 0.5) * (1.0 / by.to(tl.float32))).to(tl.int32)


@triton.jit
def tile(
    tile_y, tile_x, members_y, members_x,
    SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """A tile of a grid: STEP_Y × STEP_X ranks, or a run of STEP_X of them in raster order, with all columns.

    Returns:
        Whether the grid has it, as the largest has, ranks by rows and columns, which of them exist, others repeat the
        last, and the first and the last row and column.
    """
    index = tl.arange(0, SIDE_Y * SIDE_X)
    if FLAT:
        count = members_y * members_x
        first, last = tl.minimum(tile_x * STEP_X, count - 1), tl.minimum(tile_x * STEP_X + STEP_X, count) - 1
        rank = tl.minimum(tile_x * STEP_X + index, last)
        y = _divided(rank, members_x)
        exists = tile_x * STEP_X + index <= last
        is_tile = tile_x * STEP_X < count
        return is_tile, y, rank - y * members_x, exists, first // members_x, last // members_x, 0, members_x - 1
    first_y, first_x = tl.minimum(tile_y * STEP_Y, members_y - 1), tl.minimum(tile_x * STEP_X, members_x - 1)
    last_y, last_x = tl.minimum(first_y + STEP_Y, members_y) - 1, tl.minimum(first_x + STEP_X, members_x) - 1
    y, x = tile_y * STEP_Y + index // SIDE_X, tile_x * STEP_X + index % SIDE_X
    exists = (y <= last_y) & (x <= last_x)
    is_tile = (tile_y * STEP_Y < members_y) & (tile_x * STEP_X < members_x)
    return is_tile, tl.minimum(y, last_y), tl.minimum(x, last_x), exists, first_y, last_y, first_x, last_x


@triton.jit
def samples_of(group, chunk, samples, is_tile):
    """The first and the last sample, exclusive, that a program goes over."""
    return group * chunk, tl.where(is_tile, tl.minimum(group * chunk + chunk, samples), 0)


@triton.jit
def keys_of(first, last, members, WINDOW: tl.constexpr):
    """The first key that queries see along an axis, from the first to the last, and how many they see."""
    start = start_of(first, members, WINDOW)
    return start, start_of(last, members, WINDOW) + WINDOW - start


@triton.jit
def queries_of(first, last, members, WINDOW: tl.constexpr):
    """The first query that sees keys along an axis, from the first to the last, and how many do."""
    start = _first_query(first, WINDOW)
    return start, _last_query(last, members, WINDOW) + 1 - start


@triton.jit
def partners(part, first_y, span_y, first_x, span_x, PARTNERS: tl.constexpr):
    """Ranks of a part of a rectangle in raster order, by rows and columns, in more rows than it has where it ends."""
    index = part * PARTNERS + tl.arange(0, PARTNERS)
    y = _divided(index, span_x)
    return first_y + y, first_x + index - y * span_x


@triton.jit
def token(y, x, last_y, remainder_y, remainder_x, dilation_y, dilation_x, width):
    """Token of a rank, in the last row for those after it."""
    y = tl.minimum(y, last_y)
    return ((y * dilation_y + remainder_y) * width + x * dilation_x + remainder_x).to(tl.int64)


@triton.jit
def packed(y, x):
    """Two small numbers in one, which can be subtracted from another pair and compared at once; see `seen`."""
    return y * 65536 + x


@triton.jit
def seen(places, WINDOW: tl.constexpr):
    """Which pairs are pairs of neighbours: whose place in the window, key − first key of the window, is in it.

    Places are packed. In them, and in what is left to the end of the window, a negative row or column sets a sign bit;
    a negative column takes 1 from the row, which is of no account then.
    """
    return ((places | (packed(WINDOW - 1, WINDOW - 1) - places)) & SIGNS) == 0


@triton.jit
def in_table(y, x, WINDOW: tl.constexpr):
    """Where in a table of biases something is that many rows and columns further on."""
    return y * (2 * WINDOW - 1) + x


@triton.jit
def biases_at(bias, head, places, at, WINDOW: tl.constexpr):
    """Biases of pairs, −∞ where the query does not see the key; ``at``, where each is from a query's own token's."""
    table = bias + head * (2 * WINDOW - 1) * (2 * WINDOW - 1) + in_table(WINDOW - 1, WINDOW - 1, WINDOW)
    return tl.load(table + at, mask=seen(places, WINDOW), other=-float("inf")).to(tl.float32)


@triton.jit
def rows_of(tensor, sample, head, sample_stride, head_stride, ALIGNED: tl.constexpr):
    """The rows of one head of one sample."""
    return tensor + tl.multiple_of(sample * sample_stride + head.to(tl.int64) * head_stride, ALIGNED)


@triton.jit
def load(rows, tokens, stride, DIM: tl.constexpr, PADDED: tl.constexpr, ALIGNED: tl.constexpr):
    """Rows of channels of some tokens, (tokens, channels)."""
    channels = tl.arange(0, PADDED)
    at = rows + tl.multiple_of(tokens * stride, ALIGNED)[:, None] + channels[None, :]
    if DIM == PADDED:
        return tl.load(at)
    return tl.load(at, mask=(channels < DIM)[None, :], other=0.0)


@triton.jit
def store(rows, tokens, exists, stride, values, DIM: tl.constexpr, PADDED: tl.constexpr):
    """The same backwards."""
    channels = tl.arange(0, PADDED)
    at = rows + (tokens * stride)[:, None] + channels[None, :]
    tl.store(at, values.to(rows.dtype.element_ty), mask=exists[:, None] & (channels < DIM)[None, :])


@triton.jit
def sums_before(
    sums, first, tokens, exists, part, stride, DIM: tl.constexpr, PADDED: tl.constexpr, MANY: tl.constexpr
):  # fmt: skip
    """What earlier parts have left of a tile in ``sums``, whose head begins at row ``first``; zero where none has."""
    if MANY:
        channels = tl.arange(0, PADDED)
        at = sums + first * DIM + (tokens * stride)[:, None] + channels[None, :]
        return tl.load(at, mask=(exists & (part > 0))[:, None] & (channels < DIM)[None, :], other=0.0)
    return tl.zeros((tokens.shape[0], PADDED), tl.float32)


@triton.jit
def store_sums(
    rows, sums, first, tokens, exists, part, parts, stride, values,
    DIM: tl.constexpr, PADDED: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Stores what a part and those before have added up to, after the last part in ``rows``."""
    if MANY:
        store(sums + first * DIM, tokens, exists & (part + 1 < parts), stride, values, DIM, PADDED)
        exists &= part + 1 == parts
    store(rows + first * DIM, tokens, exists, stride, values, DIM, PADDED)


@triton.jit
def product(a, b, sums, WIDE: tl.constexpr):
    """Adds a·b to ``sums``, both rounded where one of them is; ``WIDE`` where such products are missing."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    if a.dtype != b.dtype:
        a = a.to(b.dtype)
    return tl.dot(a, b, sums, input_precision="ieee")
