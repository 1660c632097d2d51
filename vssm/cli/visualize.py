"""Draw the path of each direction of a scan order, or with --prune which tokens of an image stay."""

import argparse
import re
from pathlib import Path

from vssm.cli import UsageError
from vssm.cli._options import picture_path, positive_int
from vssm.cli._training import add_model_arguments, open_classifier
from vssm.engine.draw_tokens import draw_kept_tokens
from vssm.engine.visualize import draw_scan_order
from vssm.pruning import read_schedule
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
    group = parser.add_argument_group("tokens that stay", "The model is that of the schedule, if none is given")
    group.add_argument("--prune", type=Path, metavar="FILE.yaml", help="schedule, such as those in configs/pruning")
    group.add_argument("--image", type=Path, metavar="FILE", help="image whose tokens are drawn after each cut")
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights, such as those that vssm train writes")
    add_model_arguments(group)


def run(args: argparse.Namespace) -> int:
    """Draws the order, or the tokens, and says where the picture is."""
    if (args.prune is None) != (args.image is None):
        raise UsageError("expected --prune FILE.yaml and --image FILE together, got one of them")
    if args.prune is not None:
        return _draw_tokens(args)
    height, width = args.grid
    record = draw_scan_order(args.output, args.order, height, width, window=args.window)
    print(f"{record['picture']}: {args.order} over {height}x{width} tokens, {record['directions']} direction(s)")
    return 0


def _draw_tokens(args: argparse.Namespace) -> int:
    schedule = read_schedule(args.prune)
    if args.model is None and args.checkpoint is None:
        args.model = schedule.model
    record = draw_kept_tokens(args.output, open_classifier(args), args.image, schedule)
    cuts = zip(record["after"], record["kept"], record["patches"], strict=True)
    print(f"{record['picture']}: " + ", ".join(f"{kept} of {all_} after block {cut}" for cut, kept, all_ in cuts))
    return 0


def _grid(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected rows x columns such as 7x7 or 4x10, got {text!r}")
    return int(match[1]), int(match[2])
