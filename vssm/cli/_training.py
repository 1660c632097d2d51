"""What ``train``, ``validate`` and ``predict`` share: the options that name a model, and types of their values."""

import argparse
import ast
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from vssm.cli import UsageError
from vssm.cli._options import device, image_size, positive_int
from vssm.data import DataOptions
from vssm.engine.classifier import Classifier, ModelSpec, build, load

AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DATA_HELP = (
    "a folder with class folders in train/ and val/, or with tar files named after these parts; a .tar of such a "
    "folder; a pattern such as '{train-{0000..0127},val-{00..07}}.tar'; or hfds/NAME of the Hugging Face Hub; the "
    "embedded digits if absent"
)


def number(low: float, high: float = float("inf")) -> Callable[[str], float]:
    """Type of an option that is a number in a range, ends included."""

    def convert(text: str) -> float:
        expected = f"a number of at least {low:g}" if high == float("inf") else f"a number from {low:g} to {high:g}"
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    return convert


def count(text: str) -> int:
    """Type of an option that counts something that may be absent: an integer of at least 0."""
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return int(text)


def key_value(text: str) -> tuple[str, Any]:
    """Type of ``--model-kwargs``: ``depth=4``; the value is a Python literal, or else text."""
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE such as depth=4, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def add_model_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds the options that say how to build a model and its input; None means: as the model itself says."""
    group.add_argument("--model", metavar="NAME", help="a model of vssm (vssm list shows them) or of timm")
    add_model_settings(group)


def add_model_settings(group: argparse._ArgumentGroup) -> None:
    """Adds the options of `add_model_arguments` but for the model's name."""
    group.add_argument(
        "--pretrained", action=argparse.BooleanOptionalAction, help="load the model's published weights", default=None
    )
    group.add_argument(
        "--model-kwargs", type=key_value, nargs="+", metavar="NAME=VALUE", help="arguments of the model: depth=4 ..."
    )
    group.add_argument("--num-classes", type=positive_int, metavar="N", help="classes of the classifier")
    group.add_argument("--img-size", type=image_size, metavar="SIZE", help="224 or 160x256, height x width in pixels")
    group.add_argument("--in-chans", type=int, choices=(1, 3), help="1 for grey images, 3 for colour")
    group.add_argument("--mean", type=float, nargs="+", help="per channel, subtracted from values from 0 to 1")
    group.add_argument("--std", type=number(1e-6), nargs="+", help="per channel, divided by")
    group.add_argument("--interpolation", choices=("bilinear", "bicubic", "nearest"), help="of images in evaluation")
    group.add_argument(
        "--crop-pct", type=number(0.01, 1), metavar="SHARE", help="part of the resized image's side that is evaluated"
    )


def add_compute_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where and how to compute without training."""
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights, such as those that vssm train writes")
    parser.add_argument("--device", type=device, help="cpu, cuda, cuda:1 ...; a GPU by default if there is one")
    parser.add_argument("--batch-size", type=positive_int, default=64, metavar="N", help="images per step")
    parser.add_argument("--amp-dtype", choices=sorted(AMP_DTYPES), help="compute in half precision")


def add_data_arguments(parser: argparse.ArgumentParser, *, training: bool = False) -> None:
    """Adds the options that say how to read a data set, of which those who do not train see one part."""
    group = parser.add_argument_group("data", "Tar files hold class folders, or webdataset samples with .cls or .json")
    if training:
        group.add_argument("--train-split", metavar="NAME", help="what the data calls the part to train on")
    group.add_argument(
        "--val-split",
        metavar="NAME",
        help="what the data calls the part to validate on; val, validation, valid or test if absent",
    )
    group.add_argument(
        "--class-names", type=Path, metavar="FILE", help="names of the classes, one per line, in the order of indices"
    )
    group.add_argument(
        "--val-labels",
        type=Path,
        metavar="FILE",
        help="classes of images to validate on that lie in no class folders: lines IMAGE CLASS, or one CLASS per line",
    )
    group.add_argument("--image-key", metavar="NAME", help="column of the images, of hfds/ (default: image)")
    group.add_argument("--label-key", metavar="NAME", help="column of the classes, or key in .json (default: label)")


def data_options(args: argparse.Namespace) -> DataOptions:
    """How to read the data set."""
    return DataOptions(**{field.name: getattr(args, field.name, None) for field in fields(DataOptions)})


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options by the names of settings, with the types of these; None where an option was not given."""
    options = dict(vars(args))
    for name in ("mean", "std", "scale", "no_decay"):
        if options.get(name) is not None:
            options[name] = tuple(options[name])
    if options.get("model_kwargs") is not None:
        options["model_kwargs"] = dict(options["model_kwargs"])
    return options


def open_classifier(args: argparse.Namespace) -> Classifier:
    """The model that ``--checkpoint``, or ``--model`` with ``--pretrained``, names."""
    options = model_options(args)
    if args.checkpoint is not None:
        if args.pretrained:
            raise UsageError("expected --checkpoint or --pretrained, got both")
        return load(args.checkpoint, model=args.model, options=options)
    if args.model is None or not args.pretrained:
        raise UsageError("expected --checkpoint FILE, or --model NAME --pretrained")
    classifier = build(ModelSpec().with_options(options))
    classifier.model.eval()
    return classifier


def chosen_device(args: argparse.Namespace) -> torch.device:
    """The device of ``--device``, or the default one."""
    return args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def amp_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """The type that ``--amp-dtype`` names."""
    chosen = AMP_DTYPES.get(args.amp_dtype)
    if chosen == torch.float16 and chosen_device(args).type == "cpu":
        raise UsageError("--amp-dtype float16 needs a GPU; on the CPU, expected bfloat16")
    return chosen
