"""What the Triton kernels do over several tiles and chunks, which the short sequences of test_scan.py seldom have."""

import os

import pytest
import torch

from scan_cases import TOLERANCE, outputs_and_gradients, relative_error
from vssm_kernels import (
    available_backends,
    directional_scan,
    directional_scan_ref,
    selective_scan,
    selective_scan_ref,
    use_backend,
)
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
@pytest.mark.parametrize(
    ("states", "slots", "steps", "channels"),
    [(1, 1, 16, 16), (4, 1, 32, 64), (4, 2, 16, 16), (4, 4, 16, 32), (6, 4, 16, 16), (16, 16, 16, 16)],
)
@pytest.mark.parametrize("chunks", [1, 2])
def test_tiles_slots_and_chunks(triton_device, states, slots, steps, channels, chunks):
    config = LaunchConfig(steps=steps, channels=channels, slots=slots, chunks=chunks, registers=255)
    expected = outputs_and_gradients(directional_scan_ref, _arguments(states, torch.float64, "cpu"))
    with forced(config):
        results = outputs_and_gradients(directional_scan, _arguments(states, torch.float32, triton_device))
    for name, reference in expected.items():
        assert relative_error(results[name], reference) < TOLERANCE[torch.float32], name


@pytest.mark.parametrize(("dtype", "rank"), [(torch.float32, 48), (torch.float16, 98)])
def test_high_ranks_are_several_products(triton_device, dtype, rank):
    usual = _arguments(1, dtype, "cpu")
    usual["dt"] = torch.randn(1, 75, 2, rank).to(dtype)
    usual["dt_weight"] = (torch.randn(2, 5, rank) / rank).to(dtype)

    def arguments(precision: torch.dtype, device: torch.device | str) -> dict:
        dtypes = dict.fromkeys(usual, precision) | {"A": max(precision, torch.float32, key=lambda each: each.itemsize)}
        return {
            name: value.detach().to(device, dtypes[name]).requires_grad_()
            if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in usual.items()
        } | {"order": usual["order"].to(device)}  # fmt: skip

    results = outputs_and_gradients(directional_scan, arguments(dtype, triton_device))
    expected = outputs_and_gradients(directional_scan_ref, arguments(torch.float64, "cpu"))
    for name, reference in expected.items():
        assert relative_error(results[name], reference) < TOLERANCE[dtype], name


def test_half_precision_reads_two_ranks_at_once_where_it_can(triton_device):
    arguments = _arguments(4, torch.float16, triton_device)
    arguments["A"] = arguments["A"].float()
    even = {name: arguments[name].detach()[..., :2].contiguous() for name in ("dt", "dt_weight")}
    odd = {name: arguments[name].detach()[..., [0, 1, 1]].contiguous() for name in ("dt", "dt_weight")}
    odd["dt_weight"][..., 2] = 0
    rest = {name: value for name, value in arguments.items() if name not in even}
    with torch.no_grad():
        expected = directional_scan_ref(**rest, **even)
        for pair in (even, odd):
            results = directional_scan(**rest, **pair)
            assert all(
                relative_error(one, other) < TOLERANCE[torch.float16]
                for one, other in zip(results, expected, strict=True)
            )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("sizes", "chunks"), [((2, 8, 4, 37, 2), 1), ((1, 6, 1, 64, 1), 2), ((1, 20, 2, 50, 1), 2), ((1, 4, 4, 1, 1), 1)]
)
@pytest.mark.parametrize("gated", [False, True])
def test_selective_scan_where_tokens_are_contiguous(triton_device, sizes, chunks, gated):
    b, d, n, l, groups = sizes
    torch.manual_seed(0)
    tensors = {
        "u": torch.randn(b, d, l),
        "delta": torch.randn(b, d, l),
        "A": -torch.rand(d, n),
        "B": torch.randn(b, groups, n, l),
        "C": torch.randn(b, groups, n, l),
        "D": torch.randn(d),
        "delta_bias": torch.randn(d) - 1,
    }
    if gated:
        tensors["z"] = torch.randn(b, d, l)
    options = {"delta_softplus": True, "return_last_state": True}

    def case(dtype, device):
        return {name: each.to(device, dtype).requires_grad_() for name, each in tensors.items()} | options

    expected = outputs_and_gradients(selective_scan_ref, case(torch.float64, "cpu"))
    with forced(LaunchConfig(steps=16, channels=16, slots=1, chunks=chunks, registers=255)):
        results = outputs_and_gradients(selective_scan, case(torch.float32, triton_device))
    for name, reference in expected.items():
        assert relative_error(results[name], reference) < TOLERANCE[torch.float32], name


def test_gradients_are_laid_out_as_the_compiler_is_told(triton_device):
    arguments = _arguments(4, torch.float32, triton_device) | {"return_last_state": False}
    leaves = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    gradients = torch.autograd.grad(directional_scan(**arguments).sum(), leaves)
    assert all(gradient.is_contiguous() for gradient in gradients)


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


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs some 20 GB of GPU memory")
@pytest.mark.gpu
def test_more_elements_than_32_bits_count(device):
    b, l, k, d = 5, 2**20, 1, 512
    x = torch.randn(1, l, d, device=device, dtype=torch.bfloat16).expand(b, l, d).contiguous()
    x[-1] *= 2
    assert x.numel() > 2**31
    arguments = {
        "dt": torch.randn(1, l, k, 4, device=device),
        "B": torch.randn(1, l, k, 1, device=device),
        "C": torch.randn(1, l, k, 1, device=device),
    }
    shared = {"A": -torch.rand(k, d, 1, device=device), "dt_weight": torch.randn(k, d, 4, device=device)}
    config = LaunchConfig(steps=16, channels=32, slots=1, chunks=64, registers=128)
    with torch.no_grad(), use_backend("triton"), forced(config):
        many = {name: tensor.expand(b, -1, -1, -1) for name, tensor in arguments.items()}
        last = directional_scan(x, **many, **shared)[-1]
        alone = directional_scan(x[-1:], **arguments, **shared)[0]
    assert torch.equal(last, alone)
