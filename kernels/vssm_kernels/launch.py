"""Launches of the Triton kernels: memory, sizes and the passes that a scan and its gradients take."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from vssm_kernels import launch_table, scan_torch, scan_triton, tiles_triton
from vssm_kernels.scan_call import ScanCall, tokens_contiguous

kernels: Any = scan_triton  # Triton's language looks like Python, but its types are others
_PACKED = 4096  # numbers of a program that packs or unpacks
_LANES = 32
_ROWS = 64  # tokens of a tile of the products with dt and its weight
_BLOCK = 128  # channels of such a tile
_PROGRAMS = 528  # that share the rows of such a product, four a multiprocessor of an H100


def forward(call: ScanCall) -> tuple[Tensor, Tensor]:
    """Result and last state of ``call`` (the state empty unless asked for)."""
    if call.compute_dtype == torch.float64:  # the kernels compute in float32
        return scan_torch.forward(call)
    launch = _Launch(call, backward=False)
    start, _ = launch.chunk_starts()
    result, states = launch.walk(start=start, gated=call.z is not None)
    if not call.return_last_state:
        return result, launch.empty(0)
    last = states[-1].view(call.batch, call.sequences, call.states, call.width)
    return result, last.transpose(-1, -2).contiguous()


def backward(call: ScanCall, dy: Tensor, dstate: Tensor) -> dict[str, Tensor]:
    """Gradients of the differentiable inputs of ``call``, by name."""
    if call.compute_dtype == torch.float64:
        return scan_torch.backward(call, dy, dstate)
    launch = _Launch(call, backward=True)
    start, totals = launch.chunk_starts()
    grads = {}
    if call.z is None:
        states = launch.states_of_tiles(start)
    else:
        result, states = launch.walk(start=start, gated=False, of_tiles=True)
        dy, grads["z"] = _gate_gradients(call, dy, result)
    later = launch.gradients_of_chunks(dy, totals, dstate)
    return grads | launch.walk_back(dy, states, later)


@dataclass(frozen=True)
class _Rows:
    """A tensor (b, l, d) or (b, l, k, d) as the kernels address it: rows of contiguous channels."""

    tensor: Tensor
    sample: int
    token: int
    direction: int

    def arguments(self, name: str) -> dict[str, Any]:
        return {
            name: self.tensor,
            f"{name}_sample": self.sample,
            f"{name}_token": self.token,
            f"{name}_direction": self.direction,
        }


def _rows(tensor: Tensor) -> _Rows:
    return _Rows(tensor, tensor.stride(0), tensor.stride(1), tensor.stride(2) if tensor.ndim == 4 else 0)


class _Launch:
    """One call, brought into the order of its steps, and the passes over it."""

    def __init__(self, call: ScanCall, *, backward: bool) -> None:
        self.call = call
        self.config = launch_table.launch_config(call, backward=backward)
        self.walks = call.batch * call.sequences
        self.length = call.steps * (call.directions if call.chain else 1)
        self.tiles = max(1, math.ceil(self.length / self.config.steps))
        self.padded = self.tiles * self.config.steps
        self.chunk = math.ceil(self.tiles / self.config.chunks) * self.config.steps
        self.chunks = max(1, math.ceil(self.length / self.chunk))
        self.blocks = math.ceil(call.width / self.config.channels)
        self.slots = math.gcd(self.config.slots, call.states)
        # States taken at once, so that there is work between a load and its use; their gradients need the registers.
        self.unroll = 2 if call.states // self.slots % 2 == 0 and (not backward or self.config.registers > 168) else 1
        self.rank = 0 if call.dt_weight is None else call.dt.shape[-1]
        self.A = _states_first(call.A.float())
        self.none = self.A  # stands for a tensor that a launch does not touch
        self.step_arguments = self._pack()
        self.switches = self._switches()

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised memory on the device of the call; zeros where there is no step to write it."""
        make = torch.empty if self.length else torch.zeros
        return make(shape, dtype=dtype, device=self.call.x.device)

    def states(self, count: int) -> Tensor:
        """Space for ``count`` states of every walk, (count, b·k, n, d)."""
        return self.empty(count, self.walks, self.call.states, self.call.width)

    def visits(self, width: int, dtype: torch.dtype, *, apart: bool = False) -> Tensor:
        """Space for a row per token and direction (b, l, k, width), 0 where a direction skips tokens.

        ``apart``: in memory, directions come first.
        """
        call = self.call
        if apart and not call.chain:
            space = self.empty(call.directions, call.batch, call.tokens, width, dtype=dtype).permute(1, 2, 0, 3)
        else:
            space = self.empty(call.batch, call.tokens, call.directions, width, dtype=dtype)
        return space if call.steps == call.tokens else space.zero_()

    def maps(self, dtype: torch.dtype, *, apart: bool = False) -> Tensor:
        """Space for the channels of every token and direction, (b, l, k, d); ``apart`` as in :meth:`visits`."""
        call = self.call
        if call.tokens_last:
            space = self.empty(call.batch, call.directions, call.width, call.tokens, dtype=dtype)
            return space.permute(0, 3, 1, 2)
        return self.visits(call.width, dtype, apart=apart)

    def chunk_starts(self) -> tuple[Tensor | None, Tensor]:
        """The state every chunk starts from, and the sums of its decay steps; None and nothing if there is but one."""
        if self.chunks == 1:
            return None, self.none
        ends, totals = self.states(self.chunks), self.empty(self.chunks, self.walks, self.call.width)
        self._forward(states=ends, totals=totals, WRITE_TOTALS=True)
        self._carry(ends, totals, None, reverse=False)
        return ends, totals

    def states_of_tiles(self, start: Tensor | None) -> Tensor | None:
        """The state before every tile; None if that is 0 because there is one tile."""
        if self.tiles == 1:
            return None
        states = self.states(self.tiles + self.chunks)
        self._forward(start=start, states=states, WRITE_STATES=True)
        return states

    def walk(self, *, start: Tensor | None, gated: bool, of_tiles: bool = False) -> tuple[Tensor, Tensor]:
        """The result, multiplied by silu(z) if ``gated``, and the states before tiles or after chunks."""
        call, dtype = self.call, self.call.result_dtype
        merging = call.merge and call.directions > 1
        y = self.maps(dtype, apart=merging)
        states = self.states(self.tiles + self.chunks if of_tiles else self.chunks)
        in_kernel = gated and not merging
        gate = {} if not in_kernel or call.z is None else self._map(call.z).arguments("z")
        self._forward(
            start=start,
            states=states,
            **self._map(y).arguments("y"),
            **gate,
            WRITE_Y=True,
            WRITE_STATES=of_tiles,
            GATED=in_kernel,
        )
        if merging:
            y = _merged(y, call.z if gated else None)
        return y.view(call.result_shape), states

    def gradients_of_chunks(self, dy: Tensor, totals: Tensor, dstate: Tensor) -> tuple[Tensor, bool]:
        """The gradient of the state after every chunk, and whether it is there or else 0."""
        call = self.call
        last = _states_first(dstate).view(-1) if call.return_last_state else None
        if self.chunks == 1:
            return (self.states(1), False) if last is None else (last.clone(), True)
        later = self.states(self.chunks)
        self._adjoint(dy, later=later, ONLY_EARLIER=True)
        self._carry(later, totals, last, reverse=True)
        return later, True

    def walk_back(self, dy: Tensor, states: Tensor | None, later: tuple[Tensor, bool]) -> dict[str, Tensor]:
        """The gradients of everything but the gate."""
        call = self.call
        merging = call.x.ndim == 3 and call.directions > 1
        dx = self.maps(call.x.dtype, apart=merging)
        per_chunk = (self.chunks, self.walks, call.width)
        dtype = call.dt.dtype if call.dt_weight is None else _draw_dtype(call)
        draw = self.maps(dtype, apart=call.dt_weight is not None)
        found = {
            "dmatrices": self.empty(self.blocks, self.walks, self.padded * 2 * call.states),
            "dA": self.states(self.chunks),
            "dD": self.empty(*per_chunk),
            "dbias": self.empty(*per_chunk),
        }
        for name in ("B", "C"):
            found[f"d{name}"] = self.none if self.switches[f"{name}_PER_TOKEN"] else self.states(self.chunks)
        self._adjoint(
            dy,
            **found,
            **self._map(draw).arguments("draw"),
            **self._map(dx).arguments("dx"),
            states=states,
            later=later[0],
            HAS_LATER=later[1],
        )
        dx = _merged(dx, None) if merging else dx
        return {"x": dx.view(call.x.shape)} | self._gathered(found) | self._gradients_of_steps(draw)

    def _forward(self, **arguments: Any) -> None:
        """Runs the forward kernel; a tensor not given is not touched."""
        modes = ("WRITE_Y", "WRITE_STATES", "WRITE_TOTALS", "GATED")
        start = arguments.pop("start", None)
        strides = {f"{name}_{axis}": 0 for name in "yz" for axis in ("sample", "token", "direction")}
        defaults = strides | dict.fromkeys(("y", "z", "totals"), self.none) | dict.fromkeys(modes, False)
        self._run(
            kernels.scan_forward_kernel,
            **defaults | arguments,
            start=self.none if start is None else start,
            HAS_START=start is not None,
        )

    def _adjoint(self, dy: Tensor, **arguments: Any) -> None:
        """Runs the adjoint kernel; a tensor not given is not touched."""
        call = self.call
        tensors = ("dx", "draw", "dmatrices", "dB", "dC", "dA", "dD", "dbias")
        strides = {f"{name}_{axis}": 0 for name in ("dx", "draw") for axis in ("sample", "token", "direction")}
        states = arguments.pop("states", None)
        modes = {"HAS_LATER": False, "ONLY_EARLIER": False}
        self._run(
            kernels.scan_adjoint_kernel,
            **dict.fromkeys(tensors, self.none) | strides | modes | arguments,
            **self._map(dy).arguments("dy"),
            states=self.none if states is None else states,
            HAS_STATES=states is not None,
            SHARED_DY=call.merge,
            SAME_ROWS=arguments.get("dx_token") == self.switches["x_token"],
            EXACT_DOT=call.x.dtype == torch.float32 or not _bfloat16_products(call.x.device),
            SPLIT=call.x.dtype != torch.bfloat16,
        )

    def _run(self, kernel: Any, **arguments: Any) -> None:
        grid = (self.walks * self.blocks, self.chunks)
        if self.length and grid[0]:
            with torch.accelerator.device_index(self.call.x.device.index):
                kernel[grid](**self.step_arguments, **self.switches, **arguments)

    def _carry(self, ends: Tensor, totals: Tensor, first: Tensor | None, *, reverse: bool) -> None:
        call, channels = self.call, min(128, _power_of_two(self.call.width))
        grid = (self.walks * call.states, math.ceil(call.width / channels))
        switches: dict[str, Any] = {"HAS_FIRST": first is not None, "REVERSE": reverse, "CHANNELS": channels}
        switches |= {name: self.switches[name] for name in ("PRECISE", "NVIDIA")}
        first = self.none if first is None else first
        sizes = (self.chunks, self.walks, call.sequences, call.width, call.states, 0)
        with torch.accelerator.device_index(call.x.device.index):
            kernels.carry_kernel[grid](ends, totals, self.A, first, *sizes, **switches, num_warps=1)

    def _pack(self) -> dict[str, Any]:
        """What belongs to steps, in their order: rows of parameters and visits, gaps, B and C."""
        call = self.call
        order = None if call.order is None else call.order.to(torch.int32).contiguous()
        gap = None if call.gap is None else call.gap.to(torch.int32).contiguous()
        counts = [self._tables(order), self._tables(gap)]
        tables = max(counts)
        matrices = {"B": self._per_token(call.B), "C": self._per_token(call.C)}
        constants = {name: _states_first(m) if m.ndim == 3 else self.none for name, m in matrices.items()}
        if matrices["B"].ndim == 3:
            constants["B"] = constants["B"] * math.log(2)  # steps are in units of it
        places = self.empty(tables, self.tiles, 2, self.config.steps, dtype=torch.int32)
        gaps = places if gap is None else self.empty(tables, self.padded)
        packed = self.empty(self.walks, self.tiles, call.states, 2, self.config.steps)
        strides = {}
        for name, matrix in matrices.items():
            of_matrix = matrix.stride() if matrix.ndim == 4 else (0, 0, 0, 0)
            axes = ("sample", "token", "direction", "state")
            strides |= {f"{name}_{axis}": stride for axis, stride in zip(axes, of_matrix, strict=True)}
        block = self._packed_steps()
        grid = (self.walks, math.ceil(self.padded / block))
        if self.length and self.walks:
            with torch.accelerator.device_index(call.x.device.index):
                kernels.pack_kernel[grid](
                    **matrices, order=places if order is None else order, gap=places if gap is None else gap,
                    places=places, gaps=gaps, matrices=packed,
                    sequences=call.sequences, steps=call.steps, length=self.length, padded=self.padded,
                    states=call.states, tables=tables, order_tables=counts[0], gap_tables=counts[1], **strides,
                    HAS_ORDER=order is not None, HAS_GAP=gap is not None, CHAIN=call.chain,
                    STEP_PARAMS=call.params == "step", B_PER_TOKEN=matrices["B"].ndim == 4,
                    C_PER_TOKEN=matrices["C"].ndim == 4, BLOCK=block, STEPS=self.config.steps,
                    STATES=_power_of_two(call.states),
                )  # fmt: skip
        return {"places": places, "gaps": gaps, "matrices": packed, "tables": tables, **constants}

    def _packed_steps(self) -> int:
        """Steps of a program that packs or unpacks."""
        columns = _power_of_two(max(self.call.states, 8))
        return min(max(_PACKED // columns, 2 * self.config.steps), _power_of_two(self.padded))

    def _tables(self, table: Tensor | None) -> int:
        """How many walks have an order or gaps of their own."""
        if table is None:
            return 1
        return self.walks if table.ndim == 3 else self.call.sequences

    def _per_token(self, matrix: Tensor | None) -> Tensor:
        """B or C as (b, l, k, n), also where it is a constant shared by all channels; else (k, d, n)."""
        call = self.call
        if matrix is None:
            matrix = call.A.new_ones(1, 1).expand(call.sequences, 1)
        if matrix.ndim == 2:
            return matrix.expand(call.batch, call.tokens, -1, -1)
        return matrix

    def _switches(self) -> dict[str, Any]:
        call, config = self.call, self.config
        # Parameter rows: also those of a chained scan are not counted as visits.
        dt = self._map(call.dt) if call.tokens_last else _rows(_last_contiguous(call.dt))
        return {
            **self._map(call.x).arguments("x"),
            **dt.arguments("dt"),
            "weight": self.none if call.dt_weight is None else call.dt_weight.contiguous(),
            "bias": self.none if call.dt_bias is None else call.dt_bias.contiguous(),
            "A": self.A,
            "D": self.none if call.D is None else call.D.contiguous(),
            "samples": call.batch,
            "sequences": call.sequences,
            "chained": call.directions if call.chain else 1,
            "length": self.length,
            "padded": self.padded,
            "chunk": self.chunk,
            "width": call.width,
            "N": call.states,
            "rank": self.rank,
            "unaligned": 0,
            "LOW_RANK": call.dt_weight is not None,
            "TWO_A_WORD": _two_a_word(dt.tensor, self.rank),
            "PARTS": max(1, math.ceil(self.rank / tiles_triton.RANKS.value)),
            "HALF_DOT": call.dt.dtype == torch.float16
            or (call.dt.dtype == torch.bfloat16 and _bfloat16_products(call.x.device)),
            "SOFTPLUS": call.softplus,
            "HAS_BIAS": call.dt_bias is not None,
            "HAS_GAP": call.gap is not None,
            "CHAIN": call.chain,
            "TOKENS_LAST": call.tokens_last,
            "SHARED_X": call.x.ndim == 3,
            "B_PER_TOKEN": call.B.ndim != 3,
            "C_PER_TOKEN": call.C is None or call.C.ndim != 3,
            "HAS_SKIP": call.D is not None,
            "ONE_STATE": call.states == self.slots,
            "UNROLL": self.unroll,
            "STEPS": config.steps,
            "LOG_STEPS": config.steps.bit_length() - 1,
            "CHANNELS": config.channels,
            "SLOTS": self.slots,
            "LOG_SLOTS": self.slots.bit_length() - 1,
            "FULL": call.width % config.channels == 0,
            "MASKED": call.return_last_state and self.length % config.steps != 0,
            "PRECISE": call.x.dtype == torch.float32,
            "NVIDIA": call.x.is_cuda and torch.version.hip is None,
            "INDEX": self._index_type(),
            "num_warps": max(1, self.slots * min(config.channels, _LANES) // _LANES),
            "num_stages": 1,  # the state is carried from tile to tile: nothing may run ahead of it
        } | ({"maxnreg": config.registers} if torch.version.hip is None else {})

    def _index_type(self) -> Any:
        """Type of offsets inside one sample; those of samples are always 64 bits wide."""
        call = self.call
        distance = max(call.dt.stride(1), call.x.stride(1), call.directions * call.width)
        largest = call.tokens * distance
        return tl.int32 if largest < 2**31 else tl.int64

    def _rows(self, tensor: Tensor) -> _Rows:
        """A tensor (b, l, d), or (b, l, k, d), whose rows a chained scan counts as visits."""
        if tensor.ndim == 4 and self.call.chain:
            tensor = tensor.contiguous()
            return _Rows(tensor, tensor.stride(0), tensor.shape[-1], 0)
        return _rows(_last_contiguous(tensor))

    def _map(self, tensor: Tensor) -> _Rows:
        """A tensor of all channels, whose tokens are contiguous if those of the call are."""
        return _rows(tokens_contiguous(tensor)) if self.call.tokens_last else self._rows(tensor)

    def _gathered(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients in the shapes of the inputs, from sums over visits, chunks, samples and blocks of channels."""
        call = self.call

        def over_walks(partial: Tensor) -> Tensor:  # (chunks, b·k, ...) -> (k, ...)
            return partial.unflatten(1, (call.batch, call.sequences)).sum((0, 1))

        grads = {"A": over_walks(found["dA"]).transpose(-1, -2)}
        if call.D is not None:
            grads["D"] = over_walks(found["dD"])
        if call.dt_bias is not None:
            grads["dt_bias"] = over_walks(found["dbias"])
        grads |= self._unpacked(found["dmatrices"])
        matrices = found["dmatrices"].unflatten(-1, (self.tiles, call.states, 2, -1))
        for plane, (name, matrix) in enumerate((("B", call.B), ("C", call.C))):
            if matrix is not None and matrix.ndim == 3:
                grads[name] = over_walks(found[f"d{name}"]).transpose(-1, -2)
            elif matrix is not None and matrix.ndim == 2:
                grads[name] = over_walks(matrices[..., plane, :].sum((2, 4)))
        per_row = {"B", "C"} & {name for name, grad in grads.items() if grad.ndim == 4}
        return grads | {name: self._over_visits(grads[name]) for name in per_row}

    def _unpacked(self, dmatrices: Tensor) -> dict[str, Tensor]:
        """Gradients of B and C (b, l, k, n), of those that every token has its own of."""
        call = self.call
        wanted = {
            "B": call.B if call.B.ndim == 4 else None,
            "C": call.C if call.C is not None and call.C.ndim == 4 else None,
        }
        grads = {name: self.visits(of.shape[-1], of.dtype) for name, of in wanted.items() if of is not None}
        arguments: dict[str, Any] = {}
        for name in wanted:
            rows = self._rows(grads[name]) if name in grads else _Rows(self.none, 0, 0, 0)
            arguments |= rows.arguments(f"d{name}")
        block = self._packed_steps()
        grid = (self.walks, math.ceil(self.length / block))
        if grads and grid[0] and grid[1]:
            with torch.accelerator.device_index(call.x.device.index):
                kernels.unpack_kernel[grid](
                    dmatrices=dmatrices, places=self.step_arguments["places"], blocks=self.blocks, walks=self.walks,
                    sequences=call.sequences, length=self.length, padded=self.padded, N=call.states,
                    tables=self.step_arguments["tables"], **arguments, B_PER_TOKEN="B" in grads,
                    C_PER_TOKEN="C" in grads, BLOCK=block, STEPS=self.config.steps, STATES=_power_of_two(call.states),
                )  # fmt: skip
        return grads

    def _gradients_of_steps(self, draw: Tensor) -> dict[str, Tensor]:
        """Gradients of dt and its weight from ``draw`` (b, l, k, d), that of weight·dt + bias."""
        call, draw = self.call, self._over_visits(draw)
        if call.dt_weight is None:
            return {"dt": draw}
        dt, draw, weight = _evenly_apart(call.dt), _evenly_apart(draw), call.dt_weight.to(draw.dtype).contiguous()
        ddt = torch.empty(call.dt.shape, dtype=dt.dtype, device=dt.device)
        samples, tokens, directions, width = draw.shape
        rows, block = samples * tokens, min(_BLOCK, _power_of_two(max(width, _LANES)))
        blocks = math.ceil(width / block)
        of_dt, of_weight = _rows_each(rows, directions), _rows_each(rows, directions * blocks)
        parts = self.empty(math.ceil(rows / of_weight), directions, width, self.rank)
        sizes = {"rows": rows, "width": width, "rank": self.rank, **_places("draw", draw)}
        tile = {"ROWS": _ROWS, "BLOCK": block, "RANKS": max(16, _power_of_two(self.rank)), "num_warps": 4}
        if draw.numel():
            with torch.accelerator.device_index(draw.device.index):
                kernels.dt_gradient_kernel[(math.ceil(rows / of_dt), directions)](
                    draw, weight, ddt, rows_each=of_dt, **sizes, **_places("ddt", ddt), **tile
                )
                kernels.weight_gradient_kernel[(len(parts), directions, blocks)](
                    draw, dt, parts, rows_each=of_weight, **sizes, **_places("dt", dt), **tile
                )
        return {"dt": ddt, "dt_weight": parts.sum(0)}

    def _over_visits(self, visits: Tensor) -> Tensor:
        """Gradients per visit (b, l, k, c), of the parameter rows that all visits of a chained scan share."""
        return visits.sum(2, keepdim=True) if self.call.chain and self.call.directions > 1 else visits


def _merged(parts: Tensor, z: Tensor | None) -> Tensor:
    """The sum of (b, l, k, d) over directions, times silu(z) if there is a gate."""
    batch, tokens, directions, width = parts.shape
    out = torch.empty((batch, tokens, width), dtype=parts.dtype, device=parts.device)
    gate = out if z is None else _rows_of_one_stride(z)
    grid, sizes = _elementwise(batch * tokens, width)
    if out.numel():
        with torch.accelerator.device_index(parts.device.index):
            kernels.merge_kernel[grid](
                parts, gate, out, batch * tokens, directions, width, parts.stride(1), parts.stride(2), gate.stride(-2),
                GATED=z is not None, **sizes,
            )  # fmt: skip
    return out


def _gate_gradients(call: ScanCall, dy: Tensor, result: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the result before its gate, and of the gate."""
    assert call.z is not None, "without a gate there is nothing to do"
    if call.tokens_last:
        dy, z, result = (tokens_contiguous(each).permute(0, 2, 3, 1) for each in (dy, call.z, result))
    else:
        dy, z = _rows_of_one_stride(dy), _rows_of_one_stride(call.z)
    dresult = torch.empty(result.shape, dtype=torch.float32, device=z.device)
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    width = result.shape[-1]
    rows = result.numel() // max(1, width)
    grid, sizes = _elementwise(rows, width)
    if rows:
        with torch.accelerator.device_index(dy.device.index):
            kernels.gate_adjoint_kernel[grid](
                dy, z, result, dz, dresult, rows, width, dy.stride(-2), z.stride(-2), **sizes
            )
    return (dresult.permute(0, 3, 1, 2), dz.permute(0, 3, 1, 2)) if call.tokens_last else (dresult, dz)


def _power_of_two(number: int) -> int:
    """The smallest that is at least ``number``; triton's own function takes a while."""
    return 1 << max(0, number - 1).bit_length()


def _elementwise(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile of a kernel over (rows, width)."""
    block = min(256, _power_of_two(width))
    return (math.ceil(rows / 16), math.ceil(width / block)), {"ROWS": 16, "BLOCK": block}


def _rows_of_one_stride(tensor: Tensor) -> Tensor:
    """The tensor, a copy if its rows of contiguous channels do not all have one distance."""
    stride = tensor.stride(-2)
    for axis in range(tensor.ndim - 2, -1, -1):
        if tensor.shape[axis] > 1 and tensor.stride(axis) != stride:
            return tensor.contiguous()
        stride *= tensor.shape[axis]
    return _last_contiguous(tensor)


def _evenly_apart(tensor: Tensor) -> Tensor:
    """A tensor (b, l, k, c), a copy if the rows of a direction do not all have one distance."""
    even = tensor.shape[0] == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
    return _last_contiguous(tensor) if even else tensor.contiguous()


def _rows_each(rows: int, programs: int) -> int:
    """Rows of a program, whole tiles, where so many programs share them and the GPU should be full."""
    return _ROWS * max(1, math.ceil(rows * programs / (_ROWS * _PROGRAMS)))


def _places(name: str, tensor: Tensor) -> dict[str, int]:
    """Strides of rows and directions of a tensor (b, l, k, c), all rows of which have one distance."""
    return {f"{name}_row": tensor.stride(1), f"{name}_direction": tensor.stride(2)}


def _bfloat16_products(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run on ``device``; Triton's interpreter has none."""
    return device.type == "cuda" and (torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8)


def _draw_dtype(call: ScanCall) -> torch.dtype:
    """The dtype of gradients that are only summed up: bfloat16, which has float32's range, or else float32."""
    return torch.bfloat16 if call.x.dtype == torch.bfloat16 and _bfloat16_products(call.x.device) else torch.float32


def _two_a_word(dt: Tensor, rank: int) -> bool:
    """Whether all rows of a low-rank dt can be read two neighbours at once."""
    even = all(number % 2 == 0 for number in (rank, *dt.stride()[:3]))
    return dt.element_size() == 2 and even and dt.data_ptr() % 4 == 0


def _last_contiguous(tensor: Tensor) -> Tensor:
    """The tensor with contiguous rows of channels."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _states_first(tensor: Tensor) -> Tensor:
    """(..., d, n) -> (..., n, d)."""
    return tensor.transpose(-1, -2).float().contiguous()
