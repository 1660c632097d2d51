"""Shapes at which the scan alone is measured: named sets, files, and times measured elsewhere to compare with."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vssm.scan_order import BUILDERS, scan_order

_LINE_ORDERS = ("row", "bidirectional")  # the same on a grid as on a line of tokens
_SIZES = ("b", "k", "d", "n", "l")
_TOTAL_TOKENS = 2**17
_INLINE = re.compile(r"\d+(,\d+){3}(;\d+(,\d+){3})*")


class Shape(Protocol):
    """Sizes of one call of an op, and what is known of its work."""

    @property
    def b(self) -> int:
        """Batch."""
        ...

    @property
    def tokens(self) -> int:
        """In all samples."""
        ...

    @property
    def special_functions(self) -> int:
        """How many a pass computes at least."""
        ...

    def _asdict(self) -> dict[str, Any]:
        """The sizes, by name."""
        ...

    def _replace(self, *, b: int) -> "Shape":
        """The same with another batch."""
        ...


class OpShape(NamedTuple):
    """Sizes of one scan.

    Args:
        b: Batch.
        k: Directions.
        d: Channels.
        n: States of a channel.
        l: Tokens.
        r: Rank of the step.
        order: Name of the scan order, which has k directions.
    """

    b: int
    k: int
    d: int
    n: int
    l: int
    r: int
    order: str = "row"

    @property
    def sizes(self) -> tuple[int, ...]:
        """(b, k, d, n, l), by which times measured elsewhere are found."""
        return self[:5]

    @property
    def tokens(self) -> int:
        """In all samples."""
        return self.b * self.l

    @property
    def special_functions(self) -> int:
        """One exp a state and step for the decays, an exp and a log a channel and step for the softplus."""
        return self.b * self.k * self.d * self.l * (self.n + 2)

    def table(self, device: torch.device | str | None = None) -> Tensor:
        """The scan order (k, l): of a square grid, or of a line where that is the same.

        Raises:
            ValueError: The order is unknown or needs more than a number of tokens, or has not k directions.
        """
        if self.order not in BUILDERS or self.order == "window":
            known = ", ".join(name for name in BUILDERS if name != "window")
            raise ValueError(f"order must be one of {known}, got {self.order!r}")
        side = 1 if self.order in _LINE_ORDERS else math.isqrt(self.l)
        if self.order not in _LINE_ORDERS and side**2 != self.l:
            raise ValueError(f"order {self.order!r} needs a square number of tokens, got l = {self.l}")
        table = scan_order(self.order, side, self.l // side, device)
        if len(table) != self.k:
            raise ValueError(f"order {self.order!r} has {len(table)} directions, got k = {self.k}")
        return table


class Anchor(NamedTuple):
    """Times of another implementation at one shape, measured elsewhere.

    Args:
        name: Of the implementation.
        forward_ms: Time of the forward pass.
        backward_ms: Time of the backward pass.
        source: What was measured, where and how.
        dtype: Of the inputs; of any when ``None``.
    """

    name: str
    forward_ms: float
    backward_ms: float
    source: str
    dtype: str | None = None


NAMED_SHAPES: dict[str, tuple[OpShape, ...]] = {
    "default": (OpShape(1, 1, 192, 1, 3136, 12), OpShape(1, 1, 384, 16, 197, 12)),
    "vision": (
        OpShape(128, 4, 96, 1, 3136, 6, "cross"),  # VMamba-T s1l8, stage 1
        OpShape(128, 4, 384, 1, 196, 24, "cross"),  # VMamba-T s1l8, stage 3
        OpShape(128, 4, 192, 1, 3136, 6, "cross"),  # VMamba-T s2l5, stage 1
        OpShape(32, 4, 96, 16, 3136, 6, "cross"),  # the first VMamba, stage 1
        OpShape(128, 1, 768, 16, 197, 24),  # Vim-S
        OpShape(128, 1, 384, 16, 197, 12),  # Vim-Ti
        OpShape(8, 1, 384, 16, 6085, 12),  # Vim-Ti at 1248 pixels
    ),
    "vmamba_tiny": tuple(
        OpShape(128, 4, 96 * 2**stage, 1, (56 // 2**stage) ** 2, 6 * 2**stage, "cross") for stage in range(4)
    ),
    "lengths": tuple(
        OpShape(round(_TOTAL_TOKENS / l), 1, 384, n, l, 24)
        for n in (1, 16)
        for l in (196, 784, 3136, 12544, 50176, 100352)
    ),
}


def read_shapes(text: str) -> list[OpShape]:
    """Reads shapes from a name of `NAMED_SHAPES`, a JSON file or ``"b,d,n,l;..."``.

    The file is a list of objects with the keys b, d, n, l, r and, where there is more than one direction, k and order.
    The spelling with commas has one direction and a step of rank d/16.

    Raises:
        ValueError: The text is none of these, or a shape is not one.
        OSError: The file cannot be read.
    """
    if text in NAMED_SHAPES:
        return list(NAMED_SHAPES[text])
    compact = "".join(text.split())
    if _INLINE.fullmatch(compact) and "0" not in re.findall(r"\d+", compact):
        quadruples = [[int(number) for number in part.split(",")] for part in compact.split(";")]
        return [OpShape(b, 1, d, n, l, math.ceil(d / 16)) for b, d, n, l in quadruples]
    if not text.endswith(".json"):
        names = ", ".join(NAMED_SHAPES)
        raise ValueError(f"expected {names}, a .json file or positive b,d,n,l such as 1,192,1,3136, got {text!r}")
    return [_shape(text, entry) for entry in _entries(text)]


def read_anchors(path: str) -> dict[tuple[int, ...], Anchor]:
    """Reads times measured elsewhere, by `OpShape.sizes`.

    Args:
        path: JSON file, a list of objects with the keys b, k, d, n, l and those of :class:`Anchor`.

    Raises:
        ValueError: The file is not such a list, or has a shape twice.
        OSError: The file cannot be read.
    """
    anchors: dict[tuple[int, ...], Anchor] = {}
    for entry in _entries(path):
        _check_keys(path, entry, required=(*_SIZES, "name", "forward_ms", "backward_ms", "source"), optional=("dtype",))
        sizes = tuple(_positive(path, entry, key, int) for key in _SIZES)
        if sizes in anchors:
            raise ValueError(f"{path}: expected every shape once, got {_text(entry)} again")
        forward_ms, backward_ms = (_positive(path, entry, key, float) for key in ("forward_ms", "backward_ms"))
        anchors[sizes] = Anchor(entry["name"], forward_ms, backward_ms, entry["source"], entry.get("dtype"))
    return anchors


def _shape(path: str, entry: Mapping[str, Any]) -> OpShape:
    _check_keys(path, entry, required=("b", "d", "n", "l", "r"), optional=("k", "order"))
    sizes = {key: _positive(path, {"k": 1} | dict(entry), key, int) for key in (*_SIZES, "r")}
    if sizes["k"] > 1 and "order" not in entry:
        raise ValueError(f"{path}: k = {sizes['k']} directions need an order in {_text(entry)}")
    shape = OpShape(**sizes, order=str(entry.get("order", "row")))
    try:
        shape.table()
    except ValueError as error:
        raise ValueError(f"{path}: {error} in {_text(entry)}") from None
    return shape


def _entries(path: str) -> list[dict[str, Any]]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(content, list) or not content or not all(isinstance(entry, dict) for entry in content):
        raise ValueError(f"{path}: expected a list of at least one object, one for each shape")
    return content


def _check_keys(path: str, entry: Mapping[str, Any], *, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    missing = [key for key in required if key not in entry]
    unknown = [key for key in entry if key not in (*required, *optional)]
    if missing:
        raise ValueError(f"{path}: expected the key {', '.join(missing)} in {_text(entry)}")
    if unknown:
        raise ValueError(f"{path}: unknown key {', '.join(unknown)} in {_text(entry)}")


def _positive(path: str, entry: Mapping[str, Any], key: str, kind: type[int] | type[float]) -> Any:
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value < math.inf:
        noun = "integer" if kind is int else "number"
        raise ValueError(f"{path}: expected a positive {noun} for {key}, got {value!r}")
    return value


def _text(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry)
