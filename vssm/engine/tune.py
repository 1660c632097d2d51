"""Finds the fastest launch sizes of the Triton kernels on the GPU at hand, and keeps them in a table."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from vssm.engine.benchmark_op import OpSetting, measure_kernels, relative_error, side_stream
from vssm.engine.compile_ahead import Compilation, compilers
from vssm.engine.op_shapes import OpShape
from vssm.engine.op_subjects import Subject, phase_calls, subjects
from vssm.engine.records import environment
from vssm.files import atomic_path
from vssm_kernels import launch_table, use_backend
from vssm_kernels.launch_table import LaunchConfig
from vssm_kernels.scan_call import ScanCall

_logger = logging.getLogger(__name__)
_PHASES = ("forward", "backward")
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}  # of the kernels' own tests


class _Job(NamedTuple):
    """One pass of one call: what to run, and how records call it."""

    key: str
    shape: OpShape
    call: Callable[[], Sequence[Tensor]]
    facts: dict[str, Any]

    def compilation(self, config: LaunchConfig) -> Compilation:
        """What it needs of the compiler with these sizes."""
        op, phase, dtype = (self.facts[name] for name in ("op", "phase", "dtype"))
        return Compilation(self.shape, subjects, op, phase, getattr(torch, dtype), config)


def tune(
    shapes: Sequence[OpShape],
    setting: OpSetting,
    *,
    dtypes: Sequence[torch.dtype],
    path: Path | None = None,
    force: bool = False,
) -> list[dict]:
    """Times every candidate configuration of both passes of both public functions, and writes the fastest.

    A candidate that fails to compile or to launch is skipped. One whose result is not that of the torch backend is
    refused, with a line in the log. The table is written after every search, so that a search that was interrupted
    goes on where it was.

    Args:
        shapes: Sizes and scan orders.
        setting: How to measure; its dtype is not used.
        dtypes: Of the inputs.
        path: The table; the one that the kernels read when not given.
        force: Search again what the table already holds for this device and version.

    Returns:
        One record per shape, dtype, function and pass: ``op``, the sizes, ``dtype``, ``phase``, ``key``; unless it was
        in the table, ``candidates``, ``failed``, ``refused``, ``before_ms`` (without tuning), ``ms`` and ``config`` of
        the fastest, both ``None`` where no candidate works.

    Raises:
        ValueError: The table is not one.
    """
    path = launch_table.user_table_path() if path is None else path
    surroundings = environment(setting.device)
    device_name, version = str(surroundings["device_name"]), surroundings["vssm"]
    records = []
    with compilers(setting.device, setting.processes) as ahead, side_stream(setting.device):
        bar = tqdm(total=4 * len(shapes) * len(dtypes), desc="tuning", disable=not sys.stderr.isatty())
        for job, expected in _jobs(shapes, setting.device, dtypes):
            held = read_table(path).get(device_name, {}).get(job.key)
            if force or held is None or held.get("version") != version:
                configs = launch_table.candidates(job.key)
                ahead.compile([job.compilation(config) for config in configs])
                found = _search(job, configs, setting, expected)
                if found["config"] is not None:
                    facts = {"ms": found["ms"], "part": launch_table.device_part(setting.device), "version": version}
                    _write_entry(path, device_name, job.key, found["config"] | facts)
            else:
                found = {"config": held}
            records.append(job.facts | found)
            bar.update()
        bar.close()
    return records


def read_table(path: Path) -> dict[str, dict[str, dict]]:
    """Reads a table: configurations by device name and key; empty where there is no file.

    Raises:
        ValueError: The file is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        content = None
    devices = content.values() if isinstance(content, dict) else [None]
    if not all(isinstance(table, dict) and all(isinstance(row, dict) for row in table.values()) for table in devices):
        raise ValueError(f"{path}: expected a JSON table of launch sizes; move the file away to start a new one")
    return cast(dict, content)


def _write_entry(path: Path, device_name: str, key: str, entry: dict) -> None:
    """Adds one row to what the file holds by now, which another search may have changed."""
    table = read_table(path)
    table.setdefault(device_name, {})[key] = entry
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _jobs(
    shapes: Sequence[OpShape], device: torch.device, dtypes: Sequence[torch.dtype]
) -> Iterator[tuple[_Job, Callable[[], Sequence[Tensor]]]]:
    """Every pass to tune, with a call that computes what is right."""
    for shape in shapes:
        for dtype in dtypes:
            for subject in subjects(shape, device, dtype):
                scan_call, calls = _recorded(subject), phase_calls(subject)
                for phase in _PHASES:
                    key = launch_table.key(scan_call, backward=phase == "backward")
                    facts = {"op": subject.name, **shape._asdict(), "dtype": str(dtype).removeprefix("torch.")}
                    yield _Job(key, shape, calls[phase], facts | {"phase": phase, "key": key}), _by_torch(calls[phase])


def _by_torch(call: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
    def expected() -> Sequence[Tensor]:
        with use_backend("torch"):
            return call()

    return expected


def _search(
    job: _Job, candidates: Sequence[LaunchConfig], setting: OpSetting, expected: Callable[[], Sequence[Tensor]]
) -> dict[str, Any]:
    """The fastest of the candidates, and how many there were."""
    right = expected()
    before = measure_kernels(job.call, setting)[0]["median"]
    times: dict[int, float] = {}
    failed = refused = 0
    for index, config in enumerate(candidates):
        try:
            with launch_table.forced(config):
                error = _largest_error(job.call(), right)
                fits = error <= _TOLERANCE[getattr(torch, job.facts["dtype"])]  # false for nan
                if fits:
                    times[index] = measure_kernels(job.call, setting)[0]["median"]
        except _failures() as failure:
            _recover(setting.device)
            failed += 1
            _logger.debug("%s: %s fails: %s", job.key, config, failure)
            continue
        if not fits:
            refused += 1
            _logger.error("%s: %s is refused: its result is off by %.1e", job.key, config, error)
    record = {"candidates": len(candidates), "failed": failed, "refused": refused, "before_ms": before}
    if not times:
        _logger.error("%s: none of %d candidates works", job.key, len(candidates))
        return record | {"ms": None, "config": None}
    best = min(times, key=times.__getitem__)
    return record | {"ms": times[best], "config": asdict(candidates[best])}


def _largest_error(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    errors = [relative_error(each, expected) for each, expected in zip(found, right, strict=True)]
    return float(torch.tensor(errors).max())  # nan if one is, unlike max()


def _recover(device: torch.device) -> None:
    """Raises if the failure has left the device unusable, so that no other candidate is blamed for it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _failures() -> tuple[type[Exception], ...]:
    """What a configuration that does not fit the device raises: at compilation, at the launch, for want of memory."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return (RuntimeError,)
    return (RuntimeError, TritonError)


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of the scans that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[ScanCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.vssm.scan.default:
            self.calls.append(ScanCall(*args))
        return func(*args, **(kwargs or {}))


def _recorded(subject: Subject) -> ScanCall:
    """The call that a subject makes, as the kernels receive it."""
    with torch.no_grad(), _Recorder() as recorder:
        subject.call()
    [call] = recorder.calls
    return call
