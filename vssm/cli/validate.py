"""Measure the accuracy of a classifier on held-out images."""

import argparse
import logging
from pathlib import Path

from vssm.cli._options import results_path
from vssm.cli._training import (
    add_compute_arguments,
    add_model_arguments,
    amp_dtype,
    chosen_device,
    count,
    open_classifier,
)
from vssm.engine.evaluate import validate
from vssm.engine.records import environment, print_table, write_results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument(
        "data_dir",
        nargs="?",
        type=Path,
        metavar="DATA",
        help="folder with class folders in val/; the embedded digits if absent",
    )
    add_compute_arguments(parser)
    parser.add_argument("--workers", type=count, default=0, metavar="N", help="processes that read images")
    parser.add_argument("--results", type=results_path, metavar="FILE", help="write the record to this .json or .csv")
    add_model_arguments(parser.add_argument_group("model", "None given: as the checkpoint or the model itself says"))


def run(args: argparse.Namespace) -> int:
    """Prints the accuracy and writes the record."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dtype = amp_dtype(args)
    classifier = open_classifier(args)
    device = chosen_device(args)
    metrics = validate(
        classifier, args.data_dir, device=device, batch_size=args.batch_size, workers=args.workers, amp_dtype=dtype
    )
    record = {"model": classifier.spec.model, **metrics}
    print_table([record], ["model", "top1", "top5", "loss", "images", "correct_top1", "unreadable", "images_per_s"])
    if args.results:
        facts = {
            "checkpoint": args.checkpoint,
            "data_dir": args.data_dir or "embedded digits",
            "amp_dtype": args.amp_dtype or "float32",
            "batch_size": args.batch_size,
            "spec": classifier.spec.as_dict(),
        }
        write_results(args.results, [record | facts | environment(device)])
    return 0
