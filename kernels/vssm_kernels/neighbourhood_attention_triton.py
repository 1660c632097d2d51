"""Neighbourhood attention as Triton kernels, and their launches.

A program owns 16 tokens of one head: queries, and what these see, or keys, and what sees these. Which of them are pairs
of neighbours, and what their biases are, is the same in every sample, so a program finds out once and goes over several
samples.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vssm_kernels.neighbourhood_tiles_triton import (
    LOG2_E,
    LOWEST,
    NOWHERE,
    SIZES,
    biases_at,
    in_table,
    keys_of,
    load,
    members_of,
    packed,
    partners,
    place,
    product,
    queries_of,
    rows_of,
    samples_of,
    seen,
    start_of,
    store_sums,
    sums_before,
    tile,
    token,
)
from vssm_kernels.neighbourhood_tiling import Tiling


@dataclass(frozen=True)
class LaunchConfig:
    """Sizes of a launch."""

    partners: tuple[int, ...] = (256, 128, 64, 32)  # of a part, the first that costs least
    per_warp: int = 32  # of them: a thread has half as many pairs, in four matrices backwards and in one forwards
    registers: int = 168  # of a thread at most
    stages: int = 1  # samples whose loads are in flight


FORWARD = LaunchConfig(per_warp=64)
QUERIES = LaunchConfig()
KEYS = LaunchConfig()
REGISTERS = 65536  # of a multiprocessor, which is to run two programs at least: one waits while another computes
# Warps that keep all multiprocessors busy, and samples that a program goes over at most, which then are enough to make
# little of its beginning.
BUSY = 2048
LONGEST = 16

COUNTS = ("groups", "cells", "dilation", "inner")


@triton.jit
def _keys_of_part(
    part, bias, head, query_y, query_x, starts, first_y, span_y, first_x, span_x,
    remainder_y, remainder_x, dilation_y, dilation_x, width, WINDOW: tl.constexpr, PARTNERS: tl.constexpr,
):  # fmt: skip
    """Tokens of a part of the keys that a tile sees, places in windows and biases of the pairs."""
    key_y, key_x = partners(part, first_y, span_y, first_x, span_x, PARTNERS)
    keys = token(key_y, key_x, first_y + span_y - 1, remainder_y, remainder_x, dilation_y, dilation_x, width)
    places = packed(key_y, key_x)[None, :] - starts[:, None]
    at = in_table(key_y, key_x, WINDOW)[None, :] - in_table(query_y, query_x, WINDOW)[:, None]
    return keys, places, biases_at(bias, head, places, at, WINDOW)


@triton.jit(do_not_specialize=SIZES)
def attention_forward_kernel(
    q, k, v, bias, y, lse, y_sums, heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x, samples, chunk,
    q_sample, q_token, q_head, k_sample, k_token, k_head, v_sample, v_token, v_head,
    DIM: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr, WINDOW: tl.constexpr,
    SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr, FLAT: tl.constexpr,
    PARTNERS: tl.constexpr, MANY: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes y (b, l, heads, f) and lse (b, heads, l), the logarithms of sums of exponentials, of a tile of queries."""
    group, head, remainder_y, remainder_x, members_y, members_x, tile_y, tile_x = place(
        tl.program_id(0), heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x
    )
    length = height.to(tl.int64) * width
    is_tile, query_y, query_x, is_query, first_y, last_y, first_x, last_x = tile(
        tile_y, tile_x, members_y, members_x, SIDE_Y, SIDE_X, STEP_Y, STEP_X, FLAT
    )
    queries = token(query_y, query_x, last_y, remainder_y, remainder_x, dilation_y, dilation_x, width)
    starts = packed(start_of(query_y, members_y, WINDOW), start_of(query_x, members_x, WINDOW))
    first_y, span_y = keys_of(first_y, last_y, members_y, WINDOW)
    first_x, span_x = keys_of(first_x, last_x, members_x, WINDOW)
    parts = tl.cdiv(span_y * span_x, PARTNERS) if MANY else 1
    first_sample, last_sample = samples_of(group, chunk, samples, is_tile)

    for part in range(parts):
        keys, _, biases = _keys_of_part(
            part, bias, head, query_y, query_x, starts, first_y, span_y, first_x, span_x,
            remainder_y, remainder_x, dilation_y, dilation_x, width, WINDOW, PARTNERS,
        )  # fmt: skip
        for sample in range(first_sample, last_sample):
            q_rows = rows_of(q, sample, head, q_sample, q_head, ALIGNED)
            k_rows = rows_of(k, sample, head, k_sample, k_head, ALIGNED)
            v_rows = rows_of(v, sample, head, v_sample, v_head, ALIGNED)
            q_tile = load(q_rows, queries, q_token, DIM, PADDED, ALIGNED)
            k_tile = load(k_rows, keys, k_token, DIM, PADDED, ALIGNED)
            v_tile = load(v_rows, keys, v_token, VALUES, PADDED_VALUES, ALIGNED)
            scores = product(q_tile, tl.trans(k_tile), biases, WIDE)
            highest = tl.maximum(tl.max(scores, 1), LOWEST)  # a query may see no key of this part
            weights = tl.exp2(scores * LOG2_E - (highest * LOG2_E)[:, None])
            total = tl.maximum(tl.sum(weights, 1), 1e-30)
            level = highest + tl.log2(total) / LOG2_E
            share = 1 / total

            first = sample * length * heads + head
            levels = lse + (sample * heads + head) * length + queries
            sums = sums_before(y_sums, first, queries, is_query, part, heads * VALUES, VALUES, PADDED_VALUES, MANY)
            if MANY:
                before = tl.load(levels, mask=is_query & (part > 0), other=LOWEST)
                higher = tl.maximum(before, level)
                both = tl.exp2((before - higher) * LOG2_E) + tl.exp2((level - higher) * LOG2_E)
                both = higher + tl.log2(both) / LOG2_E
                share *= tl.exp2((level - both) * LOG2_E)
                sums *= tl.exp2((before - both) * LOG2_E)[:, None]
                level = both
            sums += share[:, None] * product(weights, v_tile, tl.zeros_like(sums), WIDE)
            store_sums(
                y, y_sums, first, queries, is_query, part, parts, heads * VALUES, sums, VALUES, PADDED_VALUES, MANY
            )
            tl.store(levels, level, mask=is_query)
        if MANY:
            tl.debug_barrier()  # the next part reads what other threads may have written


