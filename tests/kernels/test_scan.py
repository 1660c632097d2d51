"""Every implementation of the scan against the references in float64: result, last state and all gradients."""

import importlib
import os

import pytest
import torch

from scan_cases import TOLERANCE, Case, outputs_and_gradients, random_case, relative_error
from vssm_kernels import (
    available_backends,
    directional_scan,
    directional_scan_ref,
    scan_torch,
    selective_scan,
    selective_scan_ref,
    use_backend,
)
from vssm_kernels.launch_table import LaunchConfig, forced

BACKENDS = available_backends()


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    if request.param == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("on the CPU, Triton needs its interpreter")
    if request.param == "cpu" and device.type != "cpu":
        pytest.skip("compiled for the CPU")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=["whole", "in pieces"])
def sequences(request, monkeypatch):
    """Test sequences are short enough to be scanned in one go; the other setting cuts them into segments and chunks."""
    pieces = request.param == "in pieces"
    monkeypatch.setattr(scan_torch, "SEGMENT_ELEMENTS", 3000 if pieces else scan_torch.SEGMENT_ELEMENTS)
    monkeypatch.setattr(scan_torch, "WIDE_STEP", 1 << 30 if pieces else 1)
    if "cpu" in BACKENDS:
        scan_cpu = importlib.import_module("vssm_kernels.scan_cpu")
        monkeypatch.setattr(scan_cpu, "CHUNK", 5 if pieces else 4000)
    chunks = 1000 if pieces else 1  # as many as there are tiles
    with forced(LaunchConfig(steps=16, channels=16, slots=4, chunks=chunks, registers=255)):
        yield


def _runs(seed: int, case: Case, backend: str, device: torch.device) -> bool:
    """Whether to run a case: Triton compiles nearly every one anew, some seconds each, and its interpreter is slow.

    The interpreter takes some 50 ms for a state of a tile, and knows no products in bfloat16.
    """
    if backend != "triton":
        return True
    if device.type == "cuda":
        return seed % 5 == 0
    batch, tokens = case.tensors["x"].shape[:2]
    sets, _, states = case.tensors["A"].shape
    return batch * sets * states * tokens <= 150 and case.dtype != torch.bfloat16


@pytest.mark.usefixtures("poisoned_memory", "sequences")
@pytest.mark.parametrize("first", range(0, 200, 25))
def test_random_arguments(backend, device, first):
    for seed in range(first, first + 25):
        case = random_case(seed)
        if not _runs(seed, case, backend, device):
            continue
        arguments = case.arguments(case.dtype, device)
        results = outputs_and_gradients(directional_scan, arguments)
        expected = outputs_and_gradients(directional_scan_ref, case.arguments(torch.float64))
        for name, reference in expected.items():
            dtype = case.dtype_of(name, arguments)
            error = relative_error(results[name], reference)
            assert error < TOLERANCE[dtype], f"seed {seed}: {name} is off by {error:.1e} in {dtype}: {case.options}"


def _selective_case(seed: int, dtype: torch.dtype, device: torch.device) -> dict:
    torch.manual_seed(seed)
    b, d, n, l = [(2, 6, 3, 1), (1, 8, 16, 37), (3, 4, 1, 300), (2, 12, 4, 50)][seed % 4]
    groups = [1, 2, 4, 2][seed % 4]
    grouped, constant = torch.randn(b, groups, n, l), torch.randn(d, n)
    arguments = {
        "u": torch.randn(b, d, l),
        "delta": torch.rand(b, d, l) if seed % 3 else torch.rand(b, l, d).transpose(1, 2),
        "A": -torch.rand(d, n),
        "B": [grouped, grouped, constant, torch.randn(b, n, l) if groups == 1 else grouped][seed % 4],
        "C": [torch.randn(b, groups, n, l), constant, torch.randn(b, groups, n, l), constant][seed % 4],
        "D": torch.randn(d) if seed % 2 else None,
        "z": torch.randn(b, d, l) if seed % 5 < 3 else None,
        "delta_bias": torch.randn(d) if seed % 3 else None,
    }
    arguments = {k: None if v is None else v.to(device, dtype).requires_grad_() for k, v in arguments.items()}
    return arguments | {"delta_softplus": bool(seed % 3), "return_last_state": seed % 2 == 0}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("seed", range(12))
def test_selective_scan(backend, device, seed):
    if backend == "triton" and device.type == "cpu" and seed >= 2:
        return  # what differs from directional_scan is a change of layout, the same for every backend
    results = outputs_and_gradients(selective_scan, _selective_case(seed, torch.float32, device))
    expected = outputs_and_gradients(selective_scan_ref, _selective_case(seed, torch.float64, "cpu"))
    for name, reference in expected.items():
        assert relative_error(results[name], reference) < TOLERANCE[torch.float32], name


