"""Neighbourhood attention, plain and as Triton kernels, against sums over written-out neighbours in float64."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from neighbourhood_cases import CASES, written_out
from scan_cases import TOLERANCE, outputs_and_gradients, relative_error
from vssm_kernels import available_backends, neighbourhood_attention, use_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SMALL = {"size": (5, 7), "window": 3, "dilation": (1, 2)}
# Maps of several tiles with tiles of their last few tokens, and remainders that have unlike numbers of tokens.
SHAPES = {
    # b, heads, e, f, size, window, dilation
    "one tile": (3, 2, 5, 5, (5, 7), 3, (1, 1)),
    "window as large as the map": (1, 1, 16, 16, (5, 5), 5, (1, 1)),
    "several tiles": (1, 1, 4, 4, (9, 6), 5, (1, 1)),
    "unlike channels": (2, 2, 3, 20, (4, 5), 3, (1, 1)),
    "dilated": (2, 1, 6, 6, (7, 10), 3, (2, 3)),
    "several blocks in a row": (1, 1, 4, 4, (3, 21), 3, (1, 1)),
    "several tiles of remainders": (1, 1, 4, 4, (11, 6), 3, (2, 1)),
}


@pytest.fixture
def kernels():
    pytest.importorskip("triton", reason="Triton is not on every platform")
    from vssm_kernels import neighbourhood_attention_triton

    return neighbourhood_attention_triton


def _arguments(b, heads, e, f, size, window, *, dtype=torch.float32, values=None, device="cpu", wide=False):
    """Leaves rounded to ``dtype``, values to that of their own if any, in float64 if ``wide``; all views of others."""
    generator = torch.Generator().manual_seed(window + e)
    random = lambda *shape: 2 * torch.rand(*shape, generator=generator) - 1  # noqa: E731
    l, side = size[0] * size[1], 2 * window - 1
    qk = (2 * random(b, l, 2, heads, e)).to(device, dtype)
    v = random(b, l, heads, 2 * f).to(device, values or dtype)[..., ::2]
    tensors = {"q": qk[:, :, 0], "k": qk[:, :, 1], "v": v, "bias": random(heads, side, side).to(device)}
    wide_as = lambda tensor: torch.float64 if wide else tensor.dtype  # noqa: E731
    return {name: t.to(wide_as(t)).detach().requires_grad_() for name, t in tensors.items()}


def _compare(shape, device, *, dtype, values=None):
    *sizes, dilation = SHAPES[shape]
    grid = {"size": sizes[4], "window": sizes[5], "dilation": dilation}
    arguments = _arguments(*sizes, dtype=dtype, values=values, device=device)
    results = outputs_and_gradients(lambda **a: neighbourhood_attention(**a, **grid), arguments)
    wide = _arguments(*sizes, dtype=dtype, values=values, wide=True)
    expected = outputs_and_gradients(lambda **a: written_out(**a, **grid), wide)
    for name, reference in expected.items():
        tolerance = max(TOLERANCE[tensor.dtype] for tensor in arguments.values())
        assert relative_error(results[name], reference) < tolerance, name


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(backend_beside_scan, device, shape, dtype):
    if backend_beside_scan == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts bfloat16 off instead of rounding")
    _compare(shape, device, dtype=dtype)


@pytest.mark.usefixtures("backend_beside_scan", "poisoned_memory")
def test_values_may_be_of_another_dtype(device):
    """States are in float32 where all else is in half precision, turned queries where values are not."""
    _compare("unlike channels", device, dtype=torch.float16, values=torch.float32)
    _compare("unlike channels", device, dtype=torch.float32, values=torch.float16)


@pytest.mark.usefixtures("backend_beside_scan", "poisoned_memory")
@pytest.mark.parametrize(("shape", "side"), [("one tile", 4), ("one tile", 8), ("several blocks in a row", 8)])
def test_sizes_of_launches(shape, side, device, kernels, monkeypatch):
    """Other tiles and blocks; two samples are summed in a program, and the third in the next."""
    config = kernels.LaunchConfig(block=32 if side == 4 else 16, columns=8, sides=(side,))
    for name in ("FORWARD", "QUERIES", "KEYS", "BIASES"):
        monkeypatch.setattr(kernels, name, config)
    monkeypatch.setattr(kernels, "BUSY", 2)
    _compare(shape, device, dtype=torch.float32)


def test_no_samples_have_no_results(backend_beside_scan, device):
    arguments = _arguments(0, 2, 4, 4, (5, 7), 3, device=device)
    results = outputs_and_gradients(lambda **a: neighbourhood_attention(**a, **SMALL), arguments)
    assert results["y"].shape == results["dq"].shape == (0, 35, 2, 4)
    assert not results["dbias"].any()


def test_a_window_of_one_token_is_the_token(backend_beside_scan, device):
    arguments = _arguments(1, 2, 4, 4, (3, 4), 1, device=device)
    results = outputs_and_gradients(
        lambda **a: neighbourhood_attention(**a, size=(3, 4), window=1, dilation=(2, 1)), arguments
    )
    assert torch.allclose(results["y"], arguments["v"].double().cpu())
    assert all(results[name].abs().max() < 1e-5 for name in ("dq", "dk", "dbias"))


@pytest.mark.parametrize("case", CASES)
def test_float64_is_exact(case):
    size, window, dilation = CASES[case]
    grid = {"size": size, "window": window, "dilation": dilation}
    inputs = _arguments(2, 2, 3, 4, size, window, wide=True)
    functions = (lambda **a: neighbourhood_attention(**a, **grid)), (lambda **a: written_out(**a, **grid))
    results, expected = (outputs_and_gradients(function, inputs) for function in functions)
    for name, reference in expected.items():
        torch.testing.assert_close(results[name], reference, rtol=1e-11, atol=1e-13)


def test_same_input_same_bits(backend_beside_scan, device):
    if backend_beside_scan == "torch" and device.type == "cuda":
        pytest.skip("torch sums over tiles with atomics there")
    arguments = _arguments(2, 1, 4, 4, (5, 7), 3, device=device)
    first, second = (
        outputs_and_gradients(lambda **a: neighbourhood_attention(**a, **SMALL), arguments) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_backward_may_run_in_another_backend_than_forward(device):
    if "triton" not in available_backends() or (device.type == "cpu" and not INTERPRETED):
        pytest.skip("without Triton there is no other")
    arguments = _arguments(2, 1, 4, 4, (5, 7), 3, device=device)
    results = []
    for names in (("torch", "torch"), ("torch", "triton"), ("triton", "torch")):
        with use_backend(names[0]):
            y = neighbourhood_attention(**arguments, **SMALL)
        with use_backend(names[1]):
            results.append(torch.autograd.grad(y.square().sum(), list(arguments.values())))
    for gradients in results[1:]:
        assert all(relative_error(mine, other) < 1e-5 for mine, other in zip(gradients, results[0], strict=True))


def test_opcheck():
    arguments = _arguments(2, 1, 4, 6, (5, 7), 3)
    options = ([5, 7], 3, [1, 2])
    inputs = (*arguments.values(), *options)
    torch.library.opcheck(torch.ops.vssm.neighbourhood_attention.default, inputs)
    tensors = [tensor.detach() for tensor in arguments.values()]
    y, lse = torch.ops.vssm.neighbourhood_attention(*tensors, *options)
    torch.library.opcheck(torch.ops.vssm.neighbourhood_attention_backward.default, (y, *tensors, y, lse, *options))


def test_compile_fullgraph():
    function = lambda **a: neighbourhood_attention(**a, **SMALL) * 2  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    arguments = _arguments(2, 1, 4, 4, (5, 7), 3)
    eager, result = outputs_and_gradients(function, arguments), outputs_and_gradients(compiled, arguments)
    assert all(torch.allclose(result[name], eager[name], atol=1e-6) for name in eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_a_product(dtype):
    """Whatever comes, half precision leaves; biases and arithmetic stay in float32."""
    arguments = _arguments(2, 1, 4, 4, (5, 7), 3)
    rounded = {name: t if name == "bias" else t.to(dtype) for name, t in arguments.items()}
    with torch.autocast("cpu", dtype):
        half, wide = (neighbourhood_attention(**each, **SMALL) for each in (rounded, arguments))
        assert half.dtype == F.linear(arguments["q"], torch.ones(1, 4)).dtype
    assert torch.equal(half, wide)
    expected = neighbourhood_attention(**{name: t.float() for name, t in rounded.items()}, **SMALL)
    assert torch.equal(half, expected.to(dtype))


def test_operations_are_those_of_pairs_of_neighbours():
    arguments = _arguments(2, 2, 4, 6, (5, 7), 3)
    with FlopCounterMode(display=False) as counter:
        y = neighbourhood_attention(**arguments, **SMALL)
    assert counter.get_total_flops() == 2 * 2 * 35 * 2 * 9 * (4 + 6)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 2 * 35 * 2 * 9 * (4 + 6)


def test_gradients_of_gradients_are_refused():
    arguments = _arguments(1, 1, 4, 4, (5, 7), 3)
    y = neighbourhood_attention(**arguments, **SMALL)
    (gradient,) = torch.autograd.grad(y.square().sum(), arguments["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients of a fused layer are not implemented"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"q": torch.randn(1, 34, 1, 4)},
            r"q must be \(b, 35, heads, e\) for a map of 5×7 tokens, got \(1, 34, 1, 4\)",
        ),
        ({"k": torch.randn(1, 35, 1, 5)}, r"k must be \(1, 35, 1, 4\) in torch.float32 as q, got \(1, 35, 1, 5\)"),
        ({"k": torch.randn(1, 35, 1, 4).half()}, r"k must be .* as q, got .* in torch.float16"),
        ({"v": torch.randn(1, 35, 2, 4)}, r"v must be \(1, 35, 1\) and channels as q, got \(1, 35, 2, 4\)"),
        ({"bias": torch.randn(1, 5, 3)}, r"bias must be \(1, 5, 5\) for 1 heads and a window of 3, got \(1, 5, 3\)"),
        ({"window": 4}, "expected an odd window and dilations from 1 on, got 4 and 1×2"),
        ({"dilation": (0, 1)}, "expected an odd window and dilations from 1 on, got 3 and 0×1"),
        ({"dilation": (1, 3)}, "a window of 3×3 tokens with dilation 1×3 needs a map of at least 3×9 tokens, got 5×7"),
        ({"window": 7}, r"a window of 7×7 tokens .* needs a map of at least 7×14 tokens, got 5×7; enlarge the images"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"neighbourhood_attention: {message}"):
        neighbourhood_attention(**_arguments(1, 1, 4, 4, (5, 7), 3) | SMALL | changes)
