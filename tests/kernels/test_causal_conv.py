"""The causal convolutions, plain and as Triton kernels, against a sum of shifted products in float64."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from scan_cases import TOLERANCE, outputs_and_gradients, relative_error
from vssm_kernels import available_backends, causal_conv, causal_conv_torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
VIM = (False, True)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of four tokens, so that short sequences have several, some of them without a token of their own."""
    if "triton" in available_backends():
        from vssm_kernels import causal_conv_triton as kernels

        config = kernels.LaunchConfig(block=16, chunk=4, unroll=2, warps=1)
        monkeypatch.setattr(kernels, "FORWARD", config)
        monkeypatch.setattr(kernels, "BACKWARD", config)


def _written_out(x, weight, bias, *, reverse, activation):
    directions = []
    for i, backwards in enumerate(reverse):
        taps, reach = weight[i], weight.shape[-1] - 1
        sequence = F.pad(x.flip(1) if backwards else x, (0, 0, reach, 0))
        y = sum(taps[:, j] * sequence[:, j : j + x.shape[1]] for j in range(reach + 1))
        y = y if bias is None else y + bias[i]
        directions.append(y.flip(1) if backwards else y)
    y = torch.stack(directions, dim=2)
    return F.silu(y) if activation else y


def _arguments(b, l, d, w, *, reverse, bias=True, dtype=torch.float32, device="cpu", wide=False, strided=False):
    """Leaves rounded to ``dtype`` (parameters to float32), in float64 if ``wide``; x a view of a wider tensor."""
    generator = torch.Generator().manual_seed(l + d)
    random = lambda *shape: torch.rand(*shape, generator=generator) + 0.25  # noqa: E731  sums must not cancel
    x = (random(b, l, 2 * d) * 2 - 1).to(device, dtype)
    x = x[..., ::2] if strided else x[..., d:]
    parameters = random(len(reverse), d, w).to(device), random(len(reverse), d).to(device)
    tensors = {"x": x, "weight": parameters[0], "bias": parameters[1] if bias else None}
    tensors = {name: t.to(torch.float64 if wide else t.dtype) for name, t in tensors.items() if t is not None}
    return {"bias": None} | {name: t.detach().requires_grad_() for name, t in tensors.items()}


CASES = [
    # b, l, d, w, directions
    (2, 1, 5, 4, VIM),
    (1, 3, 16, 4, VIM),
    (2, 9, 20, 4, VIM),
    (1, 13, 3, 3, (True,)),
    (2, 8, 17, 2, (False, False, True)),
    (1, 6, 4, 1, VIM),
]


@pytest.mark.usefixtures("poisoned_memory", "small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(backend_beside_scan, device, case, dtype, monkeypatch):
    if backend_beside_scan == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts bfloat16 off instead of rounding")
    *shape, reverse = case
    monkeypatch.setattr(causal_conv_torch, "SMALL", 40)  # both ways of the plain implementation
    for activation, bias, strided in ((True, True, False), (False, False, True)):
        options = {"reverse": reverse, "bias": bias, "dtype": dtype, "strided": strided}
        function = lambda run: lambda **a: run(**a, reverse=reverse, activation=activation)  # noqa: B023, E731
        arguments = _arguments(*shape, **options, device=device)
        results = outputs_and_gradients(function(causal_conv), arguments)
        expected = outputs_and_gradients(function(_written_out), _arguments(*shape, **options, wide=True))
        for name, reference in expected.items():
            leaf = arguments.get(name.removeprefix("d"))
            tolerance = TOLERANCE[dtype if leaf is None else leaf.dtype]
            assert relative_error(results[name], reference) < tolerance, (name, activation)
        assert causal_conv(**arguments, reverse=reverse, activation=activation).is_contiguous()


@pytest.mark.parametrize("size", ["shifted sums", "convolution"])
def test_float64_is_exact(size, monkeypatch):
    monkeypatch.setattr(causal_conv_torch, "SMALL", 0 if size == "convolution" else 1 << 20)
    function = lambda run: lambda **a: run(**a, reverse=VIM, activation=True)  # noqa: E731
    inputs = _arguments(2, 11, 6, 4, reverse=VIM, wide=True)
    results, expected = (outputs_and_gradients(function(run), inputs) for run in (causal_conv, _written_out))
    assert all(relative_error(results[name], expected[name]) < TOLERANCE[torch.float64] for name in expected)


def test_same_input_same_bits(backend_beside_scan, device):
    arguments = _arguments(2, 9, 20, 4, reverse=VIM, device=device)
    function = lambda **a: causal_conv(**a, reverse=VIM, activation=True)  # noqa: E731
    first, second = (outputs_and_gradients(function, arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_opcheck():
    arguments = _arguments(2, 7, 6, 4, reverse=VIM)
    inputs = (*(arguments[name] for name in ("x", "weight", "bias")), list(VIM), True)
    torch.library.opcheck(torch.ops.vssm.causal_conv.default, inputs)
    inputs = (*(tensor.detach() for tensor in inputs[:3]), *inputs[3:])
    dy = torch.ops.vssm.causal_conv(*inputs)
    torch.library.opcheck(torch.ops.vssm.causal_conv_backward.default, (dy, *inputs))


def test_compile_fullgraph():
    function = lambda **a: causal_conv(**a, reverse=VIM, activation=True) * 2  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    arguments = _arguments(2, 7, 6, 4, reverse=VIM)
    eager, result = outputs_and_gradients(function, arguments), outputs_and_gradients(compiled, arguments)
    assert all(torch.allclose(result[name], eager[name], atol=1e-6) for name in eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_a_convolution(dtype):
    """Whatever comes, half precision leaves; parameters and arithmetic stay in float32."""
    arguments = _arguments(2, 7, 6, 4, reverse=VIM)
    with torch.autocast("cpu", dtype):
        half, wide = (
            causal_conv(**arguments | {"x": x}, reverse=VIM) for x in (arguments["x"].to(dtype), arguments["x"])
        )
        assert half.dtype == F.conv1d(arguments["x"].mT, arguments["weight"][0, :, None], groups=6).dtype
    assert torch.equal(half, wide)
    expected = causal_conv(**arguments | {"x": arguments["x"].to(dtype).float()}, reverse=VIM)
    assert torch.equal(half, expected.to(dtype))


def test_operations_are_counted_as_those_of_convolutions():
    arguments = _arguments(2, 7, 6, 4, reverse=VIM)
    with FlopCounterMode(display=False) as counter:
        y = causal_conv(**arguments, reverse=VIM)
    assert counter.get_total_flops() == 2 * 2 * 7 * 2 * 6 * 4
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 2 * 7 * 2 * 6 * 4


def test_gradients_of_gradients_are_refused():
    arguments = _arguments(1, 5, 3, 4, reverse=VIM)
    y = causal_conv(**arguments, reverse=VIM, activation=True)
    (gradient,) = torch.autograd.grad(y.sum(), arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients of a fused layer are not implemented"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(5, 3)}, r"x must be \(b, l, d\), got \(5, 3\)"),
        ({"weight": torch.randn(1, 3, 4)}, r"weight must be \(2, 3, w\) for 2 directions and 3 channels"),
        ({"weight": torch.randn(2, 3, 0)}, r"weight must be \(2, 3, w\) .*got \(2, 3, 0\)"),
        ({"bias": torch.randn(3)}, r"bias must be \(2, 3\), got \(3,\)"),
    ],
)
def test_wrong_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"causal_conv: {message}"):
        causal_conv(**_arguments(1, 5, 3, 4, reverse=VIM) | changes, reverse=VIM)