def test_references_agree():
    """The two references share only the recurrence; on one raster direction they compute the same thing."""
    case = _selective_case(1, torch.float64, "cpu") | {"B": torch.randn(1, 16, 37).double(), "return_last_state": False}
    rows = {name: case[name].transpose(1, 2)[:, :, None] for name in ("u", "delta", "B")}
    y = directional_scan_ref(
        rows["u"], rows["delta"], case["A"][None], rows["B"], case["C"][None], case["D"][None],
        dt_bias=case["delta_bias"][None], z=case["z"].transpose(1, 2),
    )  # fmt: skip
    assert relative_error(y.transpose(1, 2).detach(), selective_scan_ref(**case).detach()) < 1e-14


def test_reference_against_a_written_out_recurrence():
    """One channel, two states, three tokens, backwards: computed by hand with numbers."""
    x, step, A = [0.5, -1.0, 2.0], [0.1, 0.2, 0.3], [-1.0, -2.0]
    B, C = [[1.0, 2.0], [0.5, -1.0], [3.0, 1.0]], [[1.0, 1.0], [2.0, 0.0], [0.0, 1.0]]
    state, expected = [0.0, 0.0], [0.0] * 3
    for token in (2, 1, 0):
        for i in range(2):
            state[i] = (
                float(torch.tensor(step[token] * A[i]).double().exp()) * state[i] + step[token] * B[token][i] * x[token]
            )
        expected[token] = sum(c * h for c, h in zip(C[token], state, strict=True)) + 0.25 * x[token]
    tensor = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    y = directional_scan_ref(
        tensor(x)[None, :, None], tensor(step)[None, :, None, None], tensor(A)[None, None], tensor(B)[None, :, None],
        tensor(C)[None, :, None], tensor([[0.25]]), softplus=False, order=torch.tensor([[2, 1, 0]]),
    )  # fmt: skip
    assert torch.allclose(y.flatten(), tensor(expected), rtol=1e-6)


def test_gap_is_what_zero_tokens_do(device):
    """Dropping tokens of zeros and telling the gap leaves the kept tokens' results as they were."""
    b, l, k, d, n = 2, 40, 2, 6, 4
    dropped = torch.rand(b, l, device=device) < 0.4
    x = torch.randn(b, l, d, device=device).masked_fill(dropped[..., None], 0)
    dt = torch.randn(b, l, k, d, device=device).masked_fill(dropped[..., None, None], 0)
    A, B, C = -torch.rand(k, d, n, device=device), *torch.randn(2, b, l, k, n, device=device)
    bias = torch.randn(k, d, device=device)
    order = torch.stack([torch.arange(l), torch.arange(l).flip(0)]).to(device)
    full = directional_scan(x, dt, A, B, C, dt_bias=bias, order=order, merge=False)
    for sample in range(b):
        kept = [[token for token in row.tolist() if not dropped[sample, token]] for row in order]
        gaps = [_gaps(row.tolist(), dropped[sample].tolist()) for row in order]
        one = slice(sample, sample + 1)
        y = directional_scan(
            x[one], dt[one], A, B[one], C[one], dt_bias=bias, merge=False,
            order=torch.tensor(kept, device=device), gap=torch.tensor(gaps, device=device),
        )  # fmt: skip
        visited = ~dropped[sample]
        assert relative_error(y[0, visited].double(), full[sample, visited].double()) < 1e-6
        assert not y[0, ~visited].any()


def _gaps(row: list[int], dropped: list[bool]) -> list[int]:
    gaps, gap = [], 0
    for token in row:
        if dropped[token]:
            gap += 1
        else:
            gaps.append(gap)
            gap = 0
    return gaps


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [1, 15, 16, 31, 32, 33, 300, 1000])
def test_linear_scan(steps, reverse):
    decay, state = torch.rand(steps, 2, 3, dtype=torch.float64), torch.randn(steps, 2, 3, dtype=torch.float64)
    expected = list(state.clone().flip(0) if reverse else state.clone())
    decays = decay.flip(0) if reverse else decay
    for s in range(1, steps):
        expected[s] = expected[s] + decays[s] * expected[s - 1]
    expected = torch.stack(expected).flip(0) if reverse else torch.stack(expected)
    scan_torch.linear_scan(decay, state, reverse=reverse)
    assert relative_error(state, expected) < 1e-14


def test_same_input_same_bits(backend, device):
    case = random_case(5)
    first, second = (outputs_and_gradients(directional_scan, case.arguments(case.dtype, device)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
