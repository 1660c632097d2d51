"""Compiling candidates ahead of timing them: small calls of the same kernels, in several processes."""

import pytest
import torch

from vssm.engine.compile_ahead import compile_one, compilers
from vssm.engine.op_shapes import OpShape
from vssm_kernels import launch_table, scan_torch
from vssm_kernels.launch_table import LaunchConfig

CPU = torch.device("cpu")
SHAPE = OpShape(64, 4, 8, 2, 3136, 2, "cross")
CONFIG = LaunchConfig(steps=32, channels=16, slots=2, chunks=5, registers=99)


@pytest.fixture
def seen(monkeypatch) -> list:
    """Batch, tokens and forced sizes of every backward pass."""
    calls = []
    backward = scan_torch.backward

    def recorded(call, dy, dstate):
        calls.append((call.batch, call.tokens, launch_table.launch_config(call, backward=True)))
        return backward(call, dy, dstate)

    monkeypatch.setattr(scan_torch, "backward", recorded)
    return calls


def test_a_small_call_with_the_sizes(seen):
    compile_one(SHAPE, "directional_scan", "backward", torch.float64, CPU, CONFIG)
    assert seen == [(1, 144, CONFIG)]


def test_failures_are_left_to_the_search(monkeypatch):
    def fails(*_):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(scan_torch, "forward", fails)
    compile_one(SHAPE, "directional_scan", "forward", torch.float64, CPU, CONFIG)


@pytest.mark.slow
def test_processes_compile():
    with compilers(CPU, 2) as ahead:
        ahead.compile(SHAPE, op="selective_scan", phase="forward", dtype=torch.float64, configs=[CONFIG, CONFIG])


def test_no_processes_without_a_gpu():
    with compilers(CPU) as ahead:
        assert ahead.pool is None
