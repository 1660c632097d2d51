"""Count a model's parameters and operations."""

import argparse
import json
from pathlib import Path

from vssm.cli import UsageError
from vssm.cli._options import image_size, positive_int, results_path
from vssm.engine.info import describe
from vssm.engine.records import environment, print_table, write_results
from vssm.pruning import read_schedule

_COLUMNS = ["part", "params", "matmul_macs", "conv_macs", "scan_ops", "activations"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument(
        "model", nargs="?", help="a model of vssm (vssm list shows them) or of timm; that of --prune if absent"
    )
    parser.add_argument(
        "--img-size", type=image_size, metavar="SIZE", help="224 or 160x256; the model's own by default"
    )
    parser.add_argument("--batch-size", type=positive_int, default=1, help="images in the forward pass")
    parser.add_argument(
        "--prune", type=Path, metavar="FILE.yaml", help="count operations on fewer tokens, too, as this schedule says"
    )
    parser.add_argument("--json", action="store_true", help="print the record as JSON instead of a table")
    parser.add_argument("--results", type=results_path, metavar="FILE", help="write the record to this .json or .csv")


def run(args: argparse.Namespace) -> int:
    """Prints the counts of every part and their sums, beside the published figures."""
    schedule = None if args.prune is None else read_schedule(args.prune)
    model = args.model or (schedule and schedule.model)
    if model is None:
        raise UsageError("expected a model, or --prune FILE.yaml, which names one")
    record = describe(model, img_size=args.img_size, batch_size=args.batch_size, prune=schedule)
    if args.json:
        print(json.dumps(record, indent=2))
    else:
        _print(record)
    if args.results:
        write_results(args.results, [record | environment("cpu")])
    return 0


def _print(record: dict) -> None:
    height, width = record["img_size"]
    print(f"{record['model']}, {record['batch_size']} x {height}x{width}")
    print_table([*record["parts"], {"part": "total"} | record], _COLUMNS)
    print(f"params        {record['params_m']:.3f} M (published: {_known(record['published_params_m'], 'M')})")
    print(f"matmul + conv {record['gmacs']:.3f} G multiply-adds")
    print(f"scan          {record['scan_gops']:.3f} G operations (9 b k d l n)")
    print(f"sum           {record['total_gflops']:.3f} G (published FLOPs: {_known(record['published_gflops'], 'G')})")
    print(f"activations   {record['activations_m']:.3f} M elements written by them")
    if "prune" in record:
        print(f"tokens left   {', '.join(map(str, record['tokens_left']))}")
        print(f"sum on them   {record['pruned_gflops']:.3f} G, {record['pruned_over_dense']:.3f} of all")
    if record["published_source"]:
        print(f"published in  {record['published_source']}")


def _known(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value} {unit}"
