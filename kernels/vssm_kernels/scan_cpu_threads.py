"""Threads for the CPU scan: the OpenMP team that torch computes with, or a pool of Python's own.

After a parallel region the members of an OpenMP team wait for the next one by spinning, for about a millisecond. Other
threads would have to share the cores with them, and a scan comes right after torch's matrix products.
"""

import ctypes
import functools
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any

import torch

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_forked = False
_pool: ThreadPoolExecutor | None = None


def spread(work: Callable[[int, int], None], units: int, threads: int) -> None:
    """Calls ``work(first, last)`` for shares of all units, on up to ``threads`` threads, this one among them.

    ``work`` has to release the interpreter's lock. Any number of threads may call this at once.
    """
    if threads < 2:
        work(0, units)
        return
    shares = deque(pairwise(units * i // threads for i in range(threads + 1)))
    errors: list[BaseException] = []

    def take_shares(_: Any = None) -> None:
        while True:
            try:
                work(*shares.popleft())
            except IndexError:  # nothing left
                return
            except BaseException as error:
                errors.append(error)

    parallel = None if _forked else _openmp()
    if parallel is None:
        others = [_threads().submit(take_shares) for _ in range(threads - 1)]
        take_shares()
        wait(others)
    else:
        parallel(_Body(take_shares), None, torch.get_num_threads(), 0)  # of another size, the team would be formed anew
    if errors:
        raise errors[0]


@functools.cache
def _openmp() -> Any:
    """``GOMP_parallel`` of the runtime that torch has loaded; those of LLVM and Intel have it as well, on Linux."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # another runtime, or another system
        return None
    parallel.argtypes = [_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]  # body, its argument, threads, flags
    parallel.restype = None
    return parallel


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="vssm-scan")
    return _pool


def _after_fork() -> None:
    """Threads do not survive a fork, and an OpenMP team waits for them forever."""
    global _forked, _pool
    _forked, _pool = True, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
