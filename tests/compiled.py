"""Compiles kernels for GPUs that are not there, and says what they need of a thread."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

H100 = GPUTarget("cuda", 90, 32)
TARGETS = [
    *(GPUTarget("cuda", capability, 32) for capability in (75, 80, 86, 89, 90, 120)),
    GPUTarget("hip", "gfx942", 64),
]


def compile_kernel(
    kernel, target, constants: dict, type_of: Callable[[str], str], *, multiples_of_16: tuple = (), **options
):
    """Compiles a kernel whose other arguments have the types that ``type_of`` gives for their names.

    Args:
        kernel: A Triton function.
        target: The GPU.
        constants: Values of the constexpr parameters.
        type_of: "i32", "*bf16" ...; pointers are aligned.
        multiples_of_16: Names of numbers that are.
        options: Of the compiler: num_warps, maxnreg ...
    """
    signature, fixed, hints = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], fixed[name] = "constexpr", constants[name]
            continue
        signature[name] = type_of(name)
        if signature[name].startswith("*") or name in multiples_of_16:
            hints[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, fixed, hints), target=target, options=options)


def stack_bytes(compiled, folder: Path) -> int:
    """Bytes of local memory of a thread, which registers are spilt to; of a kernel compiled for an NVIDIA GPU."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])
