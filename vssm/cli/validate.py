"""Measure the accuracy of classifiers on held-out images."""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from vssm.cli import UsageError
from vssm.cli._options import results_path
from vssm.cli._training import (
    DATA_HELP,
    add_compute_arguments,
    add_data_arguments,
    add_model_arguments,
    amp_dtype,
    chosen_device,
    count,
    data_options,
    model_options,
    open_classifier,
)
from vssm.data import data_id
from vssm.engine.classifier import ModelSpec
from vssm.engine.evaluate import validate
from vssm.engine.records import environment, print_table, read_results, write_results
from vssm.engine.sweep import Subject, find_subjects, sweep

_COLUMNS = ["model", "top1", "top5", "loss", "images", "correct_top1", "unreadable", "images_per_s"]
_REAL_COLUMNS = ["real_top1", "real_top5", "real_images"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument("data_dir", nargs="?", type=Path, metavar="DATA", help=DATA_HELP)
    add_compute_arguments(parser)
    parser.add_argument("--workers", type=count, default=0, metavar="N", help="processes that read images")
    parser.add_argument(
        "--results",
        type=results_path,
        metavar="FILE",
        help="write the records to this .json or .csv, after every model; models that it holds for the same data and "
        "settings are skipped",
    )
    parser.add_argument(
        "--real-labels",
        metavar="FILE|imagenet",
        help="count by several right classes per image, too: a JSON list of lists, or ImageNet's that come with timm",
    )
    parser.add_argument(
        "--per-class", type=results_path, metavar="FILE", help="write accuracy and confusion per class to this .csv"
    )
    add_data_arguments(parser)
    group = parser.add_argument_group(
        "model",
        "--checkpoint takes a folder, too, and --model a pattern such as 'vim_*' or a .txt list of names: then all "
        "are measured. None given: as the checkpoint or the model itself says",
    )
    add_model_arguments(group)


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table, writes the records."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dtype, device = amp_dtype(args), chosen_device(args)
    if args.checkpoint is None and not args.pretrained:
        raise UsageError("expected --checkpoint FILE, or --model NAME --pretrained")
    subjects = find_subjects(args.model, args.checkpoint)
    rows = read_results(args.per_class) if args.per_class and args.per_class.is_file() else []
    shown: list[dict[str, Any]] = []

    def measure(subject: Subject) -> dict[str, Any]:
        record = _measure(args, subject, device, dtype)
        found = [{"model": subject.name, **row} for row in record.pop("per_class", [])]
        if found:
            rows[:] = [row for row in rows if row["model"] != subject.name] + found
            write_results(args.per_class, rows)
        shown.append(record)
        if len(subjects) > 1:
            logging.info("%s: top-1 %.2f %%, top-5 %.2f %%", subject.name, record["top1"], record["top5"])
        return record

    try:
        sweep(subjects, measure, results=args.results, settings=_settings(args))
    finally:
        if shown:
            print_table(shown, _COLUMNS + (_REAL_COLUMNS if args.real_labels else []))
    return 0


def _measure(
    args: argparse.Namespace, subject: Subject, device: torch.device, dtype: torch.dtype | None
) -> dict[str, Any]:
    """The record of one model."""
    own = argparse.Namespace(**{**vars(args), "model": subject.model, "checkpoint": subject.checkpoint})
    classifier = open_classifier(own)
    metrics = validate(
        classifier,
        args.data_dir,
        device=device,
        batch_size=args.batch_size,
        workers=args.workers,
        amp_dtype=dtype,
        options=data_options(args),
        real_labels=args.real_labels,
        per_class=args.per_class is not None,
    )
    return {
        "model": classifier.spec.model,
        **metrics,
        "checkpoint": subject.checkpoint,
        "data_dir": args.data_dir or "embedded digits",
        "amp_dtype": args.amp_dtype or "float32",
        "spec": classifier.spec.as_dict(),
        **environment(device),
    }


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the record of a model depends on beside the model."""
    given = ModelSpec().with_options(model_options(args) | {"model": None}).as_dict()
    usual = ModelSpec().as_dict()
    return {
        "data": data_id(args.data_dir),
        **data_options(args).as_dict(),
        "amp_dtype": args.amp_dtype or "float32",
        "real_labels": args.real_labels,
        "per_class": args.per_class is not None,
        **{name: value for name, value in given.items() if value != usual[name]},
    }
