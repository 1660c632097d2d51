"""The kernels of neighbourhood attention compile for the GPUs they are meant for; on an H100 hardly one spills."""

import os

import pytest

pytest.importorskip("triton", reason="Triton is not on every platform")

from compiled import H100, TARGETS, compile_kernel, stack_bytes
from vssm_kernels import neighbourhood_attention_triton as kernels
from vssm_kernels.neighbourhood_tiles_triton import SIZES

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")

KERNELS = {  # what is in their tiles, and with which sizes they are launched
    "forward": ("queries", kernels.FORWARD),
    "queries": ("queries", kernels.QUERIES),
    "keys": ("keys", kernels.KEYS),
}
ROWS = ("q", "k", "v", "y", "dy", "dq", "dk", "dv")
PARTS = ("y_sums", "dq_sums", "dk_sums", "dv_sums")
A2MAMBA = {"DIM": 24, "PADDED": 32, "VALUES": 24, "PADDED_VALUES": 32, "ALIGNED": 8, "WIDE": False}
# Sizes of maps, windows and dilations of A2Mamba's stages, and a window that no stage has: its keys are many.
MAPS = {
    "first stage": (56, 11, 1),
    "first stage, dilated": (56, 11, 5),
    "second stage": (28, 9, 1),
    "second stage, dilated": (28, 9, 3),
    "third stage": (14, 7, 1),
    "fourth stage": (7, 7, 1),
    "wide window": (56, 21, 1),
}


def _compile(name, target, dtype, case, **switches):
    cells, window, dilation = MAPS[case]
    kind, config = KERNELS[name]
    tiling = kernels.Tiling.of((cells, cells), window, (dilation, dilation), kind=kind, partners=config.partners)
    tiles = kernels._Tiles(tiling, config, grids=dilation**2, samples=1)

    def type_of(argument):
        if argument in SIZES or argument.endswith(("_sample", "_token", "_head")):
            return "i32"
        return "*" + (dtype if argument in ROWS or (argument in PARTS and not tiling.many) else "fp32")

    constants = A2MAMBA | {"WINDOW": window} | tiling.arguments | switches
    options = {"num_warps": tiles.warps, "num_stages": config.stages}
    if target.backend == "cuda":
        options["maxnreg"] = tiles.registers
    return compile_kernel(getattr(kernels, f"attention_{name}_kernel"), target, constants, type_of, **options)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.backend}-{target.arch}")
def test_every_target(target):
    half = "fp16" if target.arch == 75 else "bf16"  # which is missing there
    for name in KERNELS:
        assert _compile(name, target, half, "first stage, dilated").asm


@pytest.mark.parametrize("case", [case for case in MAPS if case != "wide window"])
@pytest.mark.parametrize("name", KERNELS)
def test_h100_has_registers_enough(name, case, tmp_path):
    """Backwards a thread may put 40 numbers aside, most of them while it goes over samples, so that more warps fit."""
    assert stack_bytes(_compile(name, H100, "bf16", case), tmp_path) <= (0 if name == "forward" else 160)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("case", "dtype", "switches"),
    [
        ("first stage", "fp32", {}),
        ("fourth stage", "bf16", {"WIDE": True, "VALUES": 64, "PADDED_VALUES": 64}),
        ("third stage", "bf16", {"DIM": 13, "VALUES": 20, "ALIGNED": 1}),
        ("wide window", "bf16", {}),
    ],
    ids=["float32", "no bfloat16 products", "unlike channels", "many parts"],
)
def test_every_switch(name, case, dtype, switches):
    assert _compile(name, H100, dtype, case, **switches).asm


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.backend}-{target.arch}")
def test_sums_of_offsets(target):
    type_of = lambda argument: "*fp32" if argument in ("sums", "totals") else "i32"  # noqa: E731
    constants = {"WINDOW": 11, "OFFSETS": 32, "BLOCK": 64}
    assert compile_kernel(kernels.attention_offsets_kernel, target, constants, type_of).asm
