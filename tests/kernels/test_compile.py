"""Every kernel compiles for the GPUs it is meant for, which needs no GPU; on an H100 without spilling registers."""

import os

import pytest

triton = pytest.importorskip("triton", reason="Triton is not on every platform")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vssm_kernels import scan_triton  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")

NVIDIA = [GPUTarget("cuda", capability, 32) for capability in (75, 80, 86, 89, 90, 120)]
TARGETS = [*NVIDIA, GPUTarget("hip", "gfx942", 64)]

VIM = {"width": 384, "directions": 2, "N": 16, "RANK": 12, "UNROLL": 2}
VMAMBA = {"width": 96, "directions": 4, "N": 1, "RANK": 6, "UNROLL": 4}
EVERYTHING = {"B_PER_TOKEN": False, "C_PER_TOKEN": False, "HAS_GAP": True, "CHAIN": True, "STEP_PARAMS": True}
INTEGERS = {"order": "i32", "gap": "i32"}
HALF = ("x", "dt", "B", "C", "z", "y", "dy", "dx", "draw", "dz", "parts", "out")
COUNTS = ("sequences", "directions", "tokens", "steps", "length", "chunk", "chunks", "batch", "rows", "width")


def _compile(kernel, target, half, **constants):
    """Compiles a kernel: pointers by their names, numbers as integers, ``constants`` as they are."""
    signature, fixed = {}, {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], fixed[name] = "constexpr", constants[name]
        elif name.endswith("_sample") or name in (*COUNTS, "unaligned"):
            signature[name] = "i32"
        else:
            signature[name] = "*" + INTEGERS.get(name, half if name in HALF else "fp32")
    return triton.compile(ASTSource(kernel, signature, fixed), target=target, options={"num_warps": 1, "num_stages": 1})


def _constants(model, **switches):
    row = model["directions"] * (model["RANK"] + 2 * model["N"])
    strides = {f"{name}_{axis}": row for name in ("dt", "B", "C") for axis in ("token", "direction")}
    wide = {f"{name}_token": model["width"] for name in ("x", "dy", "z")}
    return {
        **model, **strides, **wide, "x_direction": 0, "dy_direction": 0, "z_direction": 0, "LOW_RANK": True,
        "B_PER_TOKEN": True, "C_PER_TOKEN": True, "HAS_GAP": False, "SOFTPLUS": True, "CHAIN": False,
        "STEP_PARAMS": False, "STATES": triton.next_power_of_2(model["N"]), "BLOCK": 32,
        "RANKS": triton.next_power_of_2(model["RANK"]), "PRECISE": False, "INDEX": tl.int32, **switches,
    }  # fmt: skip


def _forward(target, half, model, **switches):
    modes = {"HAS_START": True, "WRITE_Y": True, "WRITE_SAVED": False, "WRITE_ENDS": True}
    constants = _constants(model, NVIDIA=target.backend == "cuda", **modes | switches)
    return _compile(scan_triton.scan_forward_kernel, target, half, **constants)


def _adjoint(target, half, model, **switches):
    modes = {"HAS_LATER": True, "GATED": True, "ONLY_EARLIER": False}
    constants = _constants(model, NVIDIA=target.backend == "cuda", **modes | switches)
    return _compile(scan_triton.scan_adjoint_kernel, target, half, **constants)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.backend}-{target.arch}")
def test_every_target(target):
    half = "fp16" if target.arch == 75 else "bf16"  # bfloat16 is missing there
    assert _forward(target, half, VIM).asm
    assert _adjoint(target, half, VIM | {"UNROLL": 1}).asm


@pytest.mark.parametrize("model", [VIM, VMAMBA], ids=["vim", "vmamba"])
def test_lanes_are_channels(model):
    """The forward kernel sums over states and ranks inside a thread: not one shuffle."""
    target = GPUTarget("cuda", 90, 32)
    assert "shfl" not in _forward(target, "bf16", model, HAS_START=False, WRITE_ENDS=False).asm["ptx"]


@pytest.mark.parametrize(
    "switches",
    [
        EVERYTHING,
        EVERYTHING | {"LOW_RANK": False, "RANK": 1, "RANKS": 1, "SOFTPLUS": False, "INDEX": tl.int64},
        {"PRECISE": True, "N": 64, "STATES": 64, "UNROLL": 1},
        {"WRITE_Y": False, "WRITE_SAVED": True, "WRITE_ENDS": False, "HAS_START": False},
    ],
    ids=["every switch", "full rank", "many states", "states only"],
)
def test_every_switch(switches):
    target = GPUTarget("cuda", 90, 32)
    backward = {name: value for name, value in switches.items() if not name.startswith(("WRITE", "HAS_START"))}
    assert _forward(target, "fp32", VMAMBA, **switches).asm
    assert _adjoint(target, "fp32", VMAMBA, **backward).asm
    assert _adjoint(target, "fp32", VMAMBA, **backward | {"ONLY_EARLIER": True}).asm


@pytest.mark.parametrize("reverse", [False, True])
def test_carry(reverse):
    constants = {
        "width": 96,
        "N": 3,
        "HAS_FIRST": reverse,
        "REVERSE": reverse,
        "STATES": 4,
        "BLOCK": 32,
        "NVIDIA": True,
    }
    assert _compile(scan_triton.carry_kernel, GPUTarget("cuda", 90, 32), "bf16", **constants).asm


def test_merge():
    assert _compile(scan_triton.merge_kernel, GPUTarget("cuda", 90, 32), "bf16", GATED=True, ROWS=16, BLOCK=128).asm
