"""The op as torch sees it: opcheck, compilation, export, autocast, operation count, choice of backend."""

import logging
import sys
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vssm_kernels
from scan_cases import outputs_and_gradients, random_case
from vssm_kernels import backend, directional_scan, scan_torch, use_backend
from vssm_kernels.scan_call import ScanCall


def _inputs(*, requires_grad: bool = False) -> dict:
    torch.manual_seed(1)
    b, l, k, d, n, r = 2, 12, 2, 6, 4, 3
    tensors = {
        "x": torch.randn(b, d, l).transpose(1, 2),  # permuted, as a view of channels-first maps is
        "dt": torch.randn(b, l, k, r),
        "A": -torch.rand(k, d, n),
        "B": torch.randn(b, k, l, n).transpose(1, 2),
        "C": torch.randn(b, l, k, n),
        "D": torch.randn(k, d),
        "dt_weight": torch.randn(k, d, r),
        "dt_bias": torch.randn(k, d),
        "z": torch.randn(b, l, d),
    }
    for tensor in tensors.values():
        tensor.requires_grad_(requires_grad)
    return tensors | {"order": torch.stack([torch.arange(l), torch.arange(l).flip(0)]).int()}


def _op_arguments(inputs: dict) -> tuple:
    tensors = ("x", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias", "z", "order")
    return (*(inputs[name] for name in tensors), None, True, "token", False, True, True, None)


def test_opcheck():
    torch.library.opcheck(torch.ops.vssm.scan.default, _op_arguments(_inputs(requires_grad=True)))
    y, state = torch.ops.vssm.scan(*_op_arguments(_inputs()))
    torch.library.opcheck(torch.ops.vssm.scan_backward.default, (y, state, *_op_arguments(_inputs())))


def test_opcheck_where_tokens_are_contiguous():
    b, k, d, n, l = 2, 2, 3, 4, 9
    matrices = -torch.rand(k, d, n), torch.randn(b, l, k, n), torch.randn(b, l, k, n), torch.randn(k, d)

    def arguments(requires_grad):
        x, dt, z = (torch.randn(b, k, d, l, requires_grad=requires_grad).permute(0, 3, 1, 2) for _ in range(3))
        return (x, dt, *matrices, None, None, z, None, None, True, "token", False, False, False, None)

    assert ScanCall(*arguments(False)).tokens_last
    torch.library.opcheck(torch.ops.vssm.scan.default, arguments(True))
    y, state = torch.ops.vssm.scan(*arguments(False))
    assert y.permute(0, 2, 3, 1).is_contiguous()
    torch.library.opcheck(torch.ops.vssm.scan_backward.default, (y, state, *arguments(False)))


def test_fake_matches_real():
    """Shapes, dtypes and strides on the meta device equal those of a real call, over many argument combinations."""
    for seed in range(1, 40):
        case = random_case(seed)
        real = directional_scan(**case.arguments(case.dtype))
        fake = directional_scan(**case.arguments(case.dtype, "meta"))
        for r, f in zip(*(o if isinstance(o, tuple) else (o,) for o in (real, fake)), strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), seed


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph(compiler):
    compiled = torch.compile(lambda arguments: directional_scan(**arguments) * 2, fullgraph=True, backend=compiler)
    eager = outputs_and_gradients(lambda **a: directional_scan(**a) * 2, _inputs(requires_grad=True))
    result = outputs_and_gradients(lambda **a: compiled(a), _inputs(requires_grad=True))
    assert all(torch.allclose(result[name], eager[name], atol=1e-6) for name in eager)


def test_export_with_dynamic_batch():
    class Scan(torch.nn.Module):
        def forward(self, x, dt, B):
            inputs = _inputs()
            constants = {name: inputs[name] for name in ("A", "D", "dt_weight", "dt_bias", "order")}
            return directional_scan(x, dt, B=B, C=B, **constants)

    inputs, batch = _inputs(), torch.export.Dim("batch")
    program = torch.export.export(
        Scan(), tuple(inputs[name] for name in ("x", "dt", "B")), dynamic_shapes=({0: batch}, {0: batch}, {0: batch})
    )
    assert sum(node.target is torch.ops.vssm.scan.default for node in program.graph.nodes) == 1
    more = [torch.cat([inputs[name]] * 3) for name in ("x", "dt", "B")]
    assert torch.equal(program.module()(*more), Scan()(*more))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_dtypes_alone(dtype):
    """Projections arrive in half precision, A stays float32, and the state is float32."""
    inputs = _inputs()
    for name in ("x", "dt", "B", "C"):
        inputs[name] = inputs[name].to(dtype)
    with torch.autocast("cpu", dtype):
        y, state = directional_scan(**inputs, return_last_state=True)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    wide = {name: t.float() if t.is_floating_point() else t for name, t in inputs.items()}
    assert torch.equal(y, directional_scan(**wide).to(dtype))


def test_flops_follow_the_convention_of_the_field():
    b, l, k, d, n, r = 2, 12, 2, 6, 4, 3
    with FlopCounterMode(display=False) as counter:
        directional_scan(**_inputs())
    assert counter.get_total_flops() == 9 * b * k * l * d * n + 2 * b * k * l * d * r


def test_gradients_of_gradients_are_refused():
    inputs = _inputs(requires_grad=True)
    (gradient,) = torch.autograd.grad(directional_scan(**inputs).sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients are not implemented"):
        gradient.sum().backward()


def test_backend_override(monkeypatch):
    assert "torch" in vssm_kernels.available_backends()
    for attempt in (lambda: use_backend("cuda"), lambda: use_backend("")):
        with pytest.raises(ValueError, match="must be one of auto, torch"):
            attempt()
    monkeypatch.setattr(backend, "available_backends", lambda: ("torch", "triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"), pytest.raises(ValueError, match="triton needs tensors on cuda, got cpu"):
        directional_scan(**_inputs())
    with use_backend("torch"):
        assert backend.backend_for("cpu").__name__ == "vssm_kernels.scan_torch"
    monkeypatch.setenv("VSSM_SCAN_BACKEND", "no-such")
    with pytest.raises(ValueError, match="got 'no-such'"):
        directional_scan(**_inputs())
    with use_backend("torch"):  # what the program says wins over the environment
        directional_scan(**_inputs())


def test_backend_is_read_when_a_compiled_graph_runs(monkeypatch):
    compiled = torch.compile(lambda arguments: directional_scan(**arguments), fullgraph=True, backend="aot_eager")
    compiled(_inputs())
    ran = []
    spy = ModuleType("spy")
    spy.forward = lambda call: ran.append(call) or scan_torch.forward(call)
    monkeypatch.setitem(sys.modules, "spy", spy)
    monkeypatch.setitem(backend._MODULES, "spy", "spy")
    monkeypatch.setattr(backend, "available_backends", lambda: ("torch", "spy"))
    with use_backend("spy"):
        compiled(_inputs())
    assert len(ran) == 1


def test_backend_is_announced_once(monkeypatch, caplog):
    monkeypatch.setattr(backend, "_announced", set())
    with use_backend("torch"), caplog.at_level(logging.INFO, logger="vssm"):
        directional_scan(**_inputs())
        directional_scan(**_inputs())
    assert [record.getMessage() for record in caplog.records] == ["scan backend: torch on cpu"]
