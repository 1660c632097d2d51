"""What a compiled kernel needs of a thread."""

import re
import subprocess
from pathlib import Path

import triton


def stack_bytes(compiled, folder: Path) -> int:
    """Bytes of local memory of a thread, which registers are spilt to; of a kernel compiled for an NVIDIA GPU."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])
