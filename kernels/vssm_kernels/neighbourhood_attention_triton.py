"""Neighbourhood attention as Triton kernels, and their launches.

With dilation, cells of one remainder along either axis form a grid of their own, and windows are connected in it. A
program owns a tile of such a grid, of one head of one sample: of queries, whose keys it walks over block by block, or
of keys, whose queries it walks over. Both are a rectangle of the grid, and what in it is no pair is masked. Ranks are
places in such a grid, tokens places in the map.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vssm_kernels.tables import cached

LOG2_E = tl.constexpr(1.4426950408889634)
SIGNS = tl.constexpr(-0x7FFF8000)  # the sign bits of two packed numbers
NOWHERE = tl.constexpr(4096)  # a row or column that is in no window


@dataclass(frozen=True)
class LaunchConfig:
    """Sizes of a launch."""

    block: int  # tokens of a step of the walk
    columns: int = 16  # of it at most, half of them where a rectangle is not wider
    sides: tuple[int, ...] = (8, 4)  # of a tile, the first that costs least along its axis; 16 tokens at least
    tokens_per_warp: int = 16  # of a tile: the rows of one instruction of the tensor cores
    stages: int = 1  # steps whose loads are in flight


# Registers decide: more of a tile's pairs at once would leave room for fewer warps.
FORWARD = LaunchConfig(block=32)
QUERIES = LaunchConfig(block=16)
KEYS = LaunchConfig(block=16)
BIASES = LaunchConfig(block=16)
# Programs from which on samples are summed inside a program rather than kept apart: some for each multiprocessor.
BUSY = 2048

# Of which kernels learn nothing: they are compiled once for all maps.
SIZES = ("heads", "height", "width", "dilation_y", "dilation_x", "tiles_y", "tiles_x", "samples", "blocks", "chunk")


@triton.jit
def _members(cells, dilation, remainder):
    """How many cells of an axis have this remainder."""
    return (cells - remainder + dilation - 1) // dilation


@triton.jit
def _start(rank, members, WINDOW: tl.constexpr):
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
def _place(program, heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x):
    """Sample, head, remainders and tile of a program; offsets of samples may not fit 32 bits."""
    tile_x, program = program % tiles_x, program // tiles_x
    tile_y, program = program % tiles_y, program // tiles_y
    remainder_x, program = program % dilation_x, program // dilation_x
    remainder_y, program = program % dilation_y, program // dilation_y
    members_y = _members(height, dilation_y, remainder_y)
    members_x = _members(width, dilation_x, remainder_x)
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
def _tile(tile_y, tile_x, members_y, members_x, SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr):
    """Ranks of a tile by rows and columns, and which exist; others repeat the last."""
    index = tl.arange(0, SIDE_Y * SIDE_X)
    y = tile_y * SIDE_Y + index // SIDE_X
    x = tile_x * SIDE_X + index % SIDE_X
    exists = (y < members_y) & (x < members_x)
    return tl.minimum(y, members_y - 1), tl.minimum(x, members_x - 1), exists


@triton.jit
def _ends(tile, members, SIDE: tl.constexpr):
    """The first and the last rank of a tile along an axis."""
    return tl.minimum(tile * SIDE, members - 1), tl.minimum(tile * SIDE + SIDE, members) - 1


@triton.jit
def _keys_of_tile(tile, members, SIDE: tl.constexpr, WINDOW: tl.constexpr):
    """The first key that a tile of queries sees along an axis, and how many it sees."""
    first, last = _ends(tile, members, SIDE)
    start = _start(first, members, WINDOW)
    return start, _start(last, members, WINDOW) + WINDOW - start


@triton.jit
def _queries_of_tile(tile, members, SIDE: tl.constexpr, WINDOW: tl.constexpr):
    """The first query that sees a key of a tile along an axis, and how many do."""
    first, last = _ends(tile, members, SIDE)
    start = _first_query(first, WINDOW)
    return start, _last_query(last, members, WINDOW) + 1 - start


@triton.jit
def _steps(span_y, span_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """How many blocks a rectangle has."""
    return tl.cdiv(span_y, ROWS) * tl.cdiv(span_x, COLUMNS)


@triton.jit
def _corner(step, span_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column of a block in a rectangle."""
    across = tl.cdiv(span_x, COLUMNS)
    return step // across * ROWS, step % across * COLUMNS


