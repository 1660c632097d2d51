"""Every kernel compiles for the GPUs it is meant for, which needs no GPU; on an H100 forward passes spill nothing."""

import os
import re

import pytest

pytest.importorskip("triton", reason="Triton is not on every platform")

import triton.language as tl

from compiled import H100, TARGETS, compile_kernel, stack_bytes
from vssm_kernels import scan_triton

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")

VIM = {"PARTS": 1, "ONE_STATE": False, "UNROLL": 2}
VMAMBA = {"PARTS": 1, "ONE_STATE": True, "UNROLL": 1}
FOUR_WARPS = {"SLOTS": 4, "LOG_SLOTS": 2}
A_STATE_A_WARP = {"SLOTS": 16, "LOG_SLOTS": 4, "ONE_STATE": True, "UNROLL": 1}
EVERYTHING = {"B_PER_TOKEN": False, "C_PER_TOKEN": False, "HAS_GAP": True, "CHAIN": True, "FULL": False, "MASKED": True}
USUAL = {
    "TOKENS_LAST": False, "LOW_RANK": True, "TWO_A_WORD": True, "HALF_DOT": True, "SOFTPLUS": True, "HAS_BIAS": True,
    "HAS_GAP": False, "HAS_SKIP": True, "CHAIN": False, "SHARED_X": True, "B_PER_TOKEN": True, "C_PER_TOKEN": True,
    "STEPS": 16, "LOG_STEPS": 4, "CHANNELS": 32, "SLOTS": 1, "LOG_SLOTS": 0, "FULL": True, "MASKED": False,
    "PRECISE": False, "INDEX": tl.int32,
}  # fmt: skip
SELECTIVE = {"TOKENS_LAST": True, "LOW_RANK": False, "TWO_A_WORD": False, "HALF_DOT": False, "SHARED_X": False}
PLAIN_FLOAT32 = {"TWO_A_WORD": False, "HALF_DOT": False, "PRECISE": True, "EXACT_DOT": True}
INTEGERS = ("places", "order", "gap")
HALF = ("x", "dt", "z", "y", "dy", "dx", "draw", "ddt", "matrix", "parts", "out", "dz")


NUMBERS = (
    "samples", "sequences", "chained", "length", "padded", "chunk", "chunks", "walks", "width", "N", "rank", "tables",
    "unaligned", "steps", "blocks", "columns", "directions", "rows_each",
)  # fmt: skip


def _compile(kernel, target, half, constants, *, numbers=NUMBERS, **options):
    def type_of(name):
        if name in numbers or re.search(r"_(sample|token|direction|state|stride|row|tables)$", name):
            return "i32"
        return "*" + ("i32" if name in INTEGERS else half if name in HALF else "fp32")

    options = {"num_warps": constants.get("SLOTS", 1), "num_stages": 1} | options
    return compile_kernel(kernel, target, constants, type_of, **options)


def _forward(target, half, *switches, **options):
    modes = {"GATED": True, "HAS_START": True, "WRITE_Y": True, "WRITE_STATES": False, "WRITE_TOTALS": False}
    constants = USUAL | modes | {"NVIDIA": target.backend == "cuda"}
    for each in switches:
        constants |= each
    return _compile(scan_triton.scan_forward_kernel, target, half, constants, **options)


def _adjoint(target, half, *switches, **options):
    modes = {"SHARED_DY": True, "SAME_ROWS": True, "HAS_STATES": True, "HAS_LATER": True, "ONLY_EARLIER": False}
    constants = USUAL | modes | {"EXACT_DOT": False, "SPLIT": half == "fp16", "NVIDIA": target.backend == "cuda"}
    for each in switches:
        constants |= each
    return _compile(scan_triton.scan_adjoint_kernel, target, half, constants, **options)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.backend}-{target.arch}")
def test_every_target(target):
    turing = target.arch == 75  # has no bfloat16
    half, products = ("fp16", {"EXACT_DOT": True}) if turing else ("bf16", {})
    assert _forward(target, half, VIM).asm
    assert _adjoint(target, half, VMAMBA, products).asm


def test_half_precision_of_two_halves():
    assert _adjoint(H100, "fp16", VMAMBA).asm


