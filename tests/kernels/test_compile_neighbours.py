"""The kernels beside the scan compile for the GPUs they are meant for; on an H100 without spilling registers."""

import os

import pytest

pytest.importorskip("triton", reason="Triton is not on every platform")

from compiled import H100, TARGETS, compile_kernel, stack_bytes
from vssm_kernels import causal_conv_triton

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")

STRIDES = ("_sample", "_token", "_direction")


def _type_of(name: str, dtype: str) -> str:
    if name in ("width", "length", "chunks") or name.endswith(STRIDES):
        return "i32"
    return "*" + ("fp32" if name in ("weight", "bias", "sums") else dtype)


def _convolutions(target, dtype, **switches):
    for name, config in (("forward", causal_conv_triton.FORWARD), ("backward", causal_conv_triton.BACKWARD)):
        sizes = {"CHUNK": config.chunk, "UNROLL": config.unroll, "BLOCK": config.block}
        vim = {"K": 2, "W": 4, "REVERSED": 0b10, "HAS_BIAS": True, "ACTIVATION": True, **sizes}
        kernel = getattr(causal_conv_triton, f"conv_{name}_kernel")
        yield compile_kernel(
            kernel,
            target,
            vim | switches,
            lambda argument: _type_of(argument, dtype),
            multiples_of_16=("width", *(p.name for p in kernel.params if p.name.endswith(STRIDES))),  # as in any model
            num_warps=config.warps,
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
