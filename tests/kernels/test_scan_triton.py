"""What the Triton kernels do over several tiles and chunks, which the short sequences of test_scan.py seldom have."""

import os

import pytest
import torch

from scan_cases import TOLERANCE, outputs_and_gradients, relative_error
from vssm_kernels import available_backends, directional_scan, directional_scan_ref, use_backend
from vssm_kernels.launch_table import LaunchConfig, forced

pytestmark = pytest.mark.skipif("triton" not in available_backends(), reason="needs a GPU or Triton's interpreter")


def _arguments(states: int, dtype: torch.dtype, device: torch.device | str) -> dict:
    """One sample of 75 tokens, five tiles of 16 steps of which the last is cut short, in two directions."""
    torch.manual_seed(states)
    l, k, d, r = 75, 2, 5, 3
    tensors = {
        "x": 1 + torch.randn(1, l, d),
        "dt": torch.randn(1, l, k, r),
        "A": -2 * torch.rand(k, d, states),
        "B": 1 + torch.randn(1, l, k, states),
        "C": 1 + torch.randn(1, l, k, states),
        "D": torch.randn(k, d),
        "dt_weight": torch.randn(k, d, r),
        "dt_bias": torch.randn(k, d) - 2,
        "z": torch.randn(1, l, d),
    }
    leaves = {name: tensor.to(device, dtype).requires_grad_() for name, tensor in tensors.items()}
    order = torch.stack([torch.randperm(l), torch.arange(l).flip(0)]).int()
    return leaves | {"order": order.to(device), "return_last_state": True}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("states", [1, 2, 4])
def test_tiles_and_chunks(device, states, chunks):
    config = LaunchConfig(steps=16, channels=16, chunks=chunks, registers=255)
    expected = outputs_and_gradients(directional_scan_ref, _arguments(states, torch.float64, "cpu"))
    with use_backend("triton"), forced(config):
        results = outputs_and_gradients(directional_scan, _arguments(states, torch.float32, device))
    for name, reference in expected.items():
        assert relative_error(results[name], reference) < TOLERANCE[torch.float32], name


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="on the CPU there are no CUDA graphs")
@pytest.mark.gpu
def test_cuda_graph(device):
    arguments = _arguments(4, torch.float32, device)
    with torch.no_grad(), use_backend("triton"):
        expected = directional_scan(**arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = directional_scan(**arguments)
        graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))