@triton.jit
def _block(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of a block, from its corner on."""
    index = tl.arange(0, ROWS * COLUMNS)
    return index // COLUMNS, index % COLUMNS


@triton.jit
def _token(y, x, remainder_y, remainder_x, dilation_y, dilation_x, width):
    return (y * dilation_y + remainder_y) * width + x * dilation_x + remainder_x


@triton.jit
def _packed(y, x):
    """Two small numbers in one, which can be subtracted from another pair and compared at once; see `_biases`."""
    return y * 65536 + x


@triton.jit
def _rows_of(tensor, sample, head, sample_stride, head_stride, ALIGNED: tl.constexpr):
    """The rows of one head of one sample."""
    return tensor + tl.multiple_of(sample * sample_stride + head.to(tl.int64) * head_stride, ALIGNED)


@triton.jit
def _load(rows, tokens, exists, stride, DIM: tl.constexpr, PADDED: tl.constexpr, ALIGNED: tl.constexpr):
    """Rows of channels of some tokens, (tokens, channels), zero where there are none."""
    channels = tl.arange(0, PADDED)
    at = rows + tl.multiple_of(tokens * stride, ALIGNED)[:, None] + channels[None, :]
    return tl.load(at, mask=exists[:, None] & (channels < DIM)[None, :], other=0.0)


@triton.jit
def _store(rows, tokens, exists, stride, values, DIM: tl.constexpr, PADDED: tl.constexpr):
    channels = tl.arange(0, PADDED)
    at = rows + (tokens * stride)[:, None] + channels[None, :]
    tl.store(at, values.to(rows.dtype.element_ty), mask=exists[:, None] & (channels < DIM)[None, :])


@triton.jit
def _product(a, b, sums, WIDE: tl.constexpr):
    """Adds a·b to ``sums``, both rounded where one of them is; ``WIDE`` where such products are missing."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    if a.dtype != b.dtype:
        a = a.to(b.dtype)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _biases(table, keys, starts, at, WINDOW: tl.constexpr):
    """Biases of pairs, which broadcast, −∞ where the query does not see the key.

    ``keys`` and ``starts``, keys and the first ones of windows, are packed, so their difference is the place in the
    window. In it, and in what is left to the end of the window, a negative row or column sets a sign bit; a negative
    column takes 1 from the row, which is of no account then. ``at`` is where in the table biases are.
    """
    place = keys - starts
    seen = ((place | (_packed(WINDOW - 1, WINDOW - 1) - place)) & SIGNS) == 0
    return tl.load(table + at, mask=seen, other=-float("inf")).to(tl.float32)


@triton.jit
def _in_table(y, x, WINDOW: tl.constexpr):
    """Where in a table of biases something is that many rows and columns further on."""
    return y * (2 * WINDOW - 1) + x


@triton.jit
def _table(bias, head, WINDOW: tl.constexpr):
    """The table of a head, at the bias of a query's own token."""
    return bias + head * (2 * WINDOW - 1) * (2 * WINDOW - 1) + _in_table(WINDOW - 1, WINDOW - 1, WINDOW)


@triton.jit(do_not_specialize=SIZES)
def attention_forward_kernel(
    q, k, v, bias, y, lse, heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x,
    q_sample, q_token, q_head, k_sample, k_token, k_head, v_sample, v_token, v_head,
    DIM: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr,
    WINDOW: tl.constexpr, SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes y (b, l, heads, f) and lse (b, heads, l), the logarithms of sums of exponentials, of a tile."""
    sample, head, remainder_y, remainder_x, members_y, members_x, tile_y, tile_x = _place(
        tl.program_id(0), heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x
    )
    length = height.to(tl.int64) * width
    query_y, query_x, is_query = _tile(tile_y, tile_x, members_y, members_x, SIDE_Y, SIDE_X)
    tokens = _token(query_y, query_x, remainder_y, remainder_x, dilation_y, dilation_x, width).to(tl.int64)
    q_tile = _load(
        _rows_of(q, sample, head, q_sample, q_head, ALIGNED), tokens, is_query, q_token, DIM, PADDED, ALIGNED
    )
    k_rows = _rows_of(k, sample, head, k_sample, k_head, ALIGNED)
    v_rows = _rows_of(v, sample, head, v_sample, v_head, ALIGNED)
    bias = _table(bias, head, WINDOW)

    highest = tl.full((SIDE_Y * SIDE_X,), -1e30, tl.float32)  # not −∞, whose difference to itself is no number
    total = tl.zeros((SIDE_Y * SIDE_X,), tl.float32)
    sums = tl.zeros((SIDE_Y * SIDE_X, PADDED_VALUES), tl.float32)
    first_y, span_y = _keys_of_tile(tile_y, members_y, SIDE_Y, WINDOW)
    first_x, span_x = _keys_of_tile(tile_x, members_x, SIDE_X, WINDOW)
    starts = _packed(_start(query_y, members_y, WINDOW) - first_y, _start(query_x, members_x, WINDOW) - first_x)
    key_y, key_x = _block(ROWS, COLUMNS)
    packed = _packed(key_y, key_x)
    at = _in_table(key_y, key_x, WINDOW)[None, :] - _in_table(query_y - first_y, query_x - first_x, WINDOW)[:, None]
    block = _token(key_y + first_y, key_x + first_x, remainder_y, remainder_x, dilation_y, dilation_x, width)
    for step in range(_steps(span_y, span_x, ROWS, COLUMNS)):
        down, right = _corner(step, span_x, ROWS, COLUMNS)
        is_key = (key_y + down < span_y) & (key_x + right < span_x)
        keys = (block + down * dilation_y * width + right * dilation_x).to(tl.int64)
        k_block = _load(k_rows, keys, is_key, k_token, DIM, PADDED, ALIGNED)
        v_block = _load(v_rows, keys, is_key, v_token, VALUES, PADDED_VALUES, ALIGNED)
        table = bias + _in_table(down, right, WINDOW)
        biases = _biases(table, (packed + _packed(down, right))[None, :], starts[:, None], at, WINDOW)
        scores = _product(q_tile, tl.trans(k_block), biases, WIDE)
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores * LOG2_E - (higher * LOG2_E)[:, None])
        shrink = tl.exp2((highest - higher) * LOG2_E)
        total = total * shrink + tl.sum(weights, 1)
        sums = _product(weights, v_block, sums * shrink[:, None], WIDE)
        highest = higher

    y_rows = y + (sample * length * heads + head) * VALUES
    _store(y_rows, tokens, is_query, heads * VALUES, sums / total[:, None], VALUES, PADDED_VALUES)
    tl.store(lse + (sample * heads + head) * length + tokens, highest + tl.log2(total) / LOG2_E, mask=is_query)


@triton.jit(do_not_specialize=SIZES)
def attention_queries_kernel(
    q, k, v, bias, y, lse, dy, dq, dots, heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x,
    q_sample, q_token, q_head, k_sample, k_token, k_head, v_sample, v_token, v_head, dy_sample, dy_token, dy_head,
    DIM: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr,
    WINDOW: tl.constexpr, SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes dq (b, l, heads, e), and dots (b, heads, l), Σ dy·y before y was rounded, of a tile."""
    sample, head, remainder_y, remainder_x, members_y, members_x, tile_y, tile_x = _place(
        tl.program_id(0), heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x
    )
    length = height.to(tl.int64) * width
    query_y, query_x, is_query = _tile(tile_y, tile_x, members_y, members_x, SIDE_Y, SIDE_X)
    tokens = _token(query_y, query_x, remainder_y, remainder_x, dilation_y, dilation_x, width).to(tl.int64)
    q_tile = _load(
        _rows_of(q, sample, head, q_sample, q_head, ALIGNED), tokens, is_query, q_token, DIM, PADDED, ALIGNED
    )
    k_rows = _rows_of(k, sample, head, k_sample, k_head, ALIGNED)
    v_rows = _rows_of(v, sample, head, v_sample, v_head, ALIGNED)
    dy_rows = _rows_of(dy, sample, head, dy_sample, dy_head, ALIGNED)
    y_rows = y + (sample * length * heads + head) * VALUES
    bias = _table(bias, head, WINDOW)
    of_tokens = (sample * heads + head) * length + tokens
    dy_tile = _load(dy_rows, tokens, is_query, dy_token, VALUES, PADDED_VALUES, ALIGNED)
    y_tile = _load(y_rows, tokens, is_query, heads * VALUES, VALUES, PADDED_VALUES, VALUES & -VALUES)
    dot = tl.sum(dy_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    level = tl.load(lse + of_tokens, mask=is_query, other=0.0)

    gradient = tl.zeros((SIDE_Y * SIDE_X, PADDED), tl.float32)
    average = tl.zeros((SIDE_Y * SIDE_X, PADDED), tl.float32)
    excess = tl.zeros((SIDE_Y * SIDE_X,), tl.float32)
    minus_dot = tl.broadcast_to(-dot[:, None], (SIDE_Y * SIDE_X, ROWS * COLUMNS))
    first_y, span_y = _keys_of_tile(tile_y, members_y, SIDE_Y, WINDOW)
    first_x, span_x = _keys_of_tile(tile_x, members_x, SIDE_X, WINDOW)
    starts = _packed(_start(query_y, members_y, WINDOW) - first_y, _start(query_x, members_x, WINDOW) - first_x)
    key_y, key_x = _block(ROWS, COLUMNS)
    packed = _packed(key_y, key_x)
    at = _in_table(key_y, key_x, WINDOW)[None, :] - _in_table(query_y - first_y, query_x - first_x, WINDOW)[:, None]
    block = _token(key_y + first_y, key_x + first_x, remainder_y, remainder_x, dilation_y, dilation_x, width)
    for step in range(_steps(span_y, span_x, ROWS, COLUMNS)):
        down, right = _corner(step, span_x, ROWS, COLUMNS)
        is_key = (key_y + down < span_y) & (key_x + right < span_x)
        keys = (block + down * dilation_y * width + right * dilation_x).to(tl.int64)
        k_block = _load(k_rows, keys, is_key, k_token, DIM, PADDED, ALIGNED)
        v_block = _load(v_rows, keys, is_key, v_token, VALUES, PADDED_VALUES, ALIGNED)
        table = bias + _in_table(down, right, WINDOW)
        biases = _biases(table, (packed + _packed(down, right))[None, :], starts[:, None], at, WINDOW)
        scores = _product(q_tile, tl.trans(k_block), biases, WIDE)
        weights = tl.exp2(scores * LOG2_E - (level * LOG2_E)[:, None])
        dscores = weights * _product(dy_tile, tl.trans(v_block), minus_dot, WIDE)
        gradient = _product(dscores, k_block, gradient, WIDE)
        average = _product(weights, k_block, average, WIDE)
        excess += tl.sum(dscores, 1)

    # Gradients of scores sum to zero; what they sum to here is the error of dot, which y has by being rounded.
    gradient -= excess[:, None] * average
    dq_rows = dq + (sample * length * heads + head) * DIM
    _store(dq_rows, tokens, is_query, heads * DIM, gradient, DIM, PADDED)
    tl.store(dots + of_tokens, dot + excess, mask=is_query)


@triton.jit(do_not_specialize=SIZES)
def attention_keys_kernel(
    q, k, v, bias, lse, dy, dk, dv, dots, heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x,
    q_sample, q_token, q_head, k_sample, k_token, k_head, v_sample, v_token, v_head, dy_sample, dy_token, dy_head,
    DIM: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr,
    WINDOW: tl.constexpr, SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes dk (b, l, heads, e) and dv (b, l, heads, f) of a tile of keys, over whose queries it walks."""
    sample, head, remainder_y, remainder_x, members_y, members_x, tile_y, tile_x = _place(
        tl.program_id(0), heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x
    )
    length = height.to(tl.int64) * width
    key_y, key_x, is_key = _tile(tile_y, tile_x, members_y, members_x, SIDE_Y, SIDE_X)
    tokens = _token(key_y, key_x, remainder_y, remainder_x, dilation_y, dilation_x, width).to(tl.int64)
    k_tile = _load(_rows_of(k, sample, head, k_sample, k_head, ALIGNED), tokens, is_key, k_token, DIM, PADDED, ALIGNED)
    v_rows = _rows_of(v, sample, head, v_sample, v_head, ALIGNED)
    v_tile = _load(v_rows, tokens, is_key, v_token, VALUES, PADDED_VALUES, ALIGNED)
    q_rows = _rows_of(q, sample, head, q_sample, q_head, ALIGNED)
    dy_rows = _rows_of(dy, sample, head, dy_sample, dy_head, ALIGNED)
    bias = _table(bias, head, WINDOW)
    lse += (sample * heads + head) * length
    dots += (sample * heads + head) * length

    dk_tile = tl.zeros((SIDE_Y * SIDE_X, PADDED), tl.float32)
    dv_tile = tl.zeros((SIDE_Y * SIDE_X, PADDED_VALUES), tl.float32)
    first_y, span_y = _queries_of_tile(tile_y, members_y, SIDE_Y, WINDOW)
    first_x, span_x = _queries_of_tile(tile_x, members_x, SIDE_X, WINDOW)
    packed = _packed(key_y - first_y, key_x - first_x)
    query_y, query_x = _block(ROWS, COLUMNS)
    at = _in_table(key_y - first_y, key_x - first_x, WINDOW)[:, None] - _in_table(query_y, query_x, WINDOW)[None, :]
    block = _token(query_y + first_y, query_x + first_x, remainder_y, remainder_x, dilation_y, dilation_x, width)
    for step in range(_steps(span_y, span_x, ROWS, COLUMNS)):
        down, right = _corner(step, span_x, ROWS, COLUMNS)
        is_query = (query_y + down < span_y) & (query_x + right < span_x)
        queries = (block + down * dilation_y * width + right * dilation_x).to(tl.int64)
        start_y = _start(query_y + (down + first_y), members_y, WINDOW) - first_y
        start_x = _start(query_x + (right + first_x), members_x, WINDOW) - first_x
        starts = _packed(tl.where(is_query, start_y, NOWHERE), start_x)
        q_block = _load(q_rows, queries, is_query, q_token, DIM, PADDED, ALIGNED)
        dy_block = _load(dy_rows, queries, is_query, dy_token, VALUES, PADDED_VALUES, ALIGNED)
        level = tl.load(lse + queries, mask=is_query, other=0.0)
        dot = tl.load(dots + queries, mask=is_query, other=0.0)
        table = bias - _in_table(down, right, WINDOW)
        biases = _biases(table, packed[:, None], starts[None, :], at, WINDOW)
        scores = _product(k_tile, tl.trans(q_block), biases, WIDE)
        weights = tl.exp2(scores * LOG2_E - (level * LOG2_E)[None, :])
        dv_tile = _product(weights, dy_block, dv_tile, WIDE)
        minus_dot = tl.broadcast_to(-dot[None, :], (SIDE_Y * SIDE_X, ROWS * COLUMNS))
        dscores = weights * _product(v_tile, tl.trans(dy_block), minus_dot, WIDE)
        dk_tile = _product(dscores, q_block, dk_tile, WIDE)

    _store(dk + (sample * length * heads + head) * DIM, tokens, is_key, heads * DIM, dk_tile, DIM, PADDED)
    _store(
        dv + (sample * length * heads + head) * VALUES, tokens, is_key, heads * VALUES, dv_tile, VALUES, PADDED_VALUES
    )


@triton.jit(do_not_specialize=SIZES)
def attention_biases_kernel(
    q, k, v, bias, lse, dy, dots, sums, heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x,
    samples, blocks, chunk,
    q_sample, q_token, q_head, k_sample, k_token, k_head, v_sample, v_token, v_head, dy_sample, dy_token, dy_head,
    DIM: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr,
    WINDOW: tl.constexpr, SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes sums (chunks of samples, heads, l, window²), gradients of each query's scores summed over a chunk.

    A program owns a tile of queries and one block of the keys that it sees. In every sample the pairs are the same, so
    their sums stay in registers.
    """
    program = tl.program_id(0)
    step, program = program % blocks, program // blocks
    group, head, remainder_y, remainder_x, members_y, members_x, tile_y, tile_x = _place(
        program, heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x
    )
    length = height.to(tl.int64) * width
    query_y, query_x, is_query = _tile(tile_y, tile_x, members_y, members_x, SIDE_Y, SIDE_X)
    tokens = _token(query_y, query_x, remainder_y, remainder_x, dilation_y, dilation_x, width).to(tl.int64)
    first_y, span_y = _keys_of_tile(tile_y, members_y, SIDE_Y, WINDOW)
    first_x, span_x = _keys_of_tile(tile_x, members_x, SIDE_X, WINDOW)
    down, right = _corner(step, span_x, ROWS, COLUMNS)
    key_y, key_x = _block(ROWS, COLUMNS)
    key_y += down
    key_x += right
    is_key = (key_y < span_y) & (key_x < span_x)
    keys = _token(key_y + first_y, key_x + first_x, remainder_y, remainder_x, dilation_y, dilation_x, width).to(
        tl.int64
    )
    start_y, start_x = _start(query_y, members_y, WINDOW) - first_y, _start(query_x, members_x, WINDOW) - first_x
    at = _in_table(key_y, key_x, WINDOW)[None, :] - _in_table(query_y - first_y, query_x - first_x, WINDOW)[:, None]
    packed, starts = _packed(key_y, key_x), _packed(start_y, start_x)
    biases = _biases(_table(bias, head, WINDOW), packed[None, :], starts[:, None], at, WINDOW)

    gradient = tl.zeros((SIDE_Y * SIDE_X, ROWS * COLUMNS), tl.float32)
    for i in range(chunk):
        sample = group * chunk + i
        is_sample = sample < samples
        is_token, is_seen = is_query & is_sample, is_key & is_sample
        q_rows = _rows_of(q, sample, head, q_sample, q_head, ALIGNED)
        k_rows = _rows_of(k, sample, head, k_sample, k_head, ALIGNED)
        v_rows = _rows_of(v, sample, head, v_sample, v_head, ALIGNED)
        dy_rows = _rows_of(dy, sample, head, dy_sample, dy_head, ALIGNED)
        q_tile = _load(q_rows, tokens, is_token, q_token, DIM, PADDED, ALIGNED)
        k_block = _load(k_rows, keys, is_seen, k_token, DIM, PADDED, ALIGNED)
        v_block = _load(v_rows, keys, is_seen, v_token, VALUES, PADDED_VALUES, ALIGNED)
        dy_tile = _load(dy_rows, tokens, is_token, dy_token, VALUES, PADDED_VALUES, ALIGNED)
        of_tokens = (sample * heads + head) * length + tokens
        level = tl.load(lse + of_tokens, mask=is_token, other=float("inf"))
        dot = tl.load(dots + of_tokens, mask=is_token, other=0.0)
        scores = _product(q_tile, tl.trans(k_block), biases, WIDE)
        weights = tl.exp2(scores * LOG2_E - (level * LOG2_E)[:, None])
        minus_dot = tl.broadcast_to(-dot[:, None], (SIDE_Y * SIDE_X, ROWS * COLUMNS))
        gradient += weights * _product(dy_tile, tl.trans(v_block), minus_dot, WIDE)

    row, column = key_y[None, :] - start_y[:, None], key_x[None, :] - start_x[:, None]
    seen = (row >= 0) & (row < WINDOW) & (column >= 0) & (column < WINDOW)
    at = ((group * heads + head) * length + tokens)[:, None] * (WINDOW * WINDOW) + row * WINDOW + column
    tl.store(sums + at, gradient, mask=is_query[:, None] & seen)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, size: Sequence[int], window: int, dilation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Result (b, l, heads, f) in the dtype of ``v``, and log Σ exp of the scores of each token, (b, heads, l)."""
    y = v.new_empty(v.shape)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    launch = _Launch({"q": q, "k": k, "v": v}, bias, size=size, window=window, dilation=dilation)
    launch.run(attention_forward_kernel, FORWARD, y=y, lse=lse)
    return y, lse


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    y: Tensor,
    lse: Tensor,
    *,
    size: Sequence[int],
    window: int,
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias in their shapes, contiguous, that of the bias in float32."""
    dq, dk, dv, dots = (tensor.new_empty(tensor.shape) for tensor in (q, k, v, lse))
    launch = _Launch({"q": q, "k": k, "v": v, "dy": dy}, bias, size=size, window=window, dilation=dilation)
    launch.run(attention_queries_kernel, QUERIES, y=y, lse=lse, dq=dq, dots=dots)
    launch.run(attention_keys_kernel, KEYS, lse=lse, dk=dk, dv=dv, dots=dots)
    sums = launch.sums_of_pairs(lse, dots)
    return dq, dk, dv, _sum_of_biases(sums, window=window, dilation=dilation)


class _Launch:
    """The launches of one call, and the arguments that kernels share.

    Args:
        tensors: What kernels read rows of, by name.
        bias: The table of biases.
        size: Rows and columns of the map.
        window: Side of a window.
        dilation: By rows and columns.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        bias: Tensor,
        *,
        size: Sequence[int],
        window: int,
        dilation: Sequence[int],
    ) -> None:
        tensors = {name: tensor if tensor.stride(-1) == 1 else tensor.contiguous() for name, tensor in tensors.items()}
        self._samples, _, heads, dim = tensors["q"].shape
        values = tensors["v"].shape[-1]
        self._members = -(-size[0] // dilation[0]), -(-size[1] // dilation[1])
        self._grids = heads * math.prod(dilation)  # of a sample
        self._map = heads, *size, window, window
        self._device = bias.device
        self._arguments: dict[str, Any] = {
            **tensors,
            "bias": bias.contiguous(),
            "heads": heads,
            "height": size[0],
            "width": size[1],
            "dilation_y": dilation[0],
            "dilation_x": dilation[1],
            "DIM": dim,
            "PADDED": max(16, triton.next_power_of_2(dim)),
            "VALUES": values,
            "PADDED_VALUES": max(16, triton.next_power_of_2(values)),
            "WINDOW": window,
            "ALIGNED": _alignment(tensors.values()),
            "WIDE": _lacks_products(bias.device, tensors.values()),
        }
        for name, tensor in tensors.items():
            strides = zip(("sample", "token", "head"), tensor.stride(), strict=False)
            self._arguments |= {f"{name}_{axis}": stride for axis, stride in strides}

    def run(
        self, kernel: Any, config: LaunchConfig, *, groups: int | None = None, parts: int = 1, **arguments: Any
    ) -> None:
        """Runs a kernel, so many programs for each tile of each group of samples, or of each sample."""
        tiling = self.tiling(config)
        programs = (self._samples if groups is None else groups) * self._grids * math.prod(tiling.tiles) * parts
        if programs:
            with torch.accelerator.device_index(self._device.index):
                kernel[(programs,)](
                    **self._arguments,
                    **tiling.arguments,
                    **arguments,
                    num_warps=tiling.warps,
                    num_stages=config.stages,
                )

    def tiling(self, config: LaunchConfig) -> "Tiling":
        """The tiles of one kernel."""
        return Tiling.of(*self._members, window=self._arguments["WINDOW"], config=config)

    def sums_of_pairs(self, lse: Tensor, dots: Tensor) -> Tensor:
        """Gradients of scores, summed over samples, (heads, h, w, window, window)."""
        tiling = self.tiling(BIASES)
        programs = self._grids * math.prod(tiling.tiles) * tiling.blocks
        chunk = -(-self._samples // max(1, min(self._samples, -(-BUSY // programs)))) or 1
        groups = -(-self._samples // chunk)
        sums = lse.new_empty(groups, *self._map)
        counts = {"samples": self._samples, "chunk": chunk, "blocks": tiling.blocks}
        tensors = {"lse": lse, "dots": dots, "sums": sums}
        self.run(attention_biases_kernel, BIASES, groups=groups, parts=tiling.blocks, **tensors, **counts)
        return sums.sum(0)


@dataclass(frozen=True)
class Tiling:
    """How the largest of the grids that a map is divided into by remainders is taken.

    Args:
        sides: Of a tile, by rows and columns.
        tiles: Along either axis.
        block: Rows and columns of a block of the walk.
        blocks: That a tile of queries walks over at most.
        warps: Of a program.
    """

    sides: tuple[int, int]
    tiles: tuple[int, int]
    block: tuple[int, int]
    blocks: int
    warps: int

    @classmethod
    @functools.lru_cache
    def of(cls, rows: int, columns: int, *, window: int, config: LaunchConfig) -> "Tiling":
        """For a grid of so many rows and columns, with the sides that multiply the fewest pairs."""
        width = config.columns if columns > config.columns // 2 else config.columns // 2
        block = config.block // width, width
        y, x = (_Axis.of(n, window, unit, config.sides) for n, unit in zip((rows, columns), block, strict=True))
        return cls(
            sides=(y.side, x.side),
            tiles=(y.tiles, x.tiles),
            block=block,
            blocks=y.blocks * x.blocks,
            warps=max(1, y.side * x.side // config.tokens_per_warp),
        )

    @property
    def arguments(self) -> dict[str, int]:
        """As kernels take them."""
        names = "tiles_y", "tiles_x", "SIDE_Y", "SIDE_X", "ROWS", "COLUMNS"
        return dict(zip(names, (*self.tiles, *self.sides, *self.block), strict=True))


class _Axis(NamedTuple):
    """Tiles along one axis, and how many blocks their keys are."""

    side: int
    tiles: int
    blocks: int

    @classmethod
    def of(cls, members: int, window: int, unit: int, sides: Sequence[int]) -> "_Axis":
        """With the side that multiplies the fewest pairs, padded queries and masked keys included."""
        axes = [cls(side, -(-members // side), -(-min(members, side + window - 1) // unit)) for side in sides]
        return min(axes, key=lambda axis: axis.side * axis.tiles * axis.blocks)


def _alignment(tensors: Iterable[Tensor]) -> int:
    """A power of two that divides every distance between rows, in elements, up to what one lane loads at once."""
    return math.gcd(16, *(stride for tensor in tensors for stride in tensor.stride()[:-1]))


def _lacks_products(device: torch.device, tensors: Iterable[Tensor]) -> bool:
    """Whether products are missing that the tensors need: of bfloat16, before Ampere and in Triton's interpreter."""
    if all(tensor.dtype != torch.bfloat16 for tensor in tensors):
        return False
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 8


def _sum_of_biases(sums: Tensor, *, window: int, dilation: Sequence[int]) -> Tensor:
    """Gradients of biases from those of the scores of each query, (heads, h, w, window, window), without atomics."""
    heads, height, width, *_ = sums.shape
    side = 2 * window - 1
    columns = _slots(width, window, dilation[1], device=sums.device)[None, None, :, None]
    sums = F.pad(sums, (0, 1)).gather(4, columns.expand(heads, height, width, window, side)).sum(2)
    rows = _slots(height, window, dilation[0], device=sums.device)[None, :, :, None]
    return F.pad(sums, (0, 0, 0, 1)).gather(2, rows.expand(heads, height, side, side)).sum(1)


@cached
def _slots(cells: int, window: int, dilation: int, *, device: torch.device) -> Tensor:
    """Which neighbour of each cell of an axis has each of the biases, (cells, 2·window − 1); number window for none."""
    cell = torch.arange(cells, device=device)[:, None]
    ranks, members = cell // dilation, (cells - cell % dilation + dilation - 1) // dilation
    starts = (ranks - window // 2).clamp(min=0).minimum(members - window)
    slots = ranks - starts + torch.arange(1 - window, window, device=device)
    return torch.where((slots >= 0) & (slots < window), slots, window)
