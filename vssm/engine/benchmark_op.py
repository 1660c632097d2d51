"""Speed and memory of one op alone, of the scan in particular, beside the limits of the device and what others run."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from vssm.engine.compile_ahead import Compilation, compilers
from vssm.engine.op_limits import Limits, measure_limits
from vssm.engine.op_shapes import Anchor, OpShape, Shape
from vssm.engine.op_subjects import PHASES, SubjectsOf, compiled_subjects, log_left_out, phase_calls, subjects
from vssm.engine.records import environment
from vssm.engine.timing import captured, measure_memory, measure_time
from vssm_kernels.backend import backend_name

_logger = logging.getLogger(__name__)


class OpSetting(NamedTuple):
    """How ops are measured.

    Args:
        device: Where to compute.
        dtype: Of the inputs; parameters are float32.
        against: What else to measure, names of the `RIVALS` of an op.
        graph: On a GPU, time replays of a CUDA graph, without the gaps between the launches of the host.
        warmup: Calls before the timed ones.
        repeats: Timed calls.
        processes: How many compile kernels ahead; chosen by cores and the GPU's memory when not given.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    against: Sequence[str] = ()
    graph: bool = True
    warmup: int = 3
    repeats: int = 20
    processes: int | None = None


def benchmark_op(
    shapes: Sequence[OpShape], setting: OpSetting, *, anchors: Mapping[tuple[int, ...], Anchor] | None = None
) -> list[dict]:
    """Times both public functions of the scan, and rivals, on the same random numbers.

    Backward is all that autograd does from the gradient of the result to those of the inputs, with the forward pass
    outside the measured time. Before every timed call on a GPU the L2 cache is filled with something else. Peak memory
    is that of forward with backward, gradients included and inputs not. Speedups and errors are relative to the first
    of ``setting.against``. What does not fit into memory is left out, with a line in the log.

    Args:
        shapes: Sizes and scan orders.
        setting: How to measure.
        anchors: Times measured elsewhere, by `OpShape.sizes`.

    Returns:
        One record per shape and subject: ``op``, the sizes, ``dtype``; ``forward_ms``, ``forward_p10_ms``,
        ``forward_p90_ms``, ``forward_ns_per_token``, ``speedup_forward`` and the same for the other `PHASES`;
        ``forward_bytes``, ``forward_floor_ms``, ``forward_fraction_of_floor`` and the same for ``backward``,
        ``exp_floor_ms``; ``peak_memory_mib``, ``relative_error`` (by norm), ``cuda_graph``, ``copy_gb_per_s``, the
        anchor's times and speedups where there is one, and the environment.
    """
    log_left_out(shapes, setting.device, setting.against)
    records = benchmark_subjects(shapes, subjects, setting, compiled=compiled_subjects(setting.against))
    sizes = [OpShape(*(record[name] for name in OpShape._fields)).sizes for record in records]
    return [record | _beside(record, (anchors or {}).get(found)) for record, found in zip(records, sizes, strict=True)]


def benchmark_subjects(
    shapes: Sequence[Shape], subjects_of: SubjectsOf, setting: OpSetting, *, compiled: Sequence[str]
) -> list[dict]:
    """Times what there is to be measured at each of some shapes, after the kernels have been compiled side by side.

    Args:
        shapes: Sizes.
        subjects_of: What there is at one of them.
        setting: How to measure.
        compiled: Names of the subjects whose kernels Triton compiles.

    Returns:
        Records as of `benchmark_op`, without anchors.
    """
    _compile_ahead(shapes, subjects_of, setting, compiled)
    with side_stream(setting.device):
        limits = measure_limits(setting.device)
        surroundings = {"copy_gb_per_s": limits.copy_gb_per_s} | environment(setting.device)
        records = []
        for shape in tqdm(shapes, desc="measuring", leave=False, disable=not sys.stderr.isatty()):
            records += _benchmark(shape, subjects_of, setting, limits)
        return [record | surroundings for record in records]


