"""Draw the path of each direction of a scan order."""

import argparse
import re

from vssm.cli._options import picture_path, positive_int
from vssm.engine.visualize import draw_scan_order
from vssm.scan_order import BUILDERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``vssm visualize``."""
    parser.add_argument("output", type=picture_path, help="picture to write: .png, .svg or .pdf")
    parser.add_argument("--order", choices=list(BUILDERS), default="cross", help="scan order")
    parser.add_argument(
        "--grid", type=_grid, default="7x7", metavar="HxW", help="rows and columns of the grid, in tokens"
    )
    parser.add_argument(
        "--window", type=positive_int, metavar="N", help="side of the windows of --order window, in tokens"
    )


def run(args: argparse.Namespace) -> int:
    """Draws the order and says where the picture is."""
    height, width = args.grid
    record = draw_scan_order(args.output, args.order, height, width, window=args.window)
    print(f"{record['picture']}: {args.order} over {height}x{width} tokens, {record['directions']} direction(s)")
    return 0


def _grid(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected rows x columns such as 7x7 or 4x10, got {text!r}")
    return int(match[1]), int(match[2])
