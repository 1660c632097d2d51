"""Find the fastest launch sizes of the kernels on this GPU, for scans of given shapes."""

import argparse
import logging
from pathlib import Path

import torch

from vssm.cli import UsageError, _op_options
from vssm.cli._options import device, positive_int
from vssm.engine.benchmark_op import OpSetting
from vssm.engine.records import print_table
from vssm.engine.tune import tune
from vssm_kernels import use_backend

_COLUMNS = ["op", "b", "k", "d", "n", "l", "dtype", "phase", "candidates", "failed", "refused", "before_ms", "ms"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    _op_options.add_shapes(parser, "vision")
    parser.add_argument(
        "--dtype",
        type=_op_options.dtypes,
        default="bfloat16",
        metavar="NAME,...",
        help=f"of the inputs: {', '.join(_op_options.DTYPES)}",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="table to extend; the one in your cache folder otherwise, which scans read before that of the package",
    )
    parser.add_argument("--force", action="store_true", help="search again what the table holds")
    _op_options.add_jobs(parser)
    parser.add_argument("--device", type=device, help="cuda, cuda:1 ...; the first GPU by default")
    parser.add_argument("--warmup", type=positive_int, default=1, help="calls before the timed ones")
    parser.add_argument("--repeats", type=_op_options.repeats, default=10, help="timed calls; the median counts")


def run(args: argparse.Namespace) -> int:
    """Searches, writes the table after every search, prints what was found; fails where nothing works."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    setting = OpSetting(_gpu(args.device), warmup=args.warmup, repeats=args.repeats, processes=args.jobs)
    with use_backend("auto"):  # whatever the environment asks for
        records = tune(args.shapes, setting, dtypes=args.dtype, path=args.output, force=args.force)
    print_table(records, _COLUMNS)
    return int(any(record["config"] is None for record in records))


def _gpu(place: torch.device | None) -> torch.device:
    found = place or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if found.type != "cuda":
        raise UsageError(f"launch sizes are those of a GPU: expected a CUDA device, got {found}")
    return found
