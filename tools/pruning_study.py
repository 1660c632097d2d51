"""Trained models on fewer tokens, before and after training on so few: ``pruning_study.py DATA --dense RUN...``.

Evaluates every dense run on all tokens and on those that each policy, alignment and share leaves, trains each of these
further with ``vssm train``, several at a time, and evaluates again. What is done is kept in --output: called again, it
goes on, and says what is known so far. SIGTERM and Ctrl-C end it with the states of runs written.
"""

import argparse
import itertools
import logging
import sys
import time
from pathlib import Path

from vssm.cli import UsageError
from vssm.cli._options import Parser, picture_path, positive_int, results_path
from vssm.cli._options import device as device_type
from vssm.cli._training import AMP_DTYPES, DATA_HELP, amp_dtype, chosen_device, count, number
from vssm.engine.classifier import load
from vssm.engine.pruning_study import Evaluations, Study, records_of, train_on, unfinished, variants_of, weights_of
from vssm.engine.pruning_study_plot import draw_study
from vssm.engine.records import environment, print_table, write_results
from vssm.engine.stopping import stop_on_signals
from vssm.pruning import ALIGNMENTS, CONVOLUTIONS, METHODS, Schedule

_RECIPE = Path(__file__).parents[1] / "configs/small/images_64_fewer_tokens.yaml"
_COLUMNS = ["policy", "align", "conv", "keep", "over_dense", "epochs", "top1"]
_COLUMNS += [f"{name}{end}" for name in ("difference", "over_none") for end in ("", "_low", "_high")]


def _parser() -> Parser:
    parser = Parser(prog="pruning_study.py", description=__doc__)
    parser.add_argument("data_dir", nargs="?", type=Path, metavar="DATA", help=DATA_HELP)
    parser.add_argument(
        "--dense",
        nargs="+",
        type=Path,
        required=True,
        metavar="RUN",
        help="folders that vssm train has written, with other seeds but for nothing else, or checkpoints",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="keeps what has been done")
    parser.add_argument(
        "--after", type=count, nargs="+", default=[5, 10, 15], metavar="N", help="cut after these blocks"
    )
    parser.add_argument(
        "--keep", type=number(0.01, 1), nargs="+", default=[0.8, 0.72], metavar="SHARE", help="that a cut keeps"
    )
    parser.add_argument("--policy", choices=list(METHODS), nargs="+", default=list(METHODS), help="which tokens go")
    parser.add_argument(
        "--align",
        type=_way,
        nargs="+",
        metavar="ALIGN[:CONV]",
        help="how scans treat tokens that are gone, and after a colon what convolutions see, if not what is usual "
        f"(default: {' '.join(ALIGNMENTS)})",
    )
    parser.add_argument("--epochs", type=count, default=10, metavar="N", help="of training on fewer tokens; 0 for none")
    parser.add_argument("--recipe", type=Path, default=_RECIPE, metavar="FILE.yaml", help="options of that training")
    parser.add_argument("--jobs", type=positive_int, default=1, metavar="N", help="runs at a time, on one device")
    parser.add_argument(
        "--workers", type=count, default=2, metavar="N", help="processes that read images, for each run"
    )
    parser.add_argument(
        "--limit-s", type=number(0), default=float("inf"), metavar="S", help="seconds after which runs are stopped"
    )
    parser.add_argument("--device", type=device_type, help="cpu, cuda, cuda:1 ...; a GPU by default if there is one")
    parser.add_argument("--batch-size", type=positive_int, default=250, metavar="N", help="images per step, evaluating")
    parser.add_argument("--amp-dtype", choices=sorted(AMP_DTYPES), help="evaluate in half precision")
    parser.add_argument("--results", type=results_path, metavar="FILE", help="write the records to this .json or .csv")
    parser.add_argument("--plot", type=picture_path, metavar="FILE", help="draw accuracy against operations")
    return parser


def _way(text: str) -> tuple[str, str | None]:
    align, _, conv = text.partition(":")
    if align not in ALIGNMENTS or conv not in ("", *CONVOLUTIONS):
        known = f"{', '.join(ALIGNMENTS)}, alone or with :{' or :'.join(CONVOLUTIONS)}"
        raise argparse.ArgumentTypeError(f"expected one of {known}, got {text!r}")
    return align, conv or None


def main() -> int:
    """Does what is left of the study, prints a table, writes the records and the plot."""
    began = time.monotonic()
    args = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    base = Schedule(load(weights_of(args.dense[0])).spec.model, after=tuple(args.after))
    study = Study(
        data_dir=args.data_dir,
        dense=tuple(map(weights_of, args.dense)),
        folder=args.output,
        recipe=args.recipe,
        epochs=args.epochs,
        schedules=tuple(
            base.with_options(policy=policy, align=align, conv=conv, keep=keep)
            for policy, (align, conv), keep in itertools.product(
                args.policy, args.align or map(_way, ALIGNMENTS), args.keep
            )
        ),
        device=chosen_device(args),
        batch_size=args.batch_size,
        amp_dtype=amp_dtype(args),
    )
    study.claim()
    variants, evaluations = variants_of(study), Evaluations(study)
    evaluations.all_as_they_are(variants)
    with stop_on_signals() as stop:
        failed = train_on(
            study,
            variants,
            at_once=args.jobs,
            workers=args.workers,
            stop=lambda: bool(stop) or time.monotonic() - began > args.limit_s,
            ended=lambda variant, number: evaluations.hits(variant, number, trained=True),
        )
    records = records_of(study, variants, evaluations)
    print_table(records, _COLUMNS)
    if args.results:
        about = {"model": base.model, "data": study.data_name, "amp_dtype": args.amp_dtype or "float32"}
        write_results(args.results, [{**about, **record, **environment(study.device)} for record in records])
    if args.plot:
        draw_study(args.plot, records)
    if left := unfinished(study, variants):
        logging.info("%d of %d runs are left; the same call goes on", len(left), len(variants) * len(study.dense))
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UsageError, ValueError, OSError) as error:
        sys.exit(f"pruning_study.py: {error}")
