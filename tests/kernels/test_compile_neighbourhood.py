"""The kernels of neighbourhood attention compile for the GPUs they are meant for; on an H100 none spills registers."""

import os

import pytest

pytest.importorskip("triton", reason="Triton is not on every platform")

from compiled import H100, TARGETS, compile_kernel, stack_bytes
from vssm_kernels import neighbourhood_attention_triton as kernels

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")

KERNELS = {  # and with which sizes they are launched
    "forward": kernels.FORWARD,
    "queries": kernels.QUERIES,
    "keys": kernels.KEYS,
    "biases": kernels.BIASES,
}
ROWS = ("q", "k", "v", "y", "dy", "dq", "dk", "dv")
A2MAMBA = {"DIM": 24, "PADDED": 32, "VALUES": 24, "PADDED_VALUES": 32, "ALIGNED": 8, "WIDE": False}
# Rows and columns of grids and windows, of A2Mamba's first stage, with a dilation of 5 and without, and third.
GRIDS = {"dilated": (12, 12, 11), "wide window": (56, 56, 11), "one window": (7, 7, 7)}


def _compile(name, target, dtype, grid, **switches):
    rows, columns, window = GRIDS[grid]
    config = KERNELS[name]
    tiling = kernels.Tiling.of(rows, columns, window=window, config=config)

    def type_of(argument):
        if argument in kernels.SIZES or argument.endswith(("_sample", "_token", "_head")):
            return "i32"
        return "*" + (dtype if argument in ROWS else "fp32")

    constants = A2MAMBA | {"WINDOW": window} | tiling.arguments | switches
    options = {"num_warps": tiling.warps, "num_stages": config.stages}
    return compile_kernel(getattr(kernels, f"attention_{name}_kernel"), target, constants, type_of, **options)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.backend}-{target.arch}")
def test_every_target(target):
    half = "fp16" if target.arch == 75 else "bf16"  # which is missing there
    for name in KERNELS:
        assert _compile(name, target, half, "dilated").asm


@pytest.mark.parametrize("grid", ["wide window", "one window"])
@pytest.mark.parametrize("name", KERNELS)
def test_h100_has_registers_enough(name, grid, tmp_path):
    assert stack_bytes(_compile(name, H100, "bf16", grid), tmp_path) == 0


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("dtype", "switches"),
    [
        ("fp32", {}),
        ("bf16", {"WIDE": True}),
        ("bf16", {"DIM": 13, "VALUES": 64, "PADDED_VALUES": 64, "ALIGNED": 1}),
    ],
    ids=["float32", "no bfloat16 products", "unlike channels"],
)
def test_every_switch(name, dtype, switches):
    assert _compile(name, H100, dtype, "dilated", **switches).asm
