"""How fast an op could be at best, by the bytes that it moves and the special functions that it computes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vssm.engine.timing import measure_time

_COPIED = {"cuda": 2**30, "cpu": 2**26}  # bytes, far more than any cache holds
_SPECIAL_FUNCTIONS = 16  # a clock and multiprocessor, of NVIDIA devices with these major compute capabilities
_CAPABILITIES = (8, 9)


class Limits(NamedTuple):
    """What a device can do.

    Args:
        copy_gb_per_s: Bandwidth of a large copy within its memory, bytes read and bytes written both counted.
        exps_per_ms: Special functions in a millisecond, ``None`` where that is not known.
    """

    copy_gb_per_s: float
    exps_per_ms: float | None

    def describe(self, special_functions: int, inputs: Sequence[Tensor], result: Tensor) -> dict[str, float | None]:
        """Bytes and least times of one call of an op.

        Forward reads every input and writes the result; backward reads the inputs and the gradient of the result, and
        writes the gradients of the inputs.

        Args:
            special_functions: How many either pass computes at least.
            inputs: All that have a gradient; the table of the order, small beside them, is not counted.
            result: Of the forward pass.

        Returns:
            ``forward_bytes``, ``backward_bytes``, ``forward_floor_ms``, ``backward_floor_ms`` and ``exp_floor_ms``.
        """
        read, written = (sum(tensor.nbytes for tensor in tensors) for tensors in (inputs, [result]))
        moved = {"forward": read + written, "backward": 2 * read + written}
        return {
            **{f"{phase}_bytes": count for phase, count in moved.items()},
            **{f"{phase}_floor_ms": count / self.copy_gb_per_s / 1e6 for phase, count in moved.items()},
            "exp_floor_ms": None if self.exps_per_ms is None else special_functions / self.exps_per_ms,
        }


def measure_limits(device: torch.device) -> Limits:
    """Measures the bandwidth of ``device`` and looks the rate of its special functions up."""
    source = torch.zeros(_COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure_time(lambda: target.copy_(source), device, warmup=3, repeats=10)
    return Limits(2 * source.nbytes / copy["median"] / 1e6, _exps_per_ms(device))


def _exps_per_ms(device: torch.device) -> float | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    properties = torch.cuda.get_device_properties(device)
    kilohertz = getattr(properties, "clock_rate", 0)
    if properties.major not in _CAPABILITIES or not kilohertz:
        return None
    return float(_SPECIAL_FUNCTIONS * properties.multi_processor_count * kilohertz)
