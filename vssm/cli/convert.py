"""Convert an authors' checkpoint to safetensors."""

import argparse
from pathlib import Path

from vssm.cli._options import image_size, positive_int
from vssm.engine.convert import convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument("file", help="the authors' checkpoint")
    parser.add_argument("--model", required=True, metavar="NAME", help="model it belongs to (vssm list shows them)")
    parser.add_argument(
        "--task",
        choices=["classify", "detect", "segment"],
        default="classify",
        help="detect, segment: all weights of the detector or segmentor that its authors put around it",
    )
    parser.add_argument("--output", metavar="FILE", help="file to write; that of the checkpoint with .safetensors")
    parser.add_argument("--num-classes", type=positive_int, metavar="N", help="classes of the checkpoint")
    parser.add_argument(
        "--img-size", type=image_size, metavar="SIZE", help="input size of the checkpoint: 512, 160x256"
    )
    parser.add_argument(
        "--entry",
        metavar="NAME",
        help="where in the file the weights are, such as model_ema; the plain ones by default",
    )
    parser.add_argument("--url", help="where the file came from, for the record")
    parser.add_argument(
        "--trust-pickle", action="store_true", help="let the file run code; only if you trust where it came from"
    )


def run(args: argparse.Namespace) -> int:
    """Converts the file and says where the result is."""
    record = convert(
        args.file,
        args.model,
        task=args.task,
        output=args.output,
        num_classes=args.num_classes,
        img_size=args.img_size,
        url=args.url,
        entry=args.entry,
        trust_pickle=args.trust_pickle,
    )
    folder = Path(args.output or args.file).parent
    print(f"weights  {folder / record['file']} ({len(record['keys'])} keys of the checkpoint)")
    print(f"record   {(folder / record['file']).with_suffix('.json')}")
    for key, reason in record["dropped"].items():
        print(f"left out {key}: {reason}")
    return 0
