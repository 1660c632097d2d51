"""Time and memory of a call: CUDA events on a GPU, the monotonic clock on the CPU; torch's allocators for memory."""

import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Any

import torch
from torch.autograd.profiler import profile

_MIB = 2**20
_FLUSHED = 4  # times the L2 cache

_logger = logging.getLogger(__name__)


def measure_time(
    call: Callable[[], object], device: torch.device, *, warmup: int, repeats: int, flush: bool = False
) -> dict[str, float]:
    """Times repeated calls after a warm-up.

    Args:
        call: What is timed.
        device: Where it computes, a CUDA device or the CPU.
        warmup: Calls before, not timed.
        repeats: Timed calls, at least 2.
        flush: On a GPU, fill the L2 cache with something else before every call, outside the timed span.

    Returns:
        ``median``, ``p10`` and ``p90`` (10th and 90th percentile) in milliseconds.
    """
    for _ in range(warmup):
        call()
    times = _event_times(call, device, repeats, flush=flush) if device.type == "cuda" else _clock_times(call, repeats)
    deciles = quantiles(times, n=10, method="inclusive")
    return {"median": deciles[4], "p10": deciles[0], "p90": deciles[8]}


def measure_by_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, warmup: int, repeats: int, turns: int = 3
) -> dict[str, dict[str, float]]:
    """Times calls that are to be compared by turns, so that what else the machine does meets all of them.

    Args:
        calls: What is timed, by its name.
        device: Where it computes, a CUDA device or the CPU.
        warmup: Calls before, not timed, of each turn.
        repeats: Timed calls of each turn, at least 2.
        turns: Of each call.

    Returns:
        By name, what `measure_time` does, in the median over the turns.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            found[name].append(measure_time(call, device, warmup=warmup, repeats=repeats))
    return {name: {key: median(each[key] for each in times) for key in times[0]} for name, times in found.items()}


def throughput(times: dict[str, float], batch_size: int) -> dict[str, float | int]:
    """Images a second of a step from its times, which `measure_time` has returned, as records have them.

    Returns:
        ``batch_size``, ``images_per_s`` at the median time, and ``images_per_s_p10`` and ``images_per_s_p90``.
    """
    return {
        "batch_size": batch_size,
        "images_per_s": 1e3 * batch_size / times["median"],
        "images_per_s_p10": 1e3 * batch_size / times["p90"],
        "images_per_s_p90": 1e3 * batch_size / times["p10"],
    }


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    """Captures the kernels that a call launches, on the current stream, which must not be the default one.

    A replay of the graph runs them without the gaps that the host leaves between launches.

    Args:
        call: What is captured; it runs a few times before.

    Returns:
        The graph; ``None``, with a line in the log, if something in the call cannot be captured.
    """
    for _ in range(3):  # what is done once only, such as compiling a kernel, must not be captured
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _logger.warning("no CUDA graph: %s; timing launches from the host", str(error).partition("\n")[0])
        return None
    return graph


def measure_memory(call: Callable[[], object], device: torch.device) -> float:
    """Peak of the tensor memory that one call allocates beyond what is allocated before it.

    On a GPU this is the peak of torch's caching allocator, on the CPU the highest running sum of the allocations and
    releases that torch's allocator reports to the profiler. Both are exact and repeatable, unlike the resident set of
    the process, and neither sees memory taken past torch, such as Python objects and nodes of the autograd graph.

    Args:
        call: What is measured.
        device: Where it computes, a CUDA device or the CPU.

    Returns:
        Peak in MiB.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / _MIB
    return _cpu_peak(call) / _MIB


def _event_times(call: Callable[[], object], device: torch.device, repeats: int, *, flush: bool = False) -> list[float]:
    l2_cache = torch.cuda.get_device_properties(device).L2_cache_size
    filler = torch.empty(_FLUSHED * l2_cache if flush else 0, dtype=torch.uint8, device=device)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize(device)
    for start, end in pairs:
        filler.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in pairs]


def _clock_times(call: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _cpu_peak(call: Callable[[], object]) -> int:
    profiler = profile(profile_memory=True)
    with _silent_stderr():
        profiler.__enter__()
    try:
        call()
    finally:
        with _silent_stderr():
            profiler.__exit__(None, None, None)
    results: Any = profiler.kineto_results  # whose type stub lacks nbytes
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keeps the profiler's own start and stop messages, which no log level turns off, from the terminal."""
    sys.stderr.flush()
    kept = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)