def side_stream(device: torch.device) -> AbstractContextManager:
    """A stream on which graphs can be captured: backward runs on the stream of its forward, but never the default."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def measure_kernels(call: Callable[[], object], setting: OpSetting) -> tuple[dict[str, float], bool]:
    """Times as of `measure_time`, with a cold L2 cache, and whether they are those of replays of a graph."""
    graph = captured(call) if setting.graph and setting.device.type == "cuda" else None
    timed = call if graph is None else graph.replay
    times = measure_time(timed, setting.device, warmup=setting.warmup, repeats=setting.repeats, flush=True)
    return times, graph is not None


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what was expected."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def _compile_ahead(
    shapes: Sequence[Shape], subjects_of: SubjectsOf, setting: OpSetting, compiled: Sequence[str]
) -> None:
    """Forward passes first: backward ones need their kernels, too, and find them in the cache by then."""
    if backend_name(setting.device.type) != "triton":
        return
    work = [
        Compilation(shape, subjects_of, op, phase, setting.dtype)
        for phase in ("forward", "backward")
        for shape in shapes
        for op in compiled
    ]
    with compilers(setting.device, setting.processes) as ahead:
        ahead.compile(work)


def _benchmark(shape: Shape, subjects_of: SubjectsOf, setting: OpSetting, limits: Limits) -> list[dict]:
    """One record per subject at one shape."""
    records, results = {}, {}
    for subject in subjects_of(shape, setting.device, setting.dtype, setting.against):
        try:
            with subject.context():
                calls = phase_calls(subject)
                [result] = calls["forward"]()
                times = _measure(calls, setting)
        except torch.OutOfMemoryError:
            _logger.warning("%s: not enough memory at %s; left out", subject.name, shape)
            continue
        facts = {"op": subject.name, **shape._asdict(), "dtype": str(setting.dtype).removeprefix("torch.")}
        described = times | limits.describe(shape.special_functions, subject.inputs, result)
        record = facts | subject.facts | described | _fractions(described)
        records[subject.name] = record | _ns_per_token(record, shape.tokens)
        results[subject.name] = subject.as_tokens(result)
    baseline = next((name for name in setting.against if name in records), None)
    if baseline is None:
        return [record | {"relative_error": None} for record in records.values()]
    return [
        record
        | _speedups(record, records[baseline])
        | {"relative_error": relative_error(results[name], results[baseline])}
        for name, record in records.items()
    ]


def _measure(calls: Mapping[str, Callable[[], object]], setting: OpSetting) -> dict[str, float | bool]:
    device = setting.device
    record = {"peak_memory_mib": measure_memory(calls["forward_backward"], device)}
    graphs = []
    for phase, call in calls.items():
        times, replayed = measure_kernels(call, setting)
        record |= {f"{phase}_ms": times["median"], f"{phase}_p10_ms": times["p10"], f"{phase}_p90_ms": times["p90"]}
        graphs.append(replayed)
    return record | {"cuda_graph": all(graphs)}


def _fractions(record: Mapping) -> dict[str, float]:
    """How much of the time the larger of the limits explains."""
    exps = record["exp_floor_ms"] or 0.0
    return {
        f"{phase}_fraction_of_floor": max(record[f"{phase}_floor_ms"], exps) / record[f"{phase}_ms"]
        for phase in ("forward", "backward")
    }


def _ns_per_token(record: Mapping, tokens: int) -> dict[str, float]:
    """By which lengths can be compared whose total numbers of tokens differ."""
    return {f"{phase}_ns_per_token": 1e6 * record[f"{phase}_ms"] / tokens for phase in PHASES}


def _speedups(record: Mapping, baseline: Mapping) -> dict[str, float]:
    return {f"speedup_{phase}": baseline[f"{phase}_ms"] / record[f"{phase}_ms"] for phase in PHASES}


def _beside(record: Mapping, anchor: Anchor | None) -> dict[str, float | str]:
    """Times measured elsewhere, and how much faster the record is."""
    if anchor is None or anchor.dtype not in (None, record["dtype"]):
        return {}
    times = {"forward": anchor.forward_ms, "backward": anchor.backward_ms}
    return {
        "anchor": anchor.name,
        "anchor_source": anchor.source,
        **{f"anchor_{phase}_ms": time for phase, time in times.items()},
        **{f"speedup_over_anchor_{phase}": time / record[f"{phase}_ms"] for phase, time in times.items()},
    }
