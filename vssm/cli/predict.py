"""Name the classes of images, with probabilities."""

import argparse
import logging
from pathlib import Path
from typing import Any

from vssm.cli._options import check_none_left_out, positive_int, results_path
from vssm.cli._training import (
    add_compute_arguments,
    add_data_arguments,
    add_model_arguments,
    amp_dtype,
    chosen_device,
    count,
    data_options,
    open_classifier,
)
from vssm.engine.contact_sheet import draw_contact_sheet
from vssm.engine.predict import flat_record, gather_images, predict
from vssm.engine.records import write_results

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_SHOWN = 10  # images on the terminal where a file has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="image files, folders of such, and data sets as vssm validate takes them: a .tar, a pattern, hfds/NAME",
    )
    add_compute_arguments(parser)
    parser.add_argument("--workers", type=count, default=0, metavar="N", help="processes that read images")
    parser.add_argument("--top-k", type=positive_int, default=5, metavar="N", help="classes per image")
    parser.add_argument(
        "--results", type=results_path, metavar="FILE", help="write the predictions to this .json or .csv"
    )
    parser.add_argument("--picture", type=_picture, metavar="FILE", help="draw the images with their predicted classes")
    add_data_arguments(parser)
    add_model_arguments(parser.add_argument_group("model", "None given: as the checkpoint or the model itself says"))


def run(args: argparse.Namespace) -> int:
    """Prints the most probable classes of every image; writes the predictions and the picture.

    Images that cannot be read are named, and end the command with exit status 1 after all others.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dtype = amp_dtype(args)
    classifier = open_classifier(args)
    images = gather_images(args.images, classifier, options=data_options(args))
    records = predict(
        classifier,
        images,
        device=chosen_device(args),
        top_k=args.top_k,
        batch_size=args.batch_size,
        workers=args.workers,
        amp_dtype=dtype,
    )
    _print(records[: _SHOWN if args.results else None])
    if args.results:
        flat = args.results.suffix.lower() == ".csv"
        write_results(args.results, [flat_record(record) for record in records] if flat else records)
        print(f"{args.results}: {len(records)} of {len(images)} images")
    if args.picture and records:
        drawn = draw_contact_sheet(args.picture, images, records, title=f"Predictions of {classifier.spec.model}")
        print(f"{args.picture}: {drawn} of {len(records)} images")
    check_none_left_out(read=len(records), images=len(images))
    return 0


def _print(records: list[dict[str, Any]]) -> None:
    for record in records:
        print(record["image"] + ("" if record["true"] is None else f"  (true: {record['true']})"))
        for each in record["predictions"]:
            print(f"  {each['probability']:8.2%}  {each['class']}")


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(f"expected a file name ending in {', '.join(_PICTURES)}, got {text!r}")
    return path
