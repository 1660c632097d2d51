"""Compiles kernels in several processes before they are timed, since timing them at once would mostly be waiting."""

import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import torch
from tqdm import tqdm

from vssm.engine.op_shapes import Shape
from vssm.engine.op_subjects import SubjectsOf, phase_calls
from vssm_kernels import launch_table, use_backend
from vssm_kernels.launch_table import LaunchConfig

_logger = logging.getLogger(__name__)
_MOST = 16
_MEMORY = 2 * 2**30  # bytes on the GPU that a process takes: its context, and a call of a few samples


class Compilation(NamedTuple):
    """A call that needs kernels compiled.

    Args:
        shape: Its sizes.
        subjects: What there is at a shape.
        op: Name of the subject that is called.
        phase: forward or backward.
        dtype: Of the inputs.
        config: Launch sizes to try; those that the call itself would take when not given.
    """

    shape: Shape
    subjects: SubjectsOf
    op: str
    phase: str
    dtype: torch.dtype
    config: LaunchConfig | None = None


class Compilers:
    """Processes that compile kernels into Triton's cache on disk.

    Args:
        pool: The processes; None to compile nothing ahead.
        device: The GPU.
    """

    def __init__(self, pool: ProcessPoolExecutor | None, device: torch.device) -> None:
        self.pool = pool
        self.device = device

    def compile(self, work: Sequence[Compilation]) -> None:
        """Compiles what the calls need, with a bar; what fails will fail again where it is timed.

        Processes that die, as those of a script do whose body is not under ``if __name__ == "__main__"``, leave the
        compiling to the timed calls, with a line in the log.
        """
        if self.pool is None:
            return
        done = self.pool.map(partial(compile_one, self.device), work)
        try:
            for _ in tqdm(done, total=len(work), desc="compiling", leave=False, disable=not sys.stderr.isatty()):
                pass
        except BrokenProcessPool:
            _logger.warning("processes that compile kernels died: each is compiled when it is first timed")
            self.pool = None


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


def compile_one(device: torch.device, work: Compilation) -> None:
    """Makes a call of a few samples that compiles the kernels of the whole one.

    Launch sizes are those for its batch. All other sizes are its own, since Triton compiles some of the small kernels
    anew where lengths, strides and products with them are multiples of 16.
    """
    small = work.shape._replace(b=_few(work.shape.b))
    tried = nullcontext() if work.config is None else launch_table.forced(work.config)
    with use_backend("auto"), launch_table.of_batch(work.shape.b), suppress(Exception):
        subject = next(each for each in work.subjects(small, device, work.dtype, [work.op]) if each.name == work.op)
        call = phase_calls(subject)[work.phase]
        with tried:
            call()


def _few(batch: int) -> int:
    """The smallest batch that makes the same products multiples of 16, and is 1 only if ``batch`` is."""
    common = math.gcd(batch, 16)
    return 3 if common == 1 < batch else common


def _fitting(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return min(_MOST, os.cpu_count() or 1, free // 2 // _MEMORY)
