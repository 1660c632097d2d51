"""Sizes of the Triton launches: what ``vssm tune`` found here or came with the package, or a heuristic."""

import functools
import itertools
import json
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch

from vssm_kernels.cache import cache_folder
from vssm_kernels.scan_call import ScanCall

_logger = logging.getLogger("vssm")
_forced: "LaunchConfig | None" = None
_batch: int | None = None

_FEW = {"forward": 1000, "backward": 528}  # programs, below which sequences are cut or warps share states
_WAVE = {"forward": 1584, "backward": 1056}  # programs that an H100 holds at once: 12 or 8 a multiprocessor
_SLOTS = 4  # warps that share states, where they do
_MOST_SLOTS = {"forward": 16, "backward": 4}  # more of them would only do the same work
_REGISTERS = 65536  # of a multiprocessor
_SHORTEST = 128  # steps of a chunk


@dataclass(frozen=True)
class LaunchConfig:
    """Sizes of a launch."""

    steps: int  # of a tile: 16 or 32
    channels: int  # of a program: 16, 32 or 64
    slots: int  # warps that share the states of a program; as many of them as divide the states
    chunks: int  # that a sequence is cut into
    registers: int  # of a thread at most, which sets how many programs run at once


class _Shape(NamedTuple):
    """What sizes depend on."""

    phase: str  # forward or backward
    batch: int  # rounded up to a power of two
    sequences: int
    width: int
    states: int
    length: int
    rank: int  # 0: a full step
    dtype: str


def launch_config(call: ScanCall, *, backward: bool) -> LaunchConfig:
    """The sizes for one call: those being tried, of the user's table, of the package's, or of :func:`heuristic`."""
    if _forced is not None:
        return _forced
    return _chosen(_shape_of(call, backward=backward), call.x.device)


@functools.cache  # a model asks at every call
def _chosen(shape: _Shape, device: torch.device) -> LaunchConfig:
    spelled = _spelled(shape)
    for path in (user_table_path(), shipped_table_path()):
        if (tuned := _table(path, device).get(spelled)) is not None:
            return tuned
    return heuristic(shape)


def forget() -> None:
    """Drops what was read of the tables, so that the next call reads them again."""
    _chosen.cache_clear()
    _table.cache_clear()


