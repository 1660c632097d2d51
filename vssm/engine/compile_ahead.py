"""Compiles candidates for launch sizes in several processes, since timing them one by one would mostly be waiting."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context

import torch

from vssm.engine.benchmark_op import phase_calls
from vssm.engine.op_shapes import OpShape
from vssm.engine.op_subjects import subjects
from vssm_kernels import launch_table, use_backend
from vssm_kernels.launch_table import LaunchConfig

_TOKENS = 144  # of a call that only compiles: a square, of several tiles
_MOST = 16
_MEMORY = 2**30  # bytes on the GPU that a process takes


class Compilers:
    """Processes that compile kernels into Triton's cache on disk.

    Args:
        pool: The processes; None to compile nothing ahead.
        device: The GPU.
    """

    def __init__(self, pool: ProcessPoolExecutor | None, device: torch.device) -> None:
        self.pool = pool
        self.device = device

    def compile(
        self, shape: OpShape, *, op: str, phase: str, dtype: torch.dtype, configs: Sequence[LaunchConfig]
    ) -> None:
        """Compiles what a call needs with each of the sizes; what fails will fail again where it is timed.

        Args:
            shape: Sizes of the call.
            op: Name of the function, as `subjects` has it.
            phase: forward or backward.
            dtype: Of the inputs.
            configs: Launch sizes.
        """
        if self.pool is not None:
            run = partial(compile_one, shape, op, phase, dtype, self.device)
            list(self.pool.map(run, configs))


@contextmanager
def compilers(device: torch.device, processes: int | None = None) -> Iterator[Compilers]:
    """Starts the processes, and ends them after the block.

    Args:
        device: The GPU.
        processes: How many; by default one per core, up to 16 and as the GPU's free memory allows.
    """
    if processes is None:
        processes = _fitting(device)
    if processes < 2:
        yield Compilers(None, device)
        return
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))  # a GPU's state survives no fork
    try:
        yield Compilers(pool, device)
    finally:
        pool.shutdown(cancel_futures=True)


def compile_one(
    shape: OpShape, op: str, phase: str, dtype: torch.dtype, device: torch.device, config: LaunchConfig
) -> None:
    """Makes the smallest call that compiles the same kernels: they do not depend on batch and length."""
    small = shape._replace(b=1, l=min(shape.l, _TOKENS))
    with use_backend("auto"), suppress(Exception):
        [subject] = [each for each in subjects(small, device, dtype) if each.name == op]
        call = phase_calls(subject)[phase]
        with launch_table.forced(config):
            call()


def _fitting(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return min(_MOST, os.cpu_count() or 1, free // 2 // _MEMORY)
