"""What the benchmark of neighbourhood attention runs: shapes, our op, and what it is compared with."""

import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from vssm.engine.op_subjects import Subject
from vssm_kernels import neighbourhood_attention
from vssm_kernels.neighbourhood_attention_torch import Tiles

RIVALS = ("torch", "natten")

_logger = logging.getLogger(__name__)


class AttentionShape(NamedTuple):
    """Sizes of one call, as one half of the heads of a block makes it.

    Args:
        b: Batch.
        heads: Heads.
        e: Channels of a head.
        h: Rows of the map.
        w: Columns of the map.
        window: Side of a window.
        dilation: Distance of neighbouring tokens of a window, along both axes.
    """

    b: int
    heads: int
    e: int
    h: int
    w: int
    window: int
    dilation: int

    @property
    def tokens(self) -> int:
        """In all samples."""
        return self.b * self.h * self.w

    @property
    def special_functions(self) -> int:
        """One exp a pair of neighbours."""
        return self.tokens * self.heads * self.window**2


def a2mamba_shapes(batch_size: int) -> list[AttentionShape]:
    """The stages of `a2mamba_nano` and of `a2mamba_base` at 224 pixels, each with a dilation of 1 and with its own."""
    sides, windows = (56, 28, 14, 7), (11, 9, 7, 7)
    models = (((1, 16), (1, 32), (2, 32), (4, 24)), ((2, 24), (4, 24), (6, 32), (8, 32)))  # half of the heads; e
    return [
        AttentionShape(batch_size, heads, e, side, side, window, dilation)
        for stages in models
        for (heads, e), side, window in zip(stages, sides, windows, strict=True)
        for dilation in sorted({1, side // window})
    ]


def attention_subjects(
    shape: AttentionShape, device: torch.device, dtype: torch.dtype, against: Sequence[str] = ()
) -> Iterator[Subject]:
    """Yields ``neighbourhood_attention`` and the rivals that can run here, in that order.

    ``torch`` keeps the weights of all tiles in memory and leaves the backward pass to autograd. ``natten`` is that of
    NATTEN, in two steps with biases where the installed version has those, and else fused and without biases, which its
    record says; its result then is another one.

    Args:
        shape: Sizes.
        device: Where to compute.
        dtype: Of queries, keys and values, views of one projection; biases are float32.
        against: Names of `RIVALS`. One that cannot run is left out.
    """
    grid = {"size": (shape.h, shape.w), "window": shape.window, "dilation": (shape.dilation, shape.dilation)}
    inputs = attention_inputs(shape, device, dtype)
    q, k, v, bias = inputs
    yield _subject("neighbourhood_attention", lambda: neighbourhood_attention(q, k, v, bias, **grid), inputs)
    if "torch" in against:
        tiles = Tiles(**grid, device=device)
        yield _subject("torch", lambda: tiles.aggregate(tiles.attend(q, k, bias), v), inputs)
    if "natten" in against and (found := natten()) is not None:
        yield _natten_subject(found, shape, inputs)


def log_left_out(against: Sequence[str]) -> None:
    """Says in the log which rivals `attention_subjects` leaves out, and why."""
    if "natten" in against and natten() is None:
        _logger.warning("natten is left out: natten.functional cannot be imported")


def attention_inputs(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Random queries, keys and values, views of one projection of all heads as models make them, and biases."""
    generator = torch.Generator(device).manual_seed(0)
    random = {"generator": generator, "device": device}
    projected = torch.randn(shape.b, shape.h * shape.w, 3, 2 * shape.heads, shape.e, **random).to(dtype)
    q, k, v = projected[..., : shape.heads, :].unbind(2)
    side = 2 * shape.window - 1
    tensors = (q * shape.e**-0.5, k, v, torch.randn(shape.heads, side, side, **random))
    return [tensor.detach().requires_grad_() for tensor in tensors]


def natten() -> ModuleType | None:
    """NATTEN's functions; None where they cannot be imported."""
    try:
        return importlib.import_module("natten.functional")
    except (ImportError, RuntimeError):  # the latter of a build for another torch
        return None


def _natten_subject(functional: ModuleType, shape: AttentionShape, inputs: Sequence[Tensor]) -> Subject:
    """On maps of its own layout: heads before rows in two steps, after columns when fused."""
    *tensors, bias = (tensor.detach() for tensor in inputs)
    maps = [tensor.unflatten(1, (shape.h, shape.w)) for tensor in tensors]
    window, dilation = shape.window, shape.dilation
    if hasattr(functional, "na2d_qk"):
        q, k, v = leaves = _leaves(each.permute(0, 3, 1, 2, 4) for each in maps)
        leaves += _leaves([bias.to(q.dtype)])

        def two_steps() -> Tensor:
            scores = functional.na2d_qk(q, k, kernel_size=window, dilation=dilation, rpb=leaves[3])
            return functional.na2d_av(scores.softmax(-1), v, kernel_size=window, dilation=dilation)

        return Subject("natten", two_steps, leaves, lambda y: y.permute(0, 2, 3, 1, 4).flatten(1, 2).flatten(2))
    leaves = _leaves(maps)

    def fused() -> Tensor:
        return functional.na2d(*leaves, kernel_size=window, dilation=dilation, scale=1.0)

    return Subject("natten", fused, leaves, lambda y: y.flatten(1, 2).flatten(2), facts={"biases": "none"})


def _leaves(tensors: Iterator[Tensor] | Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous().requires_grad_() for tensor in tensors]


def _subject(name: str, call: Callable[[], Tensor], inputs: list[Tensor]) -> Subject:
    return Subject(name, call, inputs, lambda y: y.flatten(2))