def heuristic(shape: _Shape) -> LaunchConfig:
    """Sizes from the shape alone, made on an H100.

    Where sequences are too few to fill the GPU, a few warps share the states of a program going forward, which costs
    a sum over them a step; if those are still too few, and going backward, sequences are cut, for which decays are
    computed twice. A thread of a single state has 128 registers to itself when 16 warps share a multiprocessor; more
    states, and a step for every channel, need more, and gradients twice as many, unless with fewer all programs run at
    once.
    """
    channels = 16 if shape.width <= 16 else 32
    programs = max(1, shape.batch * shape.sequences * math.ceil(shape.width / channels))
    backward, wave = shape.phase == "backward", _WAVE[shape.phase]
    slots = chunks = 1
    if programs < _FEW[shape.phase]:
        if not backward and shape.states % _SLOTS == 0 and programs * _SLOTS >= _FEW[shape.phase]:
            slots = _SLOTS
        else:
            in_a_wave = wave // programs  # if that is a few, rounding leaves much idle: rather more waves
            wanted = in_a_wave if in_a_wave >= 4 else math.ceil(1.4 * wave / programs)
            chunks = max(1, min(wanted, shape.length // _SHORTEST))
    registers = 128 if shape.states == 1 and shape.rank else 168
    if backward and (shape.states == 1 or not wave < programs <= _WAVE["forward"]):
        registers = 255
    return LaunchConfig(steps=16, channels=channels, slots=slots, chunks=chunks, registers=registers)


def key(call: ScanCall, *, backward: bool) -> str:
    """Under which the table holds a call."""
    return _spelled(_shape_of(call, backward=backward))


def candidates(key: str) -> list[LaunchConfig]:
    """The sizes worth a trial for a key, that of the heuristic first.

    Raises:
        ValueError: ``key`` is none.
    """
    shape = _parsed(key)
    usual = heuristic(shape)
    chunks = sorted({1, usual.chunks, max(1, usual.chunks // 2), min(2 * usual.chunks, max(1, shape.length // 64))})
    slots = [slots for slots in (1, 2, 4, 8, 16) if shape.states % slots == 0 and slots <= _MOST_SLOTS[shape.phase]]
    channels = sorted({usual.channels, 64})
    sizes = itertools.starmap(LaunchConfig, itertools.product((16, 32), channels, slots, chunks, (128, 168, 255)))
    return [usual, *(config for config in sizes if config != usual and _worth_a_trial(config))]


def _worth_a_trial(config: LaunchConfig) -> bool:
    """Whether the registers suffice for a program, and warps that share states have no more than the usual tile."""
    usual = config.steps == 16 and config.channels <= 32
    return config.slots * 32 * config.registers <= _REGISTERS and (config.slots == 1 or usual)


@contextmanager
def forced(config: LaunchConfig) -> Iterator[None]:
    """Makes every launch inside use ``config``."""
    global _forced
    before, _forced = _forced, config
    try:
        yield
    finally:
        _forced = before


@contextmanager
def of_batch(batch: int) -> Iterator[None]:
    """Makes every launch inside use the sizes of calls of so many samples, whatever it has itself."""
    global _batch
    before, _batch = _batch, batch
    try:
        yield
    finally:
        _batch = before


def user_table_path() -> Path:
    """Where ``vssm tune`` writes: ``launch_table.json`` in the cache folder."""
    return cache_folder() / "launch_table.json"


def shipped_table_path() -> Path:
    """The table that comes with the package, beside this file."""
    return Path(__file__).with_name("launch_table.json")


@functools.cache
def device_part(device: torch.device) -> str:
    """Architecture and number of multiprocessors, such as ``sm_90 132``; rows of a table serve GPUs that share them."""
    if device.type != "cuda":
        return device.type
    found = torch.cuda.get_device_properties(device)
    architecture = (
        f"sm_{found.major}{found.minor}" if torch.version.hip is None else found.gcnArchName.partition(":")[0]
    )
    return f"{architecture} {found.multi_processor_count}"


def _shape_of(call: ScanCall, *, backward: bool) -> _Shape:
    batch = call.batch if _batch is None else _batch
    return _Shape(
        phase="backward" if backward else "forward",
        batch=1 << max(0, batch - 1).bit_length(),
        sequences=call.sequences,
        width=call.width,
        states=call.states,
        length=call.steps * (call.directions if call.chain else 1),
        rank=0 if call.dt_weight is None else call.dt.shape[-1],
        dtype=str(call.x.dtype).removeprefix("torch."),
    )


def _spelled(shape: _Shape) -> str:
    phase, batch, sequences, width, states, length, rank, dtype = shape
    return f"{phase} b{batch} k{sequences} d{width} n{states} t{length} r{rank} {dtype}"


def _parsed(key: str) -> _Shape:
    found = re.fullmatch(r"(forward|backward) b(\d+) k(\d+) d(\d+) n(\d+) t(\d+) r(\d+) (\w+)", key)
    if found is None:
        raise ValueError(f"launch table: expected a key such as 'forward b8 k4 d96 n1 t3136 r6 bfloat16', got {key!r}")
    batch, sequences, width, states, length, rank = (int(size) for size in found.groups()[1:-1])
    return _Shape(found[1], batch, sequences, width, states, length, rank, found[found.re.groups])


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _table(path: Path, device: torch.device) -> dict[str, LaunchConfig]:
    """The rows that serve a device; read once, and none if there is no such table or the file is something else.

    Those are the rows measured on devices of its name and, for keys without one, on others of the same part.
    """
    names = [field.name for field in fields(LaunchConfig)]
    try:
        tables = json.loads(path.read_text(encoding="utf-8"))
        part, own = device_part(device), tables.get(_device_name(device), {})
        others = {key: row for rows in tables.values() for key, row in rows.items() if row.get("part") == part}
        return {key: LaunchConfig(**{name: int(row[name]) for name in names}) for key, row in (others | own).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _logger.warning(
            "%s is not a table of launch sizes (%r): not used; vssm tune --force writes it anew", path, error
        )
        return {}
