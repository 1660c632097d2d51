"""The Triton backend: sizes of launches, buffers, and the order of passes over the kernels of ``scan_triton.py``."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vssm_kernels import scan_torch
from vssm_kernels import scan_triton as kernels
from vssm_kernels.scan_call import ScanCall


@dataclass(frozen=True)
class LaunchConfig:
    """Sizes of a launch."""

    block: int  # channels of a program
    unroll: int  # steps whose loads are issued together; backward keeps their states in registers
    chunk: int  # steps of a program


def launch_config(walks: int, width: int, states: int, length: int, *, backward: bool) -> LaunchConfig:
    """Sizes for ``walks`` sequences over the whole batch, measured on an H100.

    Sequences are cut into chunks only where there are too few to fill a GPU, since decays are then computed twice.
    """
    block = min(32, max(16, triton.next_power_of_2(width)))
    unroll = 4 if states <= 4 else 1 if backward else 2
    programs = walks * math.ceil(width / block)
    chunks = 1 if programs >= 1024 else max(1, min(math.ceil(4096 / programs), length // 64))
    return LaunchConfig(block, unroll, math.ceil(length / chunks / unroll) * unroll)


def forward(call: ScanCall) -> tuple[Tensor, Tensor]:
    """Result and last state of ``call`` (the state empty unless asked for)."""
    if call.compute_dtype == torch.float64:  # the kernels compute in float32
        return scan_torch.forward(call)
    launch = _Launch(call, backward=False)
    starts, _ = launch.chunk_starts()
    parts = launch.visits(call.result_dtype)
    ends = launch.states(launch.chunks) if call.return_last_state else None
    launch.walk(y=parts, start=starts, ends=ends)
    result = _merged(call, parts)
    if ends is None:
        return result, launch.empty(0)
    last = ends[-1].view(call.batch, call.sequences, call.states, call.width)
    return result, last.transpose(-1, -2).contiguous()


def backward(call: ScanCall, dy: Tensor, dstate: Tensor) -> dict[str, Tensor]:
    """Gradients of the differentiable inputs of ``call``, by name."""
    if call.compute_dtype == torch.float64:
        return scan_torch.backward(call, dy, dstate)
    launch = _Launch(call, backward=True)
    starts, totals = launch.chunk_starts()
    saved = launch.states(launch.groups)
    launch.walk(saved=saved, start=starts)
    later = dstate.transpose(-1, -2).contiguous() if call.return_last_state else None
    if launch.chunks > 1:
        later = launch.chunk_gradients(dy, totals, later)
    return _gathered(call, launch.walk_back(dy, saved, later), launch.blocks)


class _Launch:
    """One call as the kernels take it: rows of contiguous channels, strides, sizes and switches."""

    def __init__(self, call: ScanCall, *, backward: bool) -> None:
        self.call = call
        self.walks = call.batch * call.sequences
        self.length = call.steps * (call.directions if call.chain else 1)
        config = launch_config(self.walks, call.width, call.states, self.length, backward=backward)
        self.chunks = max(1, math.ceil(self.length / config.chunk))
        self.groups = max(1, math.ceil(self.length / config.unroll))
        self.blocks = math.ceil(call.width / config.block)
        self.grid = (self.walks * self.blocks, self.chunks)
        self.A = call.A.float().transpose(-1, -2).contiguous()  # (k, n, d), as everything per channel
        self.arguments = self._inputs() | self._switches(config)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised memory on the device of the call."""
        return torch.empty(shape, dtype=dtype, device=self.call.x.device)

    def states(self, count: int) -> Tensor:
        """Space for ``count`` states of every walk, (count, b·k, n, d)."""
        return self.empty(count, self.walks, self.call.states, self.call.width)

    def visits(self, dtype: torch.dtype, *, width: int | None = None, copies: int = 1) -> Tensor:
        """Space for a row per token and direction, (copies·b, l, k, width), 0 where a direction skips tokens."""
        call = self.call
        shape = (copies * call.batch, call.tokens, call.directions, call.width if width is None else width)
        space = self.empty(*shape, dtype=dtype)
        return space if call.steps == call.tokens else space.zero_()

    def walk(
        self,
        *,
        y: Tensor | None = None,
        saved: Tensor | None = None,
        start: Tensor | None = None,
        ends: Tensor | None = None,
        totals: Tensor | None = None,
    ) -> None:
        """Takes all steps forward; reads ``start`` and writes the others, where given."""
        totals = self.empty(self.chunks, self.walks, self.call.width) if totals is None else totals
        tensors = {"y": y, "saved": saved, "start": start, "ends": ends}
        self._run(
            kernels.scan_forward_kernel,
            **{name: self.A if tensor is None else tensor for name, tensor in tensors.items()},
            totals=totals,
            HAS_START=start is not None,
            WRITE_Y=y is not None,
            WRITE_SAVED=saved is not None,
            WRITE_ENDS=ends is not None,
        )

    def walk_back(self, dy: Tensor, saved: Tensor, later: Tensor | None) -> dict[str, Tensor]:
        """Takes all steps backwards; returns raw gradients, at visits or per walk and chunk."""
        call = self.call
        per_walk = (self.chunks, self.walks, call.width)
        found = {
            "dx": self.visits(call.x.dtype),
            "draw": self.visits(call.dt.dtype),
            "dz": self.A if call.z is None else self.visits(call.z.dtype),
            "dA": self.states(self.chunks),
            "dD": self.empty(*per_walk),
            "dbias": self.empty(*per_walk),
            "dweight": self.empty(self.chunks, self.walks, self.arguments["RANK"], call.width),
        }
        for name in ("B", "C"):
            per_token = self.arguments[f"{name}_PER_TOKEN"]
            rows = self.visits(torch.float32, width=call.states, copies=self.blocks) if per_token else None
            found[f"d{name}"] = self.states(self.chunks) if rows is None else rows
        self._run_adjoint(dy, found, saved=saved, later=later)
        return found

    def chunk_starts(self) -> tuple[Tensor | None, Tensor]:
        """The state every chunk starts from (None if there is but one), and the sums of its decay steps."""
        totals = self.empty(self.chunks, self.walks, self.call.width)
        if self.chunks == 1:
            return None, totals
        ends = self.states(self.chunks)
        self.walk(ends=ends, totals=totals)
        self._carry(ends, totals, None, reverse=False)
        return ends, totals

    def chunk_gradients(self, dy: Tensor, totals: Tensor, last: Tensor | None) -> Tensor:
        """The gradient of the state after every chunk, from that of the last state."""
        earlier = self.states(self.chunks)
        self._run_adjoint(dy, {}, earlier=earlier)
        self._carry(earlier, totals, last, reverse=True)
        return earlier

    def _run_adjoint(
        self,
        dy: Tensor,
        found: dict[str, Tensor],
        *,
        saved: Tensor | None = None,
        later: Tensor | None = None,
        earlier: Tensor | None = None,
    ) -> None:
        dy = _rows(dy)
        z = dy if self.call.z is None else _rows(self.call.z)
        written = dict.fromkeys(("dx", "draw", "dz", "dB", "dC", "dA", "dD", "dbias", "dweight"), self.A) | found
        self._run(
            kernels.scan_adjoint_kernel,
            **written,
            **_strided("dy", dy),
            **_strided("z", z),
            saved=self.A if saved is None else saved,
            later=self.A if later is None else later,
            earlier=self.A if earlier is None else earlier,
            batch=self.call.batch,
            HAS_LATER=later is not None,
            GATED=self.call.z is not None,
            ONLY_EARLIER=earlier is not None,
        )

    def _run(self, kernel: Any, **arguments: Any) -> None:
        if self.length:
            with torch.accelerator.device_index(self.call.x.device.index):
                kernel[self.grid](**self.arguments, **arguments)

    def _carry(self, ends: Tensor, totals: Tensor, first: Tensor | None, *, reverse: bool) -> None:
        names = ("sequences", "unaligned", "width", "N", "STATES", "BLOCK", "NVIDIA", "num_warps")
        shared: dict[str, Any] = {name: self.arguments[name] for name in names}
        shared |= {"HAS_FIRST": first is not None, "REVERSE": reverse}
        with torch.accelerator.device_index(self.call.x.device.index):
            first = self.A if first is None else first
            kernels.carry_kernel[(self.grid[0],)](ends, totals, self.A, first, self.chunks, **shared)

    def _inputs(self) -> dict[str, Any]:
        call = self.call
        order = call.order
        if order is None:
            order = torch.arange(call.steps, device=call.x.device).expand(call.directions, -1)
        order = order.to(torch.int32).contiguous()
        gap = order if call.gap is None else call.gap.to(torch.int32).contiguous()
        none = self.empty(call.sequences, call.width).zero_()
        return {
            **_strided("x", _rows(call.x)),
            **_strided("dt", _rows(call.dt)),
            **_strided("B", _rows(self._matrix(call.B))),
            **_strided("C", _rows(self._matrix(call.C))),
            "A": self.A,
            "weight": none if call.dt_weight is None else call.dt_weight.transpose(-1, -2).contiguous(),
            "bias": none if call.dt_bias is None else call.dt_bias.contiguous(),
            "D": none if call.D is None else call.D.contiguous(),
            "order": order,
            "gap": gap,
            "order_sample": order.stride(0) if order.ndim == 3 else 0,
            "gap_sample": gap.stride(0) if gap.ndim == 3 else 0,
            "tokens": call.tokens,
            "steps": call.steps,
        }

    def _matrix(self, matrix: Tensor | None) -> Tensor:
        """B or C per token as it is; a constant as (k, n, d)."""
        if matrix is None:
            return torch.ones_like(self.A)
        if matrix.ndim == 2:
            return matrix[..., None].expand(self.A.shape).contiguous()
        return matrix.transpose(-1, -2).contiguous() if matrix.ndim == 3 else matrix

    def _switches(self, config: LaunchConfig) -> dict[str, Any]:
        call = self.call
        rank = 1 if call.dt_weight is None else call.dt.shape[-1]
        return {
            "sequences": call.sequences,
            "directions": call.directions,
            "length": self.length,
            "chunk": config.chunk,
            "width": call.width,
            "unaligned": 0,
            "N": call.states,
            "RANK": rank,
            "LOW_RANK": call.dt_weight is not None,
            "B_PER_TOKEN": call.B.ndim == 4,
            "C_PER_TOKEN": call.C is not None and call.C.ndim == 4,
            "HAS_GAP": call.gap is not None,
            "SOFTPLUS": call.softplus,
            "CHAIN": call.chain,
            "STEP_PARAMS": call.params == "step",
            "STATES": triton.next_power_of_2(call.states),
            "RANKS": triton.next_power_of_2(rank),
            "BLOCK": config.block,
            "UNROLL": config.unroll,
            "PRECISE": call.x.dtype == torch.float32,
            "NVIDIA": call.x.is_cuda and torch.version.hip is None,
            "INDEX": _index_type(call),
            "num_warps": 1,
            "num_stages": 1,  # the state is carried from step to step: nothing may run ahead of it
        }


