"""Uninitialised memory is poison here: an element that a kernel forgets to write fails the comparison."""

import os

import pytest
import torch

from vssm_kernels import available_backends, use_backend


@pytest.fixture(params=[name for name in ("torch", "triton") if name in available_backends()])
def backend_beside_scan(request, device):
    """The implementations of the ops beside the scan, each in turn."""
    if request.param == "triton":
        _needs_interpreter(device)
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def triton_device(device):
    """Every device on which the Triton kernels run here, with them as the backend."""
    _needs_interpreter(device)
    with use_backend("triton"):
        yield device


def _needs_interpreter(device: torch.device) -> None:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("on the CPU, Triton needs its interpreter")


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Makes ``torch.empty`` and its relatives return NaN, so that an element nobody wrote shows."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