@pytest.mark.parametrize(
    "switches",
    [
        [VMAMBA, EVERYTHING],
        [VIM, EVERYTHING, {"LOW_RANK": False, "SOFTPLUS": False, "INDEX": tl.int64, "SHARED_X": False}],
        [VMAMBA, PLAIN_FLOAT32],
        [VIM, SELECTIVE],
        [VMAMBA, SELECTIVE, {"FULL": False, "MASKED": True}],
    ],
    ids=["every switch", "full rank", "float32", "selective scan", "selective scan of one state"],
)
def test_every_switch(switches):
    half = "fp32" if PLAIN_FLOAT32 in switches else "bf16"
    assert _forward(H100, half, *switches).asm
    assert _adjoint(H100, half, *switches).asm


@pytest.mark.parametrize("target", [TARGETS[0], H100, TARGETS[-1]], ids=["turing", "hopper", "gfx942"])
def test_warps_that_share_states(target):
    half, products = ("fp16", {"EXACT_DOT": True}) if target.arch == 75 else ("bf16", {})
    assert _forward(target, half, VIM, FOUR_WARPS, {"FULL": False, "MASKED": True}).asm
    assert _adjoint(target, half, VIM, FOUR_WARPS, {"FULL": False, "MASKED": True}, products).asm


@pytest.mark.parametrize("model", [VIM, VMAMBA], ids=["vim", "vmamba"])
def test_passes_over_chunks(model):
    only_states = {"WRITE_Y": False, "GATED": False}
    assert _forward(H100, "bf16", model, only_states, {"WRITE_TOTALS": True, "HAS_START": False}).asm
    assert _forward(H100, "bf16", model, only_states, {"WRITE_STATES": True}).asm
    assert _adjoint(H100, "bf16", model, {"ONLY_EARLIER": True, "HAS_LATER": False}).asm


@pytest.mark.parametrize(
    ("model", "registers"),
    [([VIM], 168), ([VMAMBA], 128), ([VIM, FOUR_WARPS], 168), ([VIM, A_STATE_A_WARP], 128)],
    ids=["vim", "vmamba", "four warps", "a state a warp"],
)
def test_a_thread_holds_the_steps_of_its_channels(model, registers, tmp_path):
    """So the recurrence needs no shuffles, and its registers suffice: nothing is spilt to memory.

    Only rows of dt that are read two neighbours at once are shuffled apart.
    """
    modes = {"GATED": False, "HAS_START": False}
    compiled = _forward(H100, "bf16", *model, modes, maxnreg=registers)
    assert stack_bytes(compiled, tmp_path) == 0
    compiled = _forward(H100, "bf16", *model, modes, {"TWO_A_WORD": False}, maxnreg=registers)
    assert "shfl" not in compiled.asm["ptx"]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.backend}-{target.arch}")
def test_products_with_dt(target):
    tile = {"ROWS": 64, "BLOCK": 128, "RANKS": 16}
    half = "fp32" if target.arch == 75 else "bf16"
    for kernel in (scan_triton.dt_gradient_kernel, scan_triton.weight_gradient_kernel):
        assert _compile(kernel, target, half, tile, numbers=(*NUMBERS, "rows"), num_warps=4, num_stages=3).asm


def test_small_kernels():
    elementwise = {"ROWS": 16, "BLOCK": 128, "GATED": True}
    pack = {
        "HAS_ORDER": True, "HAS_GAP": True, "CHAIN": True, "STEP_PARAMS": True, "B_PER_TOKEN": True,
        "C_PER_TOKEN": True, "BLOCK": 64, "STEPS": 16, "STATES": 16,
    }  # fmt: skip
    carry = {"HAS_FIRST": True, "REVERSE": True, "CHANNELS": 32, "PRECISE": True, "NVIDIA": True}
    unpack = {
        "B_PER_TOKEN": True, "C_PER_TOKEN": True, "BLOCK": 64, "STEPS": 16, "STATES": 16,
    }  # fmt: skip
    for kernel, constants, also_numbers in (
        (scan_triton.merge_kernel, elementwise, ("rows",)),
        (scan_triton.gate_adjoint_kernel, elementwise, ("rows",)),
        (scan_triton.pack_kernel, pack, ("states",)),
        (scan_triton.carry_kernel, carry, ()),
        (scan_triton.unpack_kernel, unpack, ()),
    ):
        assert _compile(kernel, H100, "bf16", constants, numbers=NUMBERS + also_numbers, num_warps=4).asm
