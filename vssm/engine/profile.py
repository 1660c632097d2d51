"""Where the time of a step goes: its kernels, and what each part of a model takes of it."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

_STEPS = 3
_SHOWN = 12  # kernels, the longest
# By the names of kernels on a GPU and of torch's operators on a CPU; the first that matches.
_PARTS = {
    "scan": r"vssm::scan|scan_forward|scan_adjoint|carry_kernel|pack_kernel|merge_kernel|gate_adjoint|"
    r"(dt|weight)_gradient_kernel",
    "attention": r"neighbourhood|attention|flash|fmha|softmax",
    "convolutions": r"conv|cudnn|dgrad|wgrad|fprop",
    "products": r"gemm|gemv|cutlass|nvjet|xmma|cublas|addmm|\bmm\b|bmm|linear|matmul|dot|einsum",
    "norms": r"norm",
    "optimizer": r"multi_tensor|foreach|adam",
    "copies": r"copy|memcpy|memset|\bcat\b|CatArray|transpose|contiguous|fill|zero",
}
_OTHERS = "elementwise and others"
# Kernels that torch.compile wrote name all that is fused in them; what is neither of these is elementwise.
_OF_COMPILER = {"norms": r"^triton_(per|red).*norm", "products": r"^triton_tem_.*mm"}


def profile_step(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Profiles a step that has been run before.

    Args:
        call: The step.
        device: Where it computes.

    Returns:
        ``parts``: milliseconds of a step by part of a model, longest first; ``kernels``: the longest of the kernels,
        or on a CPU of torch's operators, each with ``name``, ``ms`` and ``calls`` in a step. Both are sums of the time
        that kernels run, without the gaps between them.
    """
    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(_STEPS):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    kernels = []
    for event in profiler.key_averages():
        if on_gpu and event.device_type != DeviceType.CUDA:
            continue
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kernels.append({"name": event.key, "ms": spent / 1e3 / _STEPS, "calls": event.count / _STEPS})
    kernels.sort(key=lambda kernel: -kernel["ms"])
    parts: dict[str, float] = {}
    for kernel in kernels:
        part = part_of(kernel["name"])
        parts[part] = parts.get(part, 0.0) + kernel["ms"]
    ordered = dict(sorted(parts.items(), key=lambda item: -item[1]))
    return {"parts": ordered, "kernels": kernels[:_SHOWN]}


def part_of(kernel: str) -> str:
    """The part of a model that a kernel, or an operator of torch, belongs to by its name."""
    patterns = _OF_COMPILER if re.match(r"triton_(poi|per|red|tem)_", kernel) else _PARTS
    return next((part for part, pattern in patterns.items() if re.search(pattern, kernel, re.IGNORECASE)), _OTHERS)


def profile_rows(record: dict[str, Any], step: str) -> list[dict[str, Any]]:
    """Rows of a table: the parts of a model in the ``profile`` or ``train_profile`` of its record, in ms and shares."""
    parts = record[step]["parts"]
    whole = sum(parts.values())
    kind = "training" if step == "train_profile" else "inference"
    return [
        {"model": record["model"], "step": kind, "part": part, "ms": ms, "share": ms / whole}
        for part, ms in parts.items()
    ]
