"""The ops in plain operators, as exported programs hold them, against the references in float64."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from scan_cases import TOLERANCE, random_case, relative_error
from vssm_kernels import causal_conv, directional_scan, directional_scan_ref
from vssm_kernels.decompositions import CHUNK, LEVELS, PLAIN, decompose, linear_scan


class Plain(TorchDispatchMode):
    """Calls what stands for an op in its place."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return PLAIN.get(function, function)(*args, **(kwargs or {}))


def plain_scan(arguments: dict):
    arguments = {name: each.detach() if isinstance(each, torch.Tensor) else each for name, each in arguments.items()}
    with Plain():
        return directional_scan(**arguments)


@pytest.mark.parametrize("seeds", [range(start, start + 10) for start in range(1, 121, 10)], ids=str)
def test_scan(seeds):
    for seed in seeds:
        case = random_case(seed)
        dtype = torch.float64 if seed % 2 else case.dtype
        results = plain_scan(case.arguments(dtype))
        expected = directional_scan_ref(**case.arguments(torch.float64))
        pairs = zip(*(each if isinstance(each, tuple) else (each,) for each in (results, expected)), strict=True)
        for result, reference in pairs:
            error = relative_error(result.double(), reference.detach())
            assert error < TOLERANCE[result.dtype], f"seed {seed}: off by {error:.1e} in {dtype}: {case.options}"


def test_results_have_the_dtypes_and_shapes_of_the_op():
    for seed in range(1, 40):
        arguments = random_case(seed).arguments(torch.float32)
        results, expected = plain_scan(arguments), directional_scan(**arguments)
        for result, real in zip(*(o if isinstance(o, tuple) else (o,) for o in (results, expected)), strict=True):
            assert (result.dtype, result.shape) == (real.dtype, real.shape), seed


@pytest.mark.parametrize("steps", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK**2, CHUNK**2 + 1, 1000])
def test_linear_scan(steps):
    decay, source = torch.rand(steps, 2, 3, dtype=torch.float64), torch.randn(steps, 2, 3, dtype=torch.float64)
    expected, state = [], torch.zeros(2, 3, dtype=torch.float64)
    for each, added in zip(decay, source, strict=True):
        state = each * state + added
        expected.append(state)
    assert relative_error(linear_scan(decay, source), torch.stack(expected)) < 1e-14


@pytest.mark.parametrize("rate", [1e-6, 1.0, 100.0, 1e4])
def test_neither_fast_nor_slow_decays_overflow(rate):
    """Decays over the whole sequence range from nearly 1 to far below the smallest float32."""
    torch.manual_seed(0)
    l, d = 2000, 4
    x, dt = torch.rand(1, l, d) + 1, torch.rand(1, l, 1, d)
    constants = {"A": torch.full((1, d, 1), -rate), "B": torch.ones(1, l, 1, 1), "C": None, "softplus": False}
    result = plain_scan({"x": x, "dt": dt, **constants})
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in constants.items()}
    assert relative_error(result.double(), directional_scan_ref(x.double(), dt.double(), **wide)) < 1e-5


def test_graph_grows_with_the_logarithm_of_the_length():
    def nodes(steps: int) -> int:
        rows = torch.rand(steps, 1)
        return len(make_fx(lambda each: linear_scan(each, each))(rows).graph.nodes)

    counts = [nodes(CHUNK**level) for level in (1, 2, 3, 4)]
    assert counts[3] - counts[2] == counts[2] - counts[1] < 80


class Scan(torch.nn.Module):
    def forward(self, x):
        matrix = torch.ones_like(x[:, :, None, :1])
        return directional_scan(x, x[:, :, None], -torch.ones(1, x.shape[2], 1), matrix, None)


def test_programs_of_any_length_up_to_a_bound():
    rows = torch.randn(2, 20, 3)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC(max=CHUNK**3)}
    program = decompose(torch.export.export(Scan(), (rows,), dynamic_shapes=(sizes,)))
    assert not any("vssm" in str(node.target) for node in program.graph.nodes)
    for batch, steps in ((1, 2), (3, CHUNK), (2, 200), (1, CHUNK**3)):
        rows = torch.randn(batch, steps, 3)
        torch.testing.assert_close(program.module()(rows), Scan()(rows))


def test_programs_of_lengths_without_a_bound():
    program = torch.export.export(Scan(), (torch.randn(2, 20, 3),), dynamic_shapes=({1: torch.export.Dim.DYNAMIC},))
    program = decompose(program)
    for steps in (2, 200, CHUNK**4 + 1):
        rows = torch.randn(2, steps, 3)
        torch.testing.assert_close(program.module()(rows), Scan()(rows))


def test_sequences_that_are_too_long_are_refused():
    rows = torch.ones(1).expand(CHUNK**LEVELS + 1)
    with pytest.raises(ValueError, match=f"at most {CHUNK**LEVELS} steps, got {CHUNK**LEVELS + 1}"):
        linear_scan(rows, rows)


@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_causal_conv(tokens, with_bias, activation):
    x, weight = torch.randn(2, tokens, 5, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    bias = torch.randn(2, 5, dtype=torch.float64) if with_bias else None

    def call() -> torch.Tensor:
        return causal_conv(x, weight, bias, reverse=(False, True), activation=activation)

    with Plain():
        result = call()
    torch.testing.assert_close(result, call())