@triton.jit(do_not_specialize=SIZES)
def attention_queries_kernel(
    q, k, v, bias, lse, dy, dq, dots, sums, dq_sums,
    heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x, samples, chunk,
    q_sample, q_token, q_head, k_sample, k_token, k_head, v_sample, v_token, v_head, dy_sample, dy_token, dy_head,
    DIM: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr, WINDOW: tl.constexpr,
    SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr, FLAT: tl.constexpr,
    PARTNERS: tl.constexpr, MANY: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes dq (b, l, heads, e), dots (b, heads, l) and sums (groups, heads, l, window²) of a tile of queries.

    Dots are Σ weight · gradient of the weight, sums the gradients of scores of neighbours summed over a group.
    """
    group, head, remainder_y, remainder_x, members_y, members_x, tile_y, tile_x = place(
        tl.program_id(0), heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x
    )
    length = height.to(tl.int64) * width
    is_tile, query_y, query_x, is_query, first_y, last_y, first_x, last_x = tile(
        tile_y, tile_x, members_y, members_x, SIDE_Y, SIDE_X, STEP_Y, STEP_X, FLAT
    )
    queries = token(query_y, query_x, last_y, remainder_y, remainder_x, dilation_y, dilation_x, width)
    starts = packed(start_of(query_y, members_y, WINDOW), start_of(query_x, members_x, WINDOW))
    first_y, span_y = keys_of(first_y, last_y, members_y, WINDOW)
    first_x, span_x = keys_of(first_x, last_x, members_x, WINDOW)
    parts = tl.cdiv(span_y * span_x, PARTNERS) if MANY else 1
    first_sample, last_sample = samples_of(group, chunk, samples, is_tile)

    # Where keys are many, dots must be known before: the first half of the parts is for them.
    for turn in range(2 * parts if MANY else 1):
        part = turn % parts
        adds_up = turn < parts
        keys, places, biases = _keys_of_part(
            part, bias, head, query_y, query_x, starts, first_y, span_y, first_x, span_x,
            remainder_y, remainder_x, dilation_y, dilation_x, width, WINDOW, PARTNERS,
        )  # fmt: skip
        gradient = tl.zeros((SIDE_Y * SIDE_X, PARTNERS), tl.float32)
        for sample in range(first_sample, last_sample):
            q_rows = rows_of(q, sample, head, q_sample, q_head, ALIGNED)
            k_rows = rows_of(k, sample, head, k_sample, k_head, ALIGNED)
            v_rows = rows_of(v, sample, head, v_sample, v_head, ALIGNED)
            dy_rows = rows_of(dy, sample, head, dy_sample, dy_head, ALIGNED)
            q_tile = load(q_rows, queries, q_token, DIM, PADDED, ALIGNED)
            k_tile = load(k_rows, keys, k_token, DIM, PADDED, ALIGNED)
            v_tile = load(v_rows, keys, v_token, VALUES, PADDED_VALUES, ALIGNED)
            dy_tile = load(dy_rows, queries, dy_token, VALUES, PADDED_VALUES, ALIGNED)
            of_queries = (sample * heads + head) * length + queries
            level = tl.load(lse + of_queries)
            scores = product(q_tile, tl.trans(k_tile), biases, WIDE)
            weights = tl.exp2(scores * LOG2_E - (level * LOG2_E)[:, None])
            dweights = product(dy_tile, tl.trans(v_tile), tl.zeros_like(weights), WIDE)
            dot = tl.sum(weights * dweights, 1)
            if MANY:
                dot = tl.where(adds_up, dot, 0.0) + tl.load(dots + of_queries, mask=is_query & (turn > 0), other=0.0)
            dscores = weights * (dweights - dot[:, None])
            gradient += dscores
            first = sample * length * heads + head
            dq_tile = sums_before(dq_sums, first, queries, is_query, part, heads * DIM, DIM, PADDED, MANY)
            dq_tile = product(dscores, k_tile, dq_tile, WIDE)
            store_sums(dq, dq_sums, first, queries, is_query, part, parts, heads * DIM, dq_tile, DIM, PADDED, MANY)
            tl.store(dots + of_queries, dot, mask=is_query)
        at = ((group * heads + head) * length + queries)[:, None] * (WINDOW * WINDOW)
        at += (places >> 16) * WINDOW + (places & 65535)
        tl.store(sums + at, gradient, mask=is_query[:, None] & seen(places, WINDOW))
        if MANY:
            tl.debug_barrier()  # the next part reads what other threads may have written


@triton.jit(do_not_specialize=SIZES)
def attention_keys_kernel(
    q, k, v, bias, lse, dy, dk, dv, dots, dk_sums, dv_sums,
    heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x, samples, chunk,
    q_sample, q_token, q_head, k_sample, k_token, k_head, v_sample, v_token, v_head, dy_sample, dy_token, dy_head,
    DIM: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr, WINDOW: tl.constexpr,
    SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr, FLAT: tl.constexpr,
    PARTNERS: tl.constexpr, MANY: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes dk (b, l, heads, e) and dv (b, l, heads, f) of a tile of keys."""
    group, head, remainder_y, remainder_x, members_y, members_x, tile_y, tile_x = place(
        tl.program_id(0), heads, height, width, dilation_y, dilation_x, tiles_y, tiles_x
    )
    length = height.to(tl.int64) * width
    is_tile, key_y, key_x, is_key, first_y, last_y, first_x, last_x = tile(
        tile_y, tile_x, members_y, members_x, SIDE_Y, SIDE_X, STEP_Y, STEP_X, FLAT
    )
    keys = token(key_y, key_x, last_y, remainder_y, remainder_x, dilation_y, dilation_x, width)
    first_y, span_y = queries_of(first_y, last_y, members_y, WINDOW)
    first_x, span_x = queries_of(first_x, last_x, members_x, WINDOW)
    parts = tl.cdiv(span_y * span_x, PARTNERS) if MANY else 1
    first_sample, last_sample = samples_of(group, chunk, samples, is_tile)

    for part in range(parts):
        query_y, query_x = partners(part, first_y, span_y, first_x, span_x, PARTNERS)
        last = first_y + span_y - 1
        queries = token(query_y, query_x, last, remainder_y, remainder_x, dilation_y, dilation_x, width)
        start_y = tl.where(query_y <= last, start_of(query_y, members_y, WINDOW), NOWHERE)
        starts = packed(start_y, start_of(query_x, members_x, WINDOW))
        places = packed(key_y, key_x)[:, None] - starts[None, :]
        at = in_table(key_y, key_x, WINDOW)[:, None] - in_table(query_y, query_x, WINDOW)[None, :]
        biases = biases_at(bias, head, places, at, WINDOW)
        for sample in range(first_sample, last_sample):
            q_rows = rows_of(q, sample, head, q_sample, q_head, ALIGNED)
            k_rows = rows_of(k, sample, head, k_sample, k_head, ALIGNED)
            v_rows = rows_of(v, sample, head, v_sample, v_head, ALIGNED)
            dy_rows = rows_of(dy, sample, head, dy_sample, dy_head, ALIGNED)
            k_tile = load(k_rows, keys, k_token, DIM, PADDED, ALIGNED)
            v_tile = load(v_rows, keys, v_token, VALUES, PADDED_VALUES, ALIGNED)
            q_tile = load(q_rows, queries, q_token, DIM, PADDED, ALIGNED)
            dy_tile = load(dy_rows, queries, dy_token, VALUES, PADDED_VALUES, ALIGNED)
            of_queries = (sample * heads + head) * length + queries
            level = tl.load(lse + of_queries)
            dot = tl.load(dots + of_queries)
            scores = product(k_tile, tl.trans(q_tile), biases, WIDE)
            weights = tl.exp2(scores * LOG2_E - (level * LOG2_E)[None, :])
            minus_dot = tl.broadcast_to(-dot[None, :], (SIDE_Y * SIDE_X, PARTNERS))
            dscores = weights * product(v_tile, tl.trans(dy_tile), minus_dot, WIDE)

            first = sample * length * heads + head
            dv_tile = sums_before(dv_sums, first, keys, is_key, part, heads * VALUES, VALUES, PADDED_VALUES, MANY)
            dv_tile = product(weights, dy_tile, dv_tile, WIDE)
            store_sums(
                dv, dv_sums, first, keys, is_key, part, parts, heads * VALUES, dv_tile, VALUES, PADDED_VALUES, MANY
            )
            dk_tile = sums_before(dk_sums, first, keys, is_key, part, heads * DIM, DIM, PADDED, MANY)
            dk_tile = product(dscores, q_tile, dk_tile, WIDE)
            store_sums(dk, dk_sums, first, keys, is_key, part, parts, heads * DIM, dk_tile, DIM, PADDED, MANY)
        if MANY:
            tl.debug_barrier()  # the next part reads what other threads may have written


@triton.jit(do_not_specialize=COUNTS)
def attention_offsets_kernel(
    sums, totals, groups, cells, dilation, inner,
    group_stride, outer_stride, inner_stride, cell_stride, slot_stride, outer_total, inner_total, offset_total,
    WINDOW: tl.constexpr, OFFSETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes totals (outer, inner, 2·window − 1): over groups and cells of an axis, of the neighbours at each offset.

    What neighbours have is in sums (groups, outer, inner, cells, window). Both may have any strides.
    """
    outer, inner = (tl.program_id(0) // inner).to(tl.int64), tl.program_id(0) % inner
    sums += outer * outer_stride + inner * inner_stride
    offset = tl.arange(0, OFFSETS)
    total = tl.zeros((BLOCK, OFFSETS), tl.float32)
    for first in range(0, groups * cells, BLOCK):
        index = first + tl.arange(0, BLOCK)
        group, cell = index // cells, index % cells
        rank = cell // dilation
        start = start_of(rank, members_of(cells, dilation, cell % dilation), WINDOW)
        slot = (rank - start - (WINDOW - 1))[:, None] + offset[None, :]
        exists = (slot >= 0) & (slot < WINDOW) & (group < groups)[:, None]
        at = (group.to(tl.int64) * group_stride + cell * cell_stride)[:, None] + slot * slot_stride
        total += tl.load(sums + at, mask=exists, other=0.0)
    at = outer * outer_total + inner * inner_total + offset * offset_total
    tl.store(totals + at, tl.sum(total, 0), mask=offset < 2 * WINDOW - 1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, size: Sequence[int], window: int, dilation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Result (b, l, heads, f) in the dtype of ``v``, and log Σ exp of the scores of each token, (b, heads, l)."""
    y = v.new_empty(v.shape)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    launch = _Launch({"q": q, "k": k, "v": v}, bias, size=size, window=window, dilation=dilation)
    tiles = launch.tiles("queries", FORWARD)
    launch.run(attention_forward_kernel, tiles, y=y, lse=lse, y_sums=tiles.sums_like(y))
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
    tiles = launch.tiles("queries", QUERIES)
    sums = lse.new_empty(tiles.groups, q.shape[2], *size, window, window)
    results = {"dq": dq, "dots": dots, "sums": sums, "dq_sums": tiles.sums_like(dq)}
    launch.run(attention_queries_kernel, tiles, lse=lse, **results)
    tiles = launch.tiles("keys", KEYS)
    results = {"dk": dk, "dv": dv, "dk_sums": tiles.sums_like(dk), "dv_sums": tiles.sums_like(dv)}
    launch.run(attention_keys_kernel, tiles, lse=lse, dots=dots, **results)
    return dq, dk, dv, _sum_of_biases(sums, dilation=dilation)


@dataclass(frozen=True)
class _Tiles:
    """The programs of one kernel.

    Args:
        tiling: Of the map.
        config: Of the launch.
        grids: Of one sample that are tiled.
        samples: Of the call.
    """

    tiling: Tiling
    config: LaunchConfig
    grids: int
    samples: int

    @property
    def warps(self) -> int:
        """Of a program."""
        return max(1, self.tiling.partners // self.config.per_warp)

    @property
    def registers(self) -> int:
        """Of a thread."""
        return min(self.config.registers, REGISTERS // (2 * 32 * self.warps))

    @property
    def in_group(self) -> int:
        """Programs for each group of samples."""
        return self.grids * math.prod(self.tiling.tiles)

    @property
    def chunk(self) -> int:
        """Samples of a group."""
        return min(LONGEST, max(1, self.samples * self.in_group * self.warps // BUSY))

    @property
    def groups(self) -> int:
        return -(-self.samples // self.chunk)

    def sums_like(self, result: Tensor) -> Tensor:
        """Where sums of parts of a result wait; without parts nothing does."""
        return torch.empty_like(result, dtype=torch.float32) if self.tiling.many else result


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
        self._map = tuple(size), window, tuple(dilation)
        self._grids = heads * math.prod(dilation)
        self._device = bias.device
        self._arguments: dict[str, Any] = {
            **tensors,
            "bias": bias.contiguous(),
            "heads": heads,
            "height": size[0],
            "width": size[1],
            "dilation_y": dilation[0],
            "dilation_x": dilation[1],
            "samples": self._samples,
            "DIM": dim,
            "PADDED": _padded(dim),
            "VALUES": values,
            "PADDED_VALUES": _padded(values),
            "WINDOW": window,
            "ALIGNED": _alignment(tensors.values()),
            "WIDE": _lacks_products(bias.device, tensors.values()),
        }
        for name, tensor in tensors.items():
            strides = zip(("sample", "token", "head"), tensor.stride(), strict=False)
            self._arguments |= {f"{name}_{axis}": stride for axis, stride in strides}

    def tiles(self, kind: str, config: LaunchConfig) -> _Tiles:
        """Tiles of queries or of keys."""
        tiling = Tiling.of(*self._map, kind=kind, partners=config.partners)
        return _Tiles(tiling, config, grids=self._grids, samples=self._samples)

    def run(self, kernel: Any, tiles: _Tiles, **arguments: Any) -> None:
        """Runs a kernel, a program for each tile of each group of samples."""
        registers = {"maxnreg": tiles.registers} if torch.version.hip is None else {}
        if self._samples:
            with torch.accelerator.device_index(self._device.index):
                kernel[(tiles.in_group * tiles.groups,)](
                    **self._arguments,
                    **tiles.tiling.arguments,
                    **arguments,
                    chunk=tiles.chunk,
                    num_warps=tiles.warps,
                    num_stages=tiles.config.stages,
                    **registers,
                )


def _padded(channels: int) -> int:
    """Channels of a tile; where these were no more than its tokens, each warp would form the whole of a product."""
    return max(32, triton.next_power_of_2(channels))


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


def _sum_of_biases(sums: Tensor, *, dilation: Sequence[int]) -> Tensor:
    """Gradients of biases from those of scores, (groups, heads, h, w, window, window), without atomics."""
    _, heads, height, _, _, window = sums.shape
    side = 2 * window - 1
    rows = sums.new_empty(heads, height, window, side)
    _sum_of_offsets(sums.flatten(1, 2).transpose(2, 3), rows.flatten(0, 1), dilation[1])
    biases = sums.new_empty(heads, side, side)
    _sum_of_offsets(rows[None].permute(0, 1, 4, 2, 3), biases.transpose(1, 2), dilation[0])
    return biases


def _sum_of_offsets(sums: Tensor, totals: Tensor, dilation: int) -> None:
    """Writes totals (outer, inner, offsets) of sums (groups, outer, inner, cells, window)."""
    groups, outer, inner, cells, window = sums.shape
    strides = dict(zip(("group", "outer", "inner", "cell", "slot"), sums.stride(), strict=True))
    total_strides = dict(zip(("outer", "inner", "offset"), totals.stride(), strict=True))
    with torch.accelerator.device_index(sums.device.index):
        attention_offsets_kernel[(outer * inner,)](
            sums,
            totals,
            groups,
            cells,
            dilation,
            inner,
            **{f"{name}_stride": stride for name, stride in strides.items()},
            **{f"{name}_total": stride for name, stride in total_strides.items()},
            WINDOW=window,
            OFFSETS=triton.next_power_of_2(2 * window - 1),
            BLOCK=64,
        )
