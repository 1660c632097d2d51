"""Options of the commands that run the scan alone."""

import argparse
from collections.abc import Callable
from typing import TypeVar

import torch

from vssm.cli._options import positive_int
from vssm.engine import attention_subjects, op_subjects
from vssm.engine.op_shapes import Anchor, OpShape, read_anchors, read_shapes

_SHAPES_HELP = "default, lengths, vision or vmamba_tiny; a JSON file of b, k, d, n, l, r and order; or b,d,n,l;..."
RIVALS = {"scan": op_subjects.RIVALS, "neighbourhood_attention": attention_subjects.RIVALS}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_Value = TypeVar("_Value")


def add_shapes(parser: argparse._ActionsContainer, default: str) -> None:
    """Adds ``--shapes``."""
    parser.add_argument("--shapes", type=shapes, default=default, metavar="SET|FILE|SIZES", help=_SHAPES_HELP)


def add_jobs(parser: argparse._ActionsContainer) -> None:
    """Adds ``--jobs``."""
    parser.add_argument(
        "--jobs",
        type=positive_int,
        metavar="N",
        help="processes that compile kernels for a GPU, 1 for none but this (default: one per core, up to 16 and as "
        "the GPU's memory allows)",
    )


def shapes(text: str) -> list[OpShape]:
    """Type of ``--shapes``: a named set, a file or sizes."""
    return _read(read_shapes, text)


def anchors(text: str) -> dict[tuple[int, ...], Anchor]:
    """Type of ``--anchors``: a file of times measured elsewhere."""
    return _read(read_anchors, text)


def rivals(text: str) -> list[str]:
    """Type of ``--against``: names with commas, each once."""
    return _names(text, tuple(dict.fromkeys(name for names in RIVALS.values() for name in names)))


def dtypes(text: str) -> list[torch.dtype]:
    """Type of ``--dtype`` where several can be given: names with commas."""
    return [DTYPES[name] for name in _names(text, tuple(DTYPES))]


def repeats(text: str) -> int:
    """Type of ``--repeats``: a number of timed calls."""
    value = positive_int(text)
    if value < 2:
        raise argparse.ArgumentTypeError("expected at least 2, from which a spread can be computed, got 1")
    return value


def _read(reader: Callable[[str], _Value], text: str) -> _Value:
    try:
        return reader(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _names(text: str, known: tuple[str, ...]) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)} with commas, got {unknown!r}")
    return list(dict.fromkeys(names))
