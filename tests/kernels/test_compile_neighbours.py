"""The kernels beside the scan compile for the GPUs they are meant for; on an H100 without spilling registers."""

import os

import pytest

triton = pytest.importorskip("triton", reason="Triton is not on every platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from compiled import stack_bytes  # noqa: E402
from vssm_kernels import causal_conv_triton  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")

H100 = GPUTarget("cuda", 90, 32)
TARGETS = [*(GPUTarget("cuda", capability, 32) for capability in (75, 80, 86, 89, 120)), GPUTarget("hip", "gfx942", 64)]
COUNTS = ("length", "chunks", "rows")
FLOAT32 = ("weight", "bias", "sums")
ALIGNED = [["tt.divisibility", 16]]


def _compile(kernel, target, dtype, warps, **constants):
    """Compiles a kernel for aligned rows, as the launcher does: what is not a pointer is a number, by its name."""
    signature, fixed, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], fixed[name] = "constexpr", constants[name]
        elif name in COUNTS:
            signature[name] = "i32"
        elif name == "eps":
            signature[name] = "fp32"
        else:
            number = name == "width" or name.endswith(("_sample", "_token", "_direction"))
            signature[name] = "i32" if number else "*" + ("fp32" if name in FLOAT32 else dtype)
            attributes[(i,)] = ALIGNED
    source = ASTSource(kernel, signature, fixed, attributes)
    return triton.compile(source, target=target, options={"num_warps": warps})


def _convolutions(target, dtype, **switches):
    for name, config in (("forward", causal_conv_triton.FORWARD), ("backward", causal_conv_triton.BACKWARD)):
        sizes = {"CHUNK": config.chunk, "UNROLL": config.unroll, "BLOCK": config.block}
        vim = {"K": 2, "W": 4, "REVERSED": 0b10, "HAS_BIAS": True, "ACTIVATION": True, **sizes}
        yield _compile(
            getattr(causal_conv_triton, f"conv_{name}_kernel"), target, dtype, config.warps, **vim | switches
        )


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.backend}-{target.arch}")
def test_every_target(target):
    half = "fp16" if target.arch == 75 else "bf16"  # bfloat16 is missing there
    assert all(compiled.asm for compiled in _convolutions(target, half))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_h100_has_registers_enough(dtype, tmp_path):
    for compiled in _convolutions(H100, dtype):
        assert stack_bytes(compiled, tmp_path) == 0


def test_rows_move_8_bytes_a_lane():
    forward, _ = _convolutions(H100, "bf16")
    ptx = forward.asm["ptx"]
    assert "ld.global.v2.b32" in ptx
    assert "st.global.v2.b32" in ptx
    assert "bar.sync" not in ptx  # nothing passes between lanes


@pytest.mark.parametrize(
    "switches",
    [
        {"K": 1, "REVERSED": 1, "HAS_BIAS": False, "ACTIVATION": False},
        {"K": 3, "REVERSED": 0b101, "W": 2},
        {"W": 1, "BLOCK": 16},
    ],
    ids=str,
)
def test_every_switch(switches):
    assert all(compiled.asm for compiled in _convolutions(H100, "fp32", **switches))
