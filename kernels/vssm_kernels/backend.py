"""Which implementation of the scan runs: the fastest that fits the tensors, or the one that was asked for."""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch

_logger = logging.getLogger("vssm")
_announced: set[tuple[str, str]] = set()
_override: str | None = None


# Modules with forward(call) and backward(call, dy, dstate). They are imported when first used: compilers take time.
_MODULES = {"torch": "vssm_kernels.scan_torch", "cpu": "vssm_kernels.scan_cpu", "triton": "vssm_kernels.launch"}
_FASTEST = {"cpu": "cpu", "cuda": "triton"}  # by type of device; torch everywhere else


@functools.cache
def available_backends() -> tuple[str, ...]:
    """Names that :class:`use_backend` and ``VSSM_SCAN_BACKEND`` accept here, beside ``auto``."""
    names = ["torch"]
    if importlib.util.find_spec("numba") is not None:
        names.append("cpu")
    if importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or _interpreted()):
        names.append("triton")
    return tuple(names)


def backends_on(device_type: str) -> tuple[str, ...]:
    """Those of :func:`available_backends` that run on tensors of ``device_type``."""
    return tuple(
        name
        for name in available_backends()
        if _home(name) in (None, device_type) or (name == "triton" and _interpreted())
    )


def _home(name: str) -> str | None:
    """The type of device that a backend needs; None for one that runs on all."""
    return next((device for device, fastest in _FASTEST.items() if fastest == name), None)


def _interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, step by step, which tests use."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class use_backend:
    """Selects the implementation of the scan, for good or, as a context manager, for a block.

    The choice is read when the op runs, so a compiled graph follows it without being compiled again.

    Args:
        name: ``auto`` (the default: the fastest that fits the device) or one of :func:`available_backends`.

    Raises:
        ValueError: If there is no such backend here.
    """

    def __init__(self, name: str) -> None:
        global _override
        self._before = _override
        _override = _checked(name)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        global _override
        _override = self._before


def backend_for(device_type: str) -> ModuleType:
    """The module that runs a scan on tensors of ``device_type``.

    Raises:
        ValueError: If the backend that was asked for does not run there.
    """
    return importlib.import_module(_MODULES[backend_name(device_type)])


def backend_name(device_type: str) -> str:
    """Which backend runs on tensors of ``device_type``; says so in the log the first time.

    Raises:
        ValueError: If the backend that was asked for does not run there.
    """
    name = _override or _checked(os.environ.get("VSSM_SCAN_BACKEND") or "auto")
    if name == "auto":
        name = _fastest(device_type)
    if name not in backends_on(device_type):
        raise ValueError(
            f"scan backend: {name} needs tensors on {_home(name)}, got {device_type}; use_backend('auto') or 'torch'"
        )
    if (name, device_type) not in _announced:
        _announced.add((name, device_type))
        _announce(name, device_type)
    return name


def _fastest(device_type: str) -> str:
    name = _FASTEST.get(device_type, "torch")
    return name if name in available_backends() and (name != "cpu" or _numba_works()) else "torch"


@functools.cache
def _numba_works() -> bool:
    """Whether numba can be imported: it refuses versions of numpy that it does not know."""
    try:
        importlib.import_module("numba")
    except ImportError as error:
        _logger.warning("scan backend: torch instead of cpu, as numba cannot be imported: %s", error)
        return False
    return True


def _checked(name: str) -> str:
    allowed = ("auto", *available_backends())
    if name not in allowed:
        hint = "; it needs numba: pip install 'vssm[cpu]'" if name == "cpu" else ""
        raise ValueError(f"scan backend must be one of {', '.join(allowed)} here, got {name!r}{hint}")
    return name


def _announce(name: str, device_type: str) -> None:
    if device_type == "cuda" and name == "torch":
        _logger.warning("scan backend: torch on cuda; it is correct, but far from the speed of a fused kernel")
    else:
        _logger.info("scan backend: %s on %s", name, device_type)
