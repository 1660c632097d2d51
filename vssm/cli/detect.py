"""Find objects in images with Mamba-YOLO, or a detector of torchvision or mmdetection."""

import argparse
from pathlib import Path

import torch

from vssm.cli import UsageError
from vssm.cli._options import add_images, check_none_left_out, device, named, positive_int, results_path
from vssm.cli._training import number
from vssm.engine.detect import DETECTORS, Detector, detect, open_mambayolo, open_mmdet, open_torchvision
from vssm.engine.records import write_results
from vssm.engine.views import image_files

_MAMBAYOLO = "mambayolo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    add_images(parser)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="weights of the whole detector")
    parser.add_argument("--recipe", type=Path, metavar="FILE.py", help="its config, for a detector of mmdetection")
    parser.add_argument(
        "--detector", choices=sorted([_MAMBAYOLO, *DETECTORS]), help="its kind, for Mamba-YOLO or one of torchvision"
    )
    parser.add_argument("--model", metavar="NAME", help="its backbone, with --detector")
    parser.add_argument("--class-names", nargs="+", metavar="NAME", help="its classes, with --detector")
    parser.add_argument(
        "--min-size", type=positive_int, default=800, metavar="N", help="shorter side of images for torchvision"
    )
    parser.add_argument(
        "--img-size", type=positive_int, default=640, metavar="N", help="longer side of images for Mamba-YOLO"
    )
    parser.add_argument(
        "--threshold", type=number(0, 1), default=0.5, metavar="P", help="least score of an object that is told"
    )
    parser.add_argument("--device", type=device, metavar="DEVICE", help="cpu, cuda, cuda:1 ...; a GPU if there is one")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw boxes and masks into the images, for here")
    parser.add_argument("--results", type=results_path, metavar="FILE", help="write the objects to this .json or .csv")


def run(args: argparse.Namespace) -> int:
    """Prints what was found; writes pictures and results; exit status 1 at the end if images could not be read."""
    detector = _open(args, args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    files = image_files(args.images)
    records = detect(detector, files, threshold=args.threshold, pictures=args.pictures, every=args.every)
    for record in records:
        print(f"{named(record)}: {len(record['objects'])} objects")
        for each in record["objects"]:
            box = ", ".join(f"{side:.0f}" for side in each["box"])
            print(f"  {each['score']:8.2%}  {each['class']}  ({box})")
    if args.results:
        write_results(args.results, records)
        print(f"{args.results}: {len(records)} images")
    check_none_left_out(read=len({record["image"] for record in records}), images=len(set(files)))
    return 0


def _open(args: argparse.Namespace, place: torch.device) -> Detector:
    others = {"--detector": args.detector, "--model": args.model, "--class-names": args.class_names}
    given = [option for option, value in others.items() if value is not None]
    if args.recipe is not None and not given:
        return open_mmdet(args.recipe, args.checkpoint, device=place)
    if args.recipe is not None or len(given) < len(others):
        raise UsageError(
            f"expected --recipe, for mmdetection, or {', '.join(others)}, for Mamba-YOLO and torchvision; "
            f"got {', '.join([*(['--recipe'] if args.recipe else []), *given]) or 'neither'}"
        )
    if args.detector == _MAMBAYOLO:
        return open_mambayolo(
            args.model, args.checkpoint, classes=args.class_names, device=place, img_size=args.img_size
        )
    return open_torchvision(
        args.detector, args.model, args.checkpoint, classes=args.class_names, device=place, min_size=args.min_size
    )
