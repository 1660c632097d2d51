"""Measure accuracy and speed on fewer tokens, for several shares and ways to choose them."""

import argparse
from pathlib import Path

from vssm.cli import UsageError
from vssm.cli._options import picture_path, results_path
from vssm.cli._training import (
    DATA_HELP,
    add_compute_arguments,
    add_data_arguments,
    add_model_arguments,
    amp_dtype,
    chosen_device,
    count,
    data_options,
    number,
    open_classifier,
)
from vssm.engine.prune import PruneSetting, grid_of, measure_reductions, plot_reductions
from vssm.engine.records import environment, print_table, write_results
from vssm.pruning import ALIGNMENTS, CONVOLUTIONS, METHODS, SCORES, Schedule, read_schedule

_COLUMNS = ["policy", "align", "keep", "tokens_left", "gflops", "over_dense", "top1", "images_per_s"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument("data_dir", nargs="?", type=Path, metavar="DATA", help=DATA_HELP)
    group = parser.add_argument_group(
        "tokens", "All combinations of --keep, --policy and --align are measured; those of --schedule if absent"
    )
    group.add_argument(
        "--schedule", type=Path, metavar="FILE.yaml", help="where to cut, and how, such as those in configs/pruning"
    )
    group.add_argument(
        "--after", type=count, nargs="+", metavar="N", help="cut after these blocks, counted from 1 through all stages"
    )
    group.add_argument(
        "--keep", type=number(0.01, 1), nargs="+", metavar="SHARE", help="share of the patch tokens a cut keeps"
    )
    group.add_argument("--policy", choices=list(METHODS), nargs="+", help="which tokens go, or are merged")
    group.add_argument("--align", choices=ALIGNMENTS, nargs="+", help="how scans treat tokens that are gone")
    group.add_argument("--score", choices=list(SCORES), help="what makes tokens important; the policy's own if absent")
    group.add_argument("--conv", choices=CONVOLUTIONS, help="what convolutions see; what suits --align if absent")
    add_compute_arguments(parser)
    parser.add_argument("--workers", type=count, default=0, metavar="N", help="processes that read images")
    parser.add_argument("--results", type=results_path, metavar="FILE", help="write the records to this .json or .csv")
    parser.add_argument("--plot", type=picture_path, metavar="FILE", help="draw accuracy against images per second")
    add_data_arguments(parser)
    add_model_arguments(parser.add_argument_group("model", "None given: as the checkpoint or the model itself says"))


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table, writes the records and the plot."""
    base = _base(args)
    if args.model is None and args.checkpoint is None:
        args.model = base.model or None
    setting = PruneSetting(chosen_device(args), args.batch_size, args.workers, amp_dtype(args))
    classifier = open_classifier(args)
    about = {
        "model": classifier.spec.model,
        "checkpoint": args.checkpoint,
        "data_dir": args.data_dir or "embedded digits",
        "amp_dtype": args.amp_dtype or "float32",
    }

    def keep(records: list[dict]) -> None:
        if args.results:
            write_results(args.results, [{**about, **record, **environment(setting.device)} for record in records])

    records = measure_reductions(
        classifier,
        args.data_dir,
        grid_of(base, keeps=args.keep or (), policies=args.policy or (), aligns=args.align or ()),
        setting,
        options=data_options(args),
        done=keep,
    )
    print_table(records, _COLUMNS)
    if args.plot:
        plot_reductions(args.plot, records, model=classifier.spec.model)
    return 0


def _base(args: argparse.Namespace) -> Schedule:
    """The schedule that the options vary."""
    if args.schedule is None and (args.after is None or args.keep is None):
        raise UsageError("expected --schedule FILE.yaml, or --after and --keep")
    base = Schedule(model="", after=()) if args.schedule is None else read_schedule(args.schedule)
    given = {name: getattr(args, name) for name in ("after", "score", "conv") if getattr(args, name) is not None}
    if "after" in given:
        given["after"] = tuple(given["after"])
    return base.with_options(**given)
