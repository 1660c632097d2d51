"""Find the class of every pixel of images with a segmentor of mmsegmentation."""

import argparse
from pathlib import Path

import torch

from vssm.cli._options import add_images, check_none_left_out, device, named, results_path
from vssm.engine.records import write_results
from vssm.engine.segment import open_mmseg, segment
from vssm.engine.views import image_files

_SHOWN = 5  # classes of an image on the terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    add_images(parser)
    parser.add_argument("--recipe", type=Path, required=True, metavar="FILE.py", help="config of the segmentor")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="its weights")
    parser.add_argument("--device", type=device, metavar="DEVICE", help="cpu, cuda, cuda:1 ...; a GPU if there is one")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write the images in colours of classes to here")
    parser.add_argument("--results", type=results_path, metavar="FILE", help="write the shares to this .json or .csv")


def run(args: argparse.Namespace) -> int:
    """Prints the largest classes of every image; writes pictures and results; as vssm detect, may leave images out."""
    place = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    segmentor = open_mmseg(args.recipe, args.checkpoint, device=place)
    files = image_files(args.images)
    records = segment(segmentor, files, pictures=args.pictures, every=args.every)
    for record in records:
        print(named(record))
        for name, share in list(record["shares"].items())[:_SHOWN]:
            print(f"  {share:8.2%}  {name}")
    if args.results:
        write_results(args.results, records)
        print(f"{args.results}: {len(records)} images")
    check_none_left_out(read=len({record["image"] for record in records}), images=len(set(files)))
    return 0
