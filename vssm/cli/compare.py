"""Compare ways to train by the held-out images that their runs get right."""

import argparse
import logging
from pathlib import Path

import numpy as np

from vssm.cli import UsageError
from vssm.cli._options import picture_path, results_path
from vssm.cli._training import (
    DATA_HELP,
    add_compute_arguments,
    add_data_arguments,
    amp_dtype,
    chosen_device,
    count,
    data_options,
)
from vssm.engine.classifier import load
from vssm.engine.compare import WEIGHTS, curve_of, draw_comparison, group_records, measured
from vssm.engine.evaluate import validate
from vssm.engine.records import environment, print_table, write_results
from vssm.engine.tallies import Answers

_COLUMNS = ["group", "runs", "images", "top1", "difference", "difference_low", "difference_high"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument(
        "groups",
        nargs="+",
        type=_group,
        metavar="NAME=RUN,RUN",
        help="folders that vssm train has written, with other seeds but for nothing else; the first group is what the "
        "others are compared with",
    )
    parser.add_argument("--data", type=Path, metavar="DATA", help=DATA_HELP)
    add_compute_arguments(parser)
    parser.add_argument("--workers", type=count, default=0, metavar="N", help="processes that read images")
    parser.add_argument("--results", type=results_path, metavar="FILE", help="write the records to this .json or .csv")
    parser.add_argument("--plot", type=picture_path, metavar="FILE", help="draw the accuracy over the epochs")
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluates every run, prints a table, writes the records and the picture."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    groups = dict(args.groups)
    if len(groups) < len(args.groups):
        raise UsageError("expected a name for each group, got one twice")
    missing = [str(run) for runs in groups.values() for run in runs if not (run / WEIGHTS).is_file()]
    if missing:
        raise UsageError(f"expected folders with {WEIGHTS}, got {', '.join(missing)} without")
    device, dtype = chosen_device(args), amp_dtype(args)
    curves = {name: curve_of(runs) for name, runs in groups.items()}
    models = {}

    def hits_of(folder: Path) -> np.ndarray:
        classifier = load(folder / WEIGHTS)
        models[folder] = classifier.spec.model
        answers = Answers()
        validate(
            classifier,
            args.data,
            device=device,
            batch_size=args.batch_size,
            workers=args.workers,
            amp_dtype=dtype,
            options=data_options(args),
            tallies=[answers],
        )
        targets, found = answers.in_order()
        return (found == targets).numpy()

    records = group_records(measured(groups, hits_of))
    facts = {"data": args.data.name if args.data else "embedded digits", "amp_dtype": args.amp_dtype or "float32"}
    described = [
        record | {"model": models[groups[record["group"]][0]], "epochs": len(curves[record["group"]].epochs)} | facts
        for record in records
    ]
    print_table(described, _COLUMNS)
    if args.results:
        write_results(args.results, [record | environment(device) for record in described])
    if args.plot:
        draw_comparison(args.plot, curves)
    return 0


def _group(text: str) -> tuple[str, list[Path]]:
    name, equals, runs = text.partition("=")
    folders = [Path(run) for run in runs.split(",") if run]
    if not (name and equals and folders):
        raise argparse.ArgumentTypeError(f"expected NAME=RUN,RUN with folders of vssm train, got {text!r}")
    return name, folders
