"""Put the linear layers of a trained model into 8-bit integers, and compare it with the model in float.

Weights and inputs of linear layers become 8-bit integers: a quarter of the size, and on x86 CPUs with VNNI faster
products. Ranges of inputs are those seen on training images. What scans read is clipped at a percentile, and what they
give goes through a Hadamard transform, which spreads outliers, before it is rounded. Scans and convolutions compute in
float. vssm validate and predict take the file as any other checkpoint; it can be neither trained nor exported.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from vssm.cli import UsageError
from vssm.cli._op_options import repeats
from vssm.cli._options import device, positive_int, results_path
from vssm.cli._training import (
    DATA_HELP,
    add_data_arguments,
    add_model_arguments,
    chosen_device,
    count,
    data_options,
    number,
    open_classifier,
)
from vssm.engine.quantize import QuantizeSetting, quantize_classifier
from vssm.engine.records import environment, write_results

_MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        metavar="CHECKPOINT",
        help="weights in float, such as those that vssm train writes; --model NAME --pretrained if absent",
    )
    parser.add_argument(
        "--data", dest="data_dir", type=Path, metavar="DATA", help=f"its training part calibrates: {DATA_HELP}"
    )
    parser.add_argument(
        "--output",
        type=_safetensors,
        metavar="FILE",
        help="file to write, with its description beside it; MODEL-int8.safetensors if absent",
    )
    parser.add_argument("--results", type=results_path, metavar="FILE", help="write the record to this .json or .csv")
    group = parser.add_argument_group("quantisation")
    group.add_argument(
        "--calibration-images",
        type=positive_int,
        default=256,
        metavar="N",
        help="training images, evenly spread over the data, to find ranges on",
    )
    group.add_argument(
        "--percentile",
        type=number(50, 100),
        default=99.999,
        metavar="P",
        help="of the input of scans, which is clipped there and at 100 − P; 100 clips nothing",
    )
    group.add_argument(
        "--hadamard",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="transform the output of scans by Hadamard matrices, whose inverse is in the weights of out_proj",
    )
    parser.add_argument("--device", type=device, help="cpu, cuda, cuda:1 ...; a GPU by default if there is one")
    parser.add_argument("--batch-size", type=positive_int, default=64, metavar="N", help="images per step")
    parser.add_argument("--workers", type=count, default=0, metavar="N", help="processes that read images")
    parser.add_argument("--threads", type=positive_int, help="CPU threads; as many as cores by default")
    parser.add_argument(
        "--repeats",
        type=repeats,
        default=20,
        help="timed calls with one image, in each of three turns; the median is kept",
    )
    add_data_arguments(parser)
    add_model_arguments(parser.add_argument_group("model", "None given: as the checkpoint or the model itself says"))


def run(args: argparse.Namespace) -> int:
    """Writes the file, and says what became of size, accuracy and speed."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.checkpoint is None and not args.pretrained:
        raise UsageError("expected CHECKPOINT, or --model NAME --pretrained")
    if args.threads:
        torch.set_num_threads(args.threads)
    setting = QuantizeSetting(
        device=chosen_device(args),
        images=args.calibration_images,
        percentile=args.percentile,
        hadamard=args.hadamard,
        batch_size=args.batch_size,
        workers=args.workers,
        repeats=args.repeats,
    )
    classifier = open_classifier(args)
    path = args.output or Path(f"{classifier.spec.model}-int8.safetensors")
    _check_names(args, path)
    record = quantize_classifier(classifier, args.data_dir, path, setting, options=data_options(args))
    _print(path, record)
    if args.results:
        about = {
            "model": classifier.spec.model,
            "checkpoint": args.checkpoint,
            "data_dir": args.data_dir or "embedded digits",
        }
        more = {"spec": classifier.spec.as_dict(), **environment(setting.device)}
        write_results(args.results, [about | record | more])
    return 0


def _check_names(args: argparse.Namespace, path: Path) -> None:
    """Refuses to write one file over another."""
    if args.checkpoint and args.checkpoint.resolve() == path.resolve():
        raise UsageError(f"--output: {path} is the checkpoint in float; expected another name")
    if args.results and args.results.resolve() == path.with_suffix(".json").resolve():
        raise UsageError(f"--results: {args.results} is where the description of {path} goes; expected another name")


def _print(path: Path, record: dict[str, Any]) -> None:
    parts = ", ".join(f"{name} {share:.1f} %" for name, share in record["float_percent"].items() if share >= 0.05)
    kept = f"; {record['kept_layers']} whose weights are used without a call are not" if record["kept_layers"] else ""
    print(f"layers     {record['int8_layers']} linear layers in integers{kept}")
    print(f"parameters {record['int8_percent']:.1f} % in integers; in float: {parts}")
    sizes = f"{record['bytes'] / _MIB:.1f} MiB, {record['size_percent']:.1f} % of {record['float_bytes'] / _MIB:.1f}"
    print(f"file       {path}, {sizes}")
    print(
        f"top-1      {record['top1']:.2f} % of {record['images']} images, {record['float_top1']:.2f} % in float; "
        f"the same answer for {record['agreement']:.2f} %"
    )
    print(f"one image  {record['latency_ms']:.1f} ms, {record['float_latency_ms']:.1f} ms in float")


def _safetensors(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".safetensors":
        raise argparse.ArgumentTypeError(f"expected a file name ending in .safetensors, got {text!r}")
    return path
