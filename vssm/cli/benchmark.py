"""Time models and measure their memory; or an op alone with --op, or reading images with --loader."""

import argparse
import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from vssm.cli import UsageError, _op_options
from vssm.cli._options import add_compile, device, image_size, picture_path, positive_int, results_path
from vssm.cli._training import add_data_arguments, count, data_options
from vssm.engine.attention_subjects import AttentionShape, a2mamba_shapes
from vssm.engine.benchmark import Setting, benchmark_models
from vssm.engine.benchmark_attention import benchmark_attention
from vssm.engine.benchmark_loader import LoaderSetting, benchmark_loader
from vssm.engine.benchmark_op import OpSetting, benchmark_op
from vssm.engine.op_plot import plot_op
from vssm.engine.profile import profile_rows
from vssm.engine.records import print_table, write_results
from vssm.engine.throughput_plot import plot_throughput
from vssm.engine.zoo import expand_names
from vssm_kernels import available_backends, use_backend

_HALF = ("bfloat16", "float16")
_BACKEND_HELP = "of the scan (default: VSSM_SCAN_BACKEND of the environment, or else auto)"
_MODEL_COLUMNS = ["model", "img_size", "params_m", "latency_ms", "batch_size", "images_per_s", "peak_memory_mib"]
_TRAIN_COLUMNS = ["train_batch_size", "train_images_per_s", "train_peak_memory_mib"]
_LOADER_COLUMNS = ["loader", "package", "images_per_s", "cpu_ms_per_image", "speed_over_timm", "cpu_over_timm"]
_OP_SIZES = {"scan": ("b", "k", "d", "n", "l"), "neighbourhood_attention": AttentionShape._fields}
_OP_COLUMNS = {
    "fwd ms": "forward_ms",
    "bwd ms": "backward_ms",
    "both ms": "forward_backward_ms",
    "floor/fwd": "forward_fraction_of_floor",
    "floor/bwd": "backward_fraction_of_floor",
    "peak MiB": "peak_memory_mib",
}
_AGAINST_COLUMNS = {
    "x fwd": "speedup_forward",
    "x bwd": "speedup_backward",
    "x both": "speedup_forward_backward",
    "error": "relative_error",
}
_ANCHOR_COLUMNS = {
    "anchor fwd": "anchor_forward_ms",
    "x anchor fwd": "speedup_over_anchor_forward",
    "anchor bwd": "anchor_backward_ms",
    "x anchor bwd": "speedup_over_anchor_backward",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="models of vssm, or of timm to compare with; patterns such as 'vim_tiny_*', too",
    )
    _add_model_arguments(parser.add_argument_group("models"))
    _add_op_arguments(parser.add_argument_group("an op alone"))
    _add_loader_arguments(parser)
    parser.add_argument("--device", type=device, help="cpu, cuda, cuda:1 ...; a GPU by default if there is one")
    parser.add_argument("--backend", choices=("auto", *available_backends()), help=_BACKEND_HELP)
    parser.add_argument("--amp-dtype", choices=_HALF, help="half precision: autocast of models, inputs of --op")
    parser.add_argument("--threads", type=positive_int, help="CPU threads; as many as cores by default")
    parser.add_argument("--warmup", type=positive_int, default=3, help="calls before the timed ones")
    parser.add_argument(
        "--repeats", type=_op_options.repeats, default=10, help="timed calls; the median and percentiles are kept"
    )
    parser.add_argument("--results", type=results_path, metavar="FILE", help="write the records to this .json or .csv")
    parser.add_argument(
        "--plot", type=picture_path, metavar="FILE", help="draw images per second, or with --op time over length"
    )


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table, writes the records and the plot."""
    asked = [name for name, value in (("models", args.models), ("--op", args.op), ("--loader", args.loader)) if value]
    if len(asked) != 1:
        raise UsageError(f"expected models, --op or --loader DATA, got {' and '.join(asked) or 'none of them'}")
    if args.plot and (args.loader or args.op not in (None, "scan")):
        raise UsageError(f"--plot draws models or --op, not {'--loader' if args.loader else args.op}")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: time and memory are known exactly on cpu and cuda only")
    with use_backend(args.backend) if args.backend else nullcontext():
        measure = _benchmark_op if args.op else _benchmark_loader if args.loader else _benchmark_models
        records = measure(args, device)
    if args.results:
        write_results(args.results, records)
    if args.plot:
        (plot_op if args.op else plot_throughput)(args.plot, records)
    return 0


def _add_model_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--batch-size", type=positive_int, help="128 on a GPU and 8 on a CPU by default; halved to fit")
    group.add_argument("--img-size", type=_image_sizes, metavar="SIZE,...", help="224 or 160x256, several with commas")
    group.add_argument("--train", action="store_true", help="also measure a training step")
    add_compile(group)
    group.add_argument("--profile", action="store_true", help="also tell which kernels a step spends its time in")


def _add_op_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--op",
        nargs="?",
        const="scan",
        choices=tuple(_OP_SIZES),
        help="measure directional_scan and selective_scan, or neighbourhood attention at the sizes of A2Mamba",
    )
    _op_options.add_shapes(group, "default")
    group.add_argument(
        "--against",
        type=_op_options.rivals,
        metavar="NAME,...",
        help="also measure "
        + "; for ".join(f"{op}: {', '.join(names)}" for op, names in _op_options.RIVALS.items())
        + "; speedups are over the first",
    )
    group.add_argument(
        "--anchors", type=_op_options.anchors, metavar="FILE", help="JSON file of times measured elsewhere"
    )
    group.add_argument(
        "--graph",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU, time replays of CUDA graphs, without the gaps between launches",
    )
    _op_options.add_jobs(group)


def _add_loader_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reading images")
    group.add_argument(
        "--loader",
        type=Path,
        metavar="DATA",
        help="measure the loaders of vssm and of timm on a data set, as vssm train",
    )
    group.add_argument("--workers", type=count, default=2, metavar="N", help="processes that read images")
    group.add_argument("--images", type=positive_int, default=2048, metavar="N", help="images of a pass at most")
    add_data_arguments(parser, training=True)


def _benchmark_loader(args: argparse.Namespace, device: torch.device) -> list[dict]:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    setting = LoaderSetting(
        device=device,
        batch_size=args.batch_size or 64,
        workers=args.workers,
        img_size=(args.img_size or [(224, 224)])[0],
        repeats=args.repeats,
        images=args.images,
    )
    records = benchmark_loader(args.loader, setting, options=data_options(args))
    print_table(records, _LOADER_COLUMNS)
    return records


def _benchmark_models(args: argparse.Namespace, device: torch.device) -> list[dict]:
    setting = Setting(
        device=device,
        batch_size=args.batch_size or (8 if device.type == "cpu" else 128),
        amp_dtype=_op_options.DTYPES.get(args.amp_dtype),
        train=args.train,
        compile=args.compile,
        profile=args.profile,
        warmup=args.warmup,
        repeats=args.repeats,
    )
    keep = partial(write_results, args.results) if args.results else None
    records = benchmark_models(expand_names(args.models), setting, img_sizes=args.img_size or [None], keep=keep)
    print_table(records, _MODEL_COLUMNS + (_TRAIN_COLUMNS if args.train else []))
    for record in records:
        for step in ("profile", "train_profile"):
            if step in record:
                print()
                print_table(profile_rows(record, step), ["model", "step", "part", "ms", "share"])
    return records


def _benchmark_op(args: argparse.Namespace, device: torch.device) -> list[dict]:
    known = _op_options.RIVALS[args.op]
    unknown = next((name for name in args.against or () if name not in known), None)
    if unknown is not None:
        raise UsageError(f"--against: expected some of {', '.join(known)} for {args.op}, got {unknown!r}")
    setting = OpSetting(
        device=device,
        dtype=_op_options.DTYPES[args.amp_dtype or "float32"],
        against=args.against or (),
        graph=args.graph,
        warmup=args.warmup,
        repeats=args.repeats,
        processes=args.jobs,
    )
    if args.op == "scan":
        records = benchmark_op(args.shapes, setting, anchors=args.anchors)
    else:
        batch_size = args.batch_size or (8 if device.type == "cpu" else 128)
        records = benchmark_attention(a2mamba_shapes(batch_size), setting)
    columns = {key: key for key in ("op", *_OP_SIZES[args.op])} | _OP_COLUMNS
    columns |= (_AGAINST_COLUMNS if args.against else {}) | (_ANCHOR_COLUMNS if args.anchors else {})
    print_table([{head: record.get(key) for head, key in columns.items()} for record in records], list(columns))
    return records


def _image_sizes(text: str) -> list[tuple[int, int]]:
    return [image_size(part.strip()) for part in text.split(",")]
