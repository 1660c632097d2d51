"""Counts of a model: parameters, multiply-adds of products and convolutions, operations of scans, activations."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from vssm.engine.published import PUBLISHED
from vssm.engine.zoo import count_parameters, create_by_name, input_size
from vssm.pruning import Schedule
from vssm_kernels.library import step_product_flops


class Counts(NamedTuple):
    """What is counted of a part of a model.

    Args:
        params: Parameters.
        matmul_macs: Multiply-adds of matrix products, the low-rank product dt_weight·dt inside the scan op included.
        conv_macs: Multiply-adds of convolutions.
        scan_ops: Operations of the recurrences, 9·b·k·d·l·n.
        activations: Elements that products, convolutions and scans write.
    """

    params: int = 0
    matmul_macs: int = 0
    conv_macs: int = 0
    scan_ops: int = 0
    activations: int = 0

    def plus(self, other: "Counts") -> "Counts":
        """Sums each count."""
        return Counts(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def minus(self, other: "Counts") -> "Counts":
        """Subtracts each count."""
        return Counts(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))


def describe(
    name: str, *, img_size: tuple[int, int] | None = None, batch_size: int = 1, prune: Schedule | None = None
) -> dict:
    """Counts one forward pass, without computing it.

    Counted are matrix products (linear layers, attention, dt_weight·dt) and convolutions, one per multiply-add without
    biases, and the scan's recurrence with 9·b·k·d·l·n operations, the convention of the field. Norms, activations,
    gates, additions and pooling are not. The sum of the three is what papers on state-space backbones print as FLOPs.
    Activations are the elements of the results of what is counted, which is what limits speed where memory does.

    Args:
        name: A model of vssm or timm.
        img_size: Input height and width in pixels; the model's own when not given.
        batch_size: Images in the forward pass.
        prune: How to reduce tokens, for a second count of operations.

    Returns:
        Record with ``params``, ``matmul_macs``, ``conv_macs``, ``scan_ops``, ``activations``, the same in readable
        units (``params_m``, ``gmacs``, ``scan_gops``, ``total_gflops``, ``activations_m``), the published figures
        (``None`` where none are known for this input) and ``parts``, one mapping per part of the model. With ``prune``
        also the schedule as a mapping, and what `count_reduced` returns.

    Raises:
        ValueError: The name is unknown, the model takes no other input size, or the schedule does not suit it.
    """
    with torch.device("meta"):
        model = create_by_name(name, img_size=img_size).eval()
        channels, height, width = input_size(model)
        size = img_size or (height, width)
        images = torch.empty(batch_size, channels, *size)
    parts = count_parts(model, images)
    total = _sum(parts)
    published = PUBLISHED.get(name.partition(".")[0]) if (size, batch_size) == ((height, width), 1) else None
    macs = total.matmul_macs + total.conv_macs
    return {
        "model": name,
        "img_size": list(size),
        "batch_size": batch_size,
        **total._asdict(),
        "params_m": total.params / 1e6,
        "gmacs": macs / 1e9,
        "scan_gops": total.scan_ops / 1e9,
        "total_gflops": (macs + total.scan_ops) / 1e9,
        "activations_m": total.activations / 1e6,
        "published_params_m": published and published.params_m,
        "published_gflops": published and published.gflops,
        "published_source": published and published.source,
        "parts": [{"part": part, **counts._asdict()} for part, counts in parts.items()],
        **(
            {}
            if prune is None
            else {"prune": prune.as_dict(), **count_reduced(model, images, prune, dense=macs + total.scan_ops)}
        ),
    }


def count_reduced(model: nn.Module, images: torch.Tensor, schedule: Schedule, *, dense: int) -> dict[str, Any]:
    """Counts a forward pass on the tokens that a schedule leaves; the policy's own products are in it.

    Args:
        model: Model, on the meta device or any other.
        images: Input, (b, c, h, w).
        schedule: How to reduce tokens.
        dense: What `count_operations` returns for all tokens.

    Returns:
        ``tokens_left``, the number after each cut, ``pruned_gflops`` and ``pruned_over_dense``.

    Raises:
        ValueError: The schedule does not suit the model.
    """
    with schedule.reducer(model) as reducer:
        pruned = count_operations(model, images)
        left = [token_map.count for token_map in reducer.maps.values()]
    return {
        "tokens_left": left,
        "pruned_gflops": pruned / 1e9,
        "pruned_over_dense": pruned / dense,
    }


def count_operations(model: nn.Module, images: torch.Tensor) -> int:
    """Multiply-adds and operations of scans of a forward pass, as in `describe`."""
    total = _sum(count_parts(model, images))
    return total.matmul_macs + total.conv_macs + total.scan_ops


def _sum(parts: dict[str, Counts]) -> Counts:
    total = Counts()
    for counts in parts.values():
        total = total.plus(counts)
    return total


def count_parts(model: nn.Module, images: torch.Tensor) -> dict[str, Counts]:
    """Counts a forward pass part by part.

    Args:
        model: Model, on the meta device or any other.
        images: Input, (b, c, h, w).

    Returns:
        Part to its counts: the direct children of the model, its stages one by one, and ``(other)`` for what belongs
        to no child, such as class tokens and position embeddings. The parts add up to the whole.
    """
    operations = _count_operations(model, images)
    parts = {path: _counts(part, f"{type(model).__name__}.{path}", operations) for path, part in _parts(model)}
    rest = operations["Global"].plus(Counts(count_parameters(model)))
    for counts in parts.values():
        rest = rest.minus(counts)
    if any(rest):
        parts["(other)"] = rest
    return {path: counts for path, counts in parts.items() if any(counts)}


def _count_operations(model: nn.Module, images: torch.Tensor) -> dict[str, Counts]:
    """Counts, but for parameters, by the path of the module that was called."""
    formulas: list[dict] = [
        {},
        {torch.ops.vssm.scan: _step_product_flops},
        dict.fromkeys(flop_registry, _written_elements),
    ]
    counters = [FlopCounterMode(display=False, custom_mapping=each) for each in formulas]
    with counters[0], counters[1], counters[2], torch.no_grad():
        model(images)
    flops, steps, written = ({"Global": {}, **counter.get_flop_counts()} for counter in counters)
    return {path: _split(flops[path], steps[path], written[path]) for path in flops}


def _step_product_flops(x, dt, A, B, C, D, dt_weight, *_: object, **__: object) -> int:
    """The part of the scan op that is a matrix product."""
    return step_product_flops(dt, dt_weight)


def _written_elements(*_: object, out_shape, **__: object) -> int:
    """Elements of an operator's result; of several, the first is what the next layer reads."""
    return math.prod(out_shape if isinstance(out_shape, torch.Size) else out_shape[0])


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if name == "stages":
            yield from ((f"{name}.{index}", stage) for index, stage in child.named_children())
        else:
            yield name, child


def _counts(module: nn.Module, path: str, operations: dict[str, Counts]) -> Counts:
    return _below(module, path, operations).plus(Counts(count_parameters(module)))


def _below(module: nn.Module, path: str, operations: dict[str, Counts]) -> Counts:
    """Operations below ``path``; a container that is never called, such as a ModuleList, has those of its children."""
    if path in operations:
        return operations[path]
    total = Counts()
    for name, child in module.named_children():
        total = total.plus(_below(child, f"{path}.{name}", operations))
    return total


def _split(flops: dict, steps: dict, written: dict) -> Counts:
    """Counts, but for parameters, from FLOPs and from written elements by operator."""
    scan = flops.get(torch.ops.vssm.scan, 0)
    conv = sum(count for operator, count in flops.items() if "conv" in str(operator))
    products = sum(flops.values()) - conv - scan
    step = steps.get(torch.ops.vssm.scan, 0)
    return Counts(
        matmul_macs=(products + step) // 2,
        conv_macs=conv // 2,
        scan_ops=scan - step,
        activations=sum(written.values()),
    )
