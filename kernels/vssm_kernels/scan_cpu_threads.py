"""Threads for the CPU scan: the OpenMP team that torch computes with, or a pool of Python's own.

After a parallel region the members of an OpenMP team wait for the next one by spinning, for about a millisecond. Other
threads would have to share the cores with them, and a scan comes right after torch's matrix products.
"""

import ctypes
import functools
import os
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

_Function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # releases the interpreter's lock
_forked = False
_pool: ThreadPoolExecutor | None = None


def on_threads(function: int, argument: Any, threads: int) -> None:
    """Calls the C function at an address, of one pointer, on several threads at once, this one among them.

    They share the work out among themselves, without the interpreter's lock. Any number of threads may call this at
    once. A team of another size than torch's would be formed anew.
    """
    call = _Function(function)
    parallel = None if _forked or threads < 2 else _openmp()
    if parallel is not None:
        parallel(call, argument, threads, 0)
        return
    others = [_threads().submit(call, argument) for _ in range(threads - 1)]
    call(argument)
    wait(others)


@functools.cache
def _openmp() -> Any:
    """``GOMP_parallel`` of the runtime that torch has loaded; those of LLVM and Intel have it as well, on Linux."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # another runtime, or another system
        return None
    # Function, its argument, threads, flags.
    parallel.argtypes = [_Function, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
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
