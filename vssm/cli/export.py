"""Write models as programs for other runtimes, ONNX or .pt2.

An ONNX file needs operators of ONNX alone. A .pt2 file, which torch.export.load reads, keeps the scan as one op and
runs where vssm was imported before; with --decompose it needs torch alone. Images go in by any number, and in any size
with --dynamic-size. The file is run on random images and compared with the model before it is kept, and names the
model, its input size and how to normalise images. One image is timed in the program and in the model by turns;
--benchmark keeps these times and no file.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from vssm.cli import UsageError
from vssm.cli._op_options import repeats
from vssm.cli._options import positive_int, results_path
from vssm.cli._training import add_model_settings, count, model_options
from vssm.engine.classifier import Classifier, ModelSpec, build, load
from vssm.engine.export import FORMATS, ExportSetting, check_packages, export
from vssm.engine.memory import release
from vssm.engine.records import environment, write_results
from vssm.engine.zoo import expand_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="models of vssm (vssm list shows them), or patterns such as 'vim_tiny_*'; that of --checkpoint if absent",
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights, such as those that vssm train writes")
    parser.add_argument(
        "--format", choices=FORMATS, help="what to write; what --output ends in, or else onnx, if absent"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write; MODEL.onnx or MODEL.pt2 if absent")
    parser.add_argument(
        "--dynamic-size",
        type=positive_int,
        nargs="?",
        const=1024,
        metavar="PIXELS",
        help="take images of any size up to so many pixels a side (1024 if no number is given)",
    )
    parser.add_argument("--decompose", action="store_true", help="a .pt2 file that runs without vssm")
    parser.add_argument(
        "--features",
        type=count,
        nargs="*",
        metavar="I",
        help="write maps instead of logits, those of the stages or blocks I, counted from 0; of all if none is given",
    )
    parser.add_argument("--benchmark", action="store_true", help="compare and time, but keep no file")
    parser.add_argument("--threads", type=positive_int, help="CPU threads of the times; as many as cores by default")
    parser.add_argument("--warmup", type=positive_int, default=3, help="calls before the timed ones")
    parser.add_argument("--repeats", type=repeats, default=10, help="timed calls; the median is kept")
    parser.add_argument("--results", type=results_path, metavar="FILE", help="write the records to this .json or .csv")
    add_model_settings(parser.add_argument_group("model", "None given: as the checkpoint or the model itself says"))


def run(args: argparse.Namespace) -> int:
    """Writes the files, and says what came of the comparison."""
    if args.threads:
        torch.set_num_threads(args.threads)
    setting = ExportSetting(
        format=_format(args),
        decompose=args.decompose,
        largest=args.dynamic_size,
        features=args.features,
        warmup=args.warmup,
        repeats=args.repeats,
    )
    names = _names(args)
    if setting.format == "onnx":
        check_packages()  # before weights are downloaded
    records: list[dict[str, Any]] = []
    with TemporaryDirectory() if args.benchmark else nullcontext(".") as folder:
        for name in names:
            records.append(_export(name, Path(folder), args, setting))
            if args.results:
                write_results(args.results, records)
            release()
    return 0


def _names(args: argparse.Namespace) -> list[str | None]:
    """The models to write; None for the one that a checkpoint names."""
    names = expand_names(args.models)
    if len(names) > 1 and (args.checkpoint or args.output):
        option = "--checkpoint" if args.checkpoint else "--output"
        raise UsageError(f"{option} belongs to one model, got {len(names)}: {', '.join(names)}")
    if args.benchmark and args.output:
        raise UsageError("expected --output or --benchmark, which keeps no file, got both")
    if not names and args.checkpoint is None:
        raise UsageError("expected a model, or --checkpoint FILE, which names one")
    return [*names] or [None]


def _export(name: str | None, folder: Path, args: argparse.Namespace, setting: ExportSetting) -> dict[str, Any]:
    classifier = _open(name, args)
    path = args.output or folder / f"{classifier.spec.model}.{setting.format}"
    record = export(classifier, path, setting)
    if args.benchmark:
        path.unlink()
    _print(path.name if args.benchmark else str(path), record)
    return record | environment("cpu")


def _format(args: argparse.Namespace) -> str:
    named = None if args.output is None else args.output.suffix.lower().removeprefix(".")
    chosen = args.format or (named if named in FORMATS else "onnx")
    if named not in (None, chosen):
        raise UsageError(f"--output: expected a file name ending in .{chosen}, got {str(args.output)!r}")
    if args.decompose and chosen != "pt2":
        raise UsageError("--decompose belongs to --format pt2; onnx files never need vssm")
    return chosen


def _open(name: str | None, args: argparse.Namespace) -> Classifier:
    options = model_options(args) | {"model": name}
    if args.checkpoint is not None:
        if args.pretrained:
            raise UsageError("expected --checkpoint or --pretrained, got both")
        return load(args.checkpoint, model=name, options=options)
    classifier = build(ModelSpec().with_options(options))
    classifier.model.eval()
    return classifier


def _print(file: str, record: dict[str, Any]) -> None:
    opset = f", opset {record['opset']}" if "opset" in record else ""
    print(f"file       {file}, {record['file_mib']:.1f} MiB{opset}")
    print(f"difference {record['error_over_peak']:.1e} of the peak of the model's outputs")
    print(f"one image  {record['latency_ms']:.1f} ms, {record['torch_latency_ms']:.1f} ms by the model in torch")
