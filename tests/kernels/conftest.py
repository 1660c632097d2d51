"""Uninitialised memory is poison here: an element that a kernel forgets to write fails the comparison."""

import pytest
import torch


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