def _merged(call: ScanCall, parts: Tensor) -> Tensor:
    """The result from what every direction gave, (b, l, k, d)."""
    directions = call.directions if call.merge else 1
    if call.z is None and directions == 1:
        return parts.view(call.result_shape)
    out = torch.empty(call.result_shape, dtype=call.result_dtype, device=parts.device)
    rows, block = out.numel() // call.width, min(256, triton.next_power_of_2(call.width))
    z = out if call.z is None else call.z.contiguous()
    sizes: dict[str, Any] = {"GATED": call.z is not None, "ROWS": 16, "BLOCK": block}
    with torch.accelerator.device_index(parts.device.index):
        grid = (triton.cdiv(rows, 16), triton.cdiv(call.width, block))
        kernels.merge_kernel[grid](parts, z, out, rows, directions, call.width, **sizes)
    return out


def _gathered(call: ScanCall, found: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Gradients in the shapes of the inputs, from sums over visits, chunks, samples and blocks of channels."""

    def over_walks(partial: Tensor) -> Tensor:  # (chunks, b·k, ...) -> (k, ...)
        return partial.unflatten(1, (call.batch, call.sequences)).sum((0, 1))

    def parameter_rows(visits: Tensor) -> Tensor:  # (b, l, k, c) -> (b, l, parameter sets, c)
        return visits.sum(2, keepdim=True) if call.chain and call.directions > 1 else visits

    grads = {
        "x": found["dx"] if call.x.ndim == 4 else found["dx"].sum(2),
        "dt": parameter_rows(found["draw"]),
        "A": over_walks(found["dA"]).transpose(-1, -2),
        "D": over_walks(found["dD"]),
        "dt_bias": over_walks(found["dbias"]),
    }
    for name, matrix in (("B", call.B), ("C", call.C)):
        if matrix is not None:
            grads[name] = _matrix_gradient(matrix, found[f"d{name}"], over_walks, parameter_rows, blocks)
    if call.dt_weight is not None:
        grads["dt"] = torch.einsum("blkd,kdr->blkr", grads["dt"], call.dt_weight.to(grads["dt"].dtype))
        grads["dt_weight"] = over_walks(found["dweight"]).transpose(-1, -2)
    if call.z is not None:
        grads["z"] = found["dz"].sum(2) if call.merge else found["dz"]
    return grads


def _matrix_gradient(
    matrix: Tensor,
    found: Tensor,
    over_walks: Callable[[Tensor], Tensor],
    parameter_rows: Callable[[Tensor], Tensor],
    blocks: int,
) -> Tensor:
    if matrix.ndim == 4:
        return parameter_rows(found.unflatten(0, (blocks, -1)).sum(0))
    per_channel = over_walks(found).transpose(-1, -2)  # (k, d, n)
    return per_channel if matrix.ndim == 3 else per_channel.sum(1)


def _index_type(call: ScanCall) -> Any:
    """Type of offsets inside one sample; those of samples are always 64 bits wide."""
    largest = max(math.prod(tensor.shape[1:]) for tensor in (call.x, call.dt)) * call.directions
    return tl.int32 if 2 * largest < 2**31 else tl.int64


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with contiguous rows of channels."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strided(name: str, tensor: Tensor) -> dict[str, Any]:
    """A tensor (b, l, d) or (b, l, k, d) with its strides, as arguments; those of a constant are not used."""
    return {
        name: tensor,
        f"{name}_sample": tensor.stride(0),
        f"{name}_token": tensor.stride(1),
        f"{name}_direction": tensor.stride(2) if tensor.ndim == 4 else 0,
    }
