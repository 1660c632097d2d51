"""Train a classifier on class folders, or on the embedded digits."""

import argparse
import logging
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from timm.optim import list_optimizers

from vssm.cli import UsageError
from vssm.cli._options import add_compile, device, nearest, positive_int
from vssm.cli._training import (
    AMP_DTYPES,
    DATA_HELP,
    add_data_arguments,
    add_model_arguments,
    chosen_device,
    count,
    data_options,
    model_options,
    number,
)
from vssm.data import DataOptions
from vssm.engine import distributed
from vssm.engine.checkpoints import read_state, state_files
from vssm.engine.dry_run import dry_run
from vssm.engine.progress import duration
from vssm.engine.recipe import DENSE, DIGITS, Recipe
from vssm.engine.stopping import Stopped, stop_on_signals
from vssm.engine.train import train
from vssm.engine.training_setup import SaveEvery, Setting
from vssm.pruning import read_schedule

_DEFAULTS = Recipe()
_SEED_LIMIT = 2**32 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command. Those of the recipe default to None, which stands for the recipe's value."""
    parser.add_argument(
        "data_dir",
        nargs="?",
        type=Path,
        metavar="DATA",
        help=f"{DATA_HELP}, with settings of their own",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="new or empty folder; output/MODEL-DATE-TIME if absent"
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="go on with the run in a folder, with its settings; auto: with the one in --output, if there is one",
    )
    parser.add_argument("--initial-checkpoint", type=Path, metavar="FILE", help="weights to start from")
    parser.add_argument("--device", type=device, help="cpu, cuda, cuda:1 ...; a GPU by default if there is one")
    parser.add_argument(
        "--workers",
        type=count,
        metavar="N",
        help="processes that read images (default: 4 or as many as cores, digits: 0)",
    )
    parser.add_argument(
        "--save-every",
        type=_save_every,
        metavar="N|MINUTESm",
        default=Setting.save_every,
        help="write the state to resume from every N steps, or minutes (default: 15m), and after every epoch",
    )
    parser.add_argument("--keep", type=positive_int, default=Setting.keep, metavar="N", help="states to keep")
    parser.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard, too")
    parser.add_argument(
        "--dry-run", action="store_true", help="take two steps, say what memory and time they need, write nothing"
    )
    parser.add_argument("--seed", type=_seed, help=_help("seed", "of weights, order of images and augmentation"))
    add_data_arguments(parser, training=True)
    add_model_arguments(parser.add_argument_group("model", "None given: as the model itself says"))
    parser.add_argument(
        "--prune", type=Path, metavar="FILE.yaml", help="drop or merge tokens by a schedule, such as in configs/pruning"
    )
    _add_computation(parser.add_argument_group("computation", "None of it changes the result but for rounding"))
    _add_optimization(parser.add_argument_group("optimization"))
    _add_augmentation(parser.add_argument_group("augmentation"))
    _add_distillation(parser.add_argument_group("distillation", "Learning from other models besides labels"))


def run(args: argparse.Namespace) -> int:
    """Trains and says what came of it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not distributed.is_main():  # it would say the same; but which files it cannot read, nobody else knows
        logging.getLogger("vssm.engine").setLevel(logging.ERROR)
    resume = _state_to_resume(args)
    recipe, setting = _what_and_where(args, resume)
    if args.dry_run:
        _say(_dry_run_line(dry_run(recipe, setting)))
        return 0
    data = setting.data_dir or "the embedded digits"
    _say(f"training {recipe.model} on {data}, {recipe.epochs} epochs on {setting.device}, into {setting.output}")
    try:
        with stop_on_signals() as stop:
            record = train(recipe, setting, resume=resume, stop=stop)
    except Stopped as stopped:
        _say(f"stopped after step {stopped.step}, in {stopped.state}; go on with --resume {setting.output}")
        return 0
    _say(
        f"held-out top-1 {record['top1']:.2f} %, top-5 {record['top5']:.2f} %, "
        f"loss {record['loss']:.4f} on {record['held_out_images']} images after {record['seconds']:.0f} s"
    )
    _say(f"weights: {record['checkpoint']}")
    return 0


def _say(line: str) -> None:
    """Prints a line, once for all processes of a run."""
    if distributed.is_main():
        print(line, flush=True)


def _dry_run_line(found: dict[str, float | int]) -> str:
    return (
        f"two steps took {found['peak_memory_mib']:.0f} MiB at most; {found['images_per_s']:.1f} images/s would make "
        f"{duration(found['seconds'])} for {found['steps']} steps, without evaluation and waiting for data"
    )


def _add_computation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--fsdp", action="store_true", help="cut model and optimizer into parts, one for each process of torchrun"
    )
    add_compile(group)
    group.add_argument("--channels-last", action="store_true", help="lay images and maps out with channels last")


def _add_optimization(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help=_help("batch_size", "images per step, of all processes together"),
    )
    group.add_argument(
        "--accum",
        type=positive_int,
        metavar="N",
        help=_help("accum", "parts into which a process cuts its images of a step, to save memory"),
    )
    group.add_argument("--epochs", type=positive_int, metavar="N", help=_help("epochs", "warm-up included"))
    group.add_argument("--opt", type=_optimizer, metavar="NAME", help=_help("opt", "optimizer, by timm's name"))
    group.add_argument("--lr", type=number(0), help=_help("lr", "learning rate after warm-up"))
    group.add_argument("--min-lr", type=number(0), metavar="LR", help=_help("min_lr", "learning rate at the end"))
    group.add_argument("--warmup-lr", type=number(0), metavar="LR", help=_help("warmup_lr", "learning rate at first"))
    group.add_argument("--warmup-epochs", type=count, metavar="N", help=_help("warmup_epochs", "length of warm-up"))
    group.add_argument(
        "--layer-decay", type=number(0, 1), metavar="X", help="learning rate's factor from layer to layer"
    )
    group.add_argument("--weight-decay", type=number(0), metavar="X", help=_help("weight_decay", "of weights"))
    group.add_argument(
        "--no-decay",
        nargs="*",
        metavar="PATTERN",
        help="parameters without decay, such as '*.D', instead of those that the model names; those of one dimension "
        "have none in any case",
    )
    group.add_argument("--clip-grad", type=number(0), metavar="NORM", help="largest norm of the gradient")
    group.add_argument("--drop-path", type=number(0, 1), metavar="P", help="stochastic depth of the last block")
    _add_flag(group, "--grad-checkpointing", "recompute activations to save memory")
    _add_flag(group, "--model-ema", "keep a moving average of the weights, and evaluate that")
    group.add_argument("--model-ema-decay", type=number(0, 1), metavar="X", help=_help("model_ema_decay", "its decay"))
    _add_flag(group, "--model-ema-warmup", "start it with a smaller decay")
    _add_flag(group, "--amp", "compute in half precision where that is safe")
    group.add_argument("--amp-dtype", choices=sorted(AMP_DTYPES), help=_help("amp_dtype", "half precision of --amp"))


def _add_augmentation(group: argparse._ArgumentGroup) -> None:
    share = number(0, 1)
    group.add_argument(
        "--scale", type=number(0.001, 1), nargs=2, metavar=("MIN", "MAX"), help=_help("scale", "area of random crops")
    )
    group.add_argument("--hflip", type=share, metavar="P", help=_help("hflip", "chance of a horizontal flip"))
    group.add_argument(
        "--color-jitter", type=number(0), metavar="X", help=_help("color_jitter", "strength; unused with --aa")
    )
    group.add_argument("--aa", type=_policy, metavar="POLICY", help=_help("aa", "RandAugment or other policy; or none"))
    group.add_argument("--reprob", type=share, metavar="P", help=_help("reprob", "chance of erasing a rectangle"))
    group.add_argument(
        "--train-interpolation",
        choices=("bilinear", "bicubic", "random"),
        help=_help("train_interpolation", "of training images"),
    )
    group.add_argument(
        "--aug-repeats", type=positive_int, metavar="N", help=_help("aug_repeats", "copies of an image in an epoch")
    )
    group.add_argument("--mixup", type=number(0), metavar="ALPHA", help=_help("mixup", "0 for none"))
    group.add_argument("--cutmix", type=number(0), metavar="ALPHA", help=_help("cutmix", "0 for none"))
    group.add_argument("--smoothing", type=share, metavar="X", help=_help("smoothing", "of labels"))


def _add_distillation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--distill-teacher",
        metavar="NAME",
        help="learn the predictions of this model of vssm or timm, too; it sees the same images. dense: those of the "
        "model itself before training, on all tokens",
    )
    group.add_argument(
        "--distill-checkpoint",
        type=_path_from_anywhere,
        metavar="FILE",
        help="its weights; if absent, published ones, and those of --initial-checkpoint for dense",
    )
    group.add_argument(
        "--distill", choices=("hard", "soft"), help=_help("distill", "its most probable class, or all probabilities")
    )
    group.add_argument(
        "--distill-weight",
        type=number(0, 1),
        metavar="W",
        help=_help("distill_weight", "its part of the loss; labels have the rest"),
    )
    group.add_argument(
        "--distill-temperature",
        type=number(1e-3),
        metavar="T",
        help=_help("distill_temperature", "divides the logits for soft"),
    )
    group.add_argument(
        "--distill-tokens",
        type=number(0),
        metavar="W",
        help=_help("distill_tokens", "add W times the mean squared difference to the last tokens of dense"),
    )
    group.add_argument(
        "--mesa",
        type=number(0),
        metavar="W",
        help=_help("mesa", "add W times the cross-entropy to what the moving average of the weights predicts"),
    )
    group.add_argument(
        "--mesa-start-epoch", type=count, metavar="E", help=_help("mesa_start_epoch", "epochs before --mesa is added")
    )


def _add_flag(group: argparse._ArgumentGroup, name: str, text: str) -> None:
    group.add_argument(
        name, action=argparse.BooleanOptionalAction, default=None, help=_help(name.strip("-").replace("-", "_"), text)
    )


def _help(name: str, text: str) -> str:
    """Help of an option with its defaults, which depend on the data."""
    general, digits = (_shown(getattr(recipe, name)) for recipe in (_DEFAULTS, DIGITS))
    return f"{text} (default: {general}{'' if digits == general else f', digits: {digits}'})"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return {"": "none", "True": "on", "False": "off"}.get(str(value), str(value))


def _policy(text: str) -> str:
    # The empty text is what "none" becomes; argparse converts defaults that come from a file once more.
    if not re.fullmatch(r"(none)?|(rand|augmix)(-[a-z]+[\d.]+)*|original|originalr|v0|v0r|3a", text):
        raise argparse.ArgumentTypeError(f"expected a policy such as rand-m9-mstd0.5-inc1, or none, got {text!r}")
    return "" if text == "none" else text


def _optimizer(text: str) -> str:
    known = list(map(str, list_optimizers()))
    name = text.lower().removeprefix("lookahead_")
    if name not in known:
        raise argparse.ArgumentTypeError(f"unknown optimizer {text!r}{nearest(name, known)}")
    return text


def _path_from_anywhere(text: str | Path) -> str:
    """Type of a path that a run keeps, to be found again when it goes on in another folder."""
    return str(Path(text).absolute())


def _seed(text: str) -> int:
    value = count(text)
    if value > _SEED_LIMIT:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {_SEED_LIMIT}, got {value}")
    return value


def _save_every(text: str) -> SaveEvery:
    match = re.fullmatch(r"(\d*\.?\d+)m", text)
    if match and float(match[1]) > 0:
        return SaveEvery(minutes=float(match[1]))
    if text.isdecimal() and int(text) > 0:
        return SaveEvery(steps=int(text))
    raise argparse.ArgumentTypeError(f"expected a number of steps such as 500, or of minutes such as 10m, got {text!r}")


def _state_to_resume(args: argparse.Namespace) -> dict[str, Any] | None:
    """The state that ``--resume`` names; sets the output folder to the one it is in unless there is ``--output``."""
    if args.resume is None:
        return None
    if args.resume == "auto":
        if args.output is None:
            raise UsageError("--resume auto looks into --output, which is not given")
        return read_state(args.output) if state_files(args.output) else None
    path = Path(args.resume)
    state = read_state(path)
    args.output = args.output or (path if path.is_dir() else path.parent)
    return state


def _what_and_where(args: argparse.Namespace, resume: dict[str, Any] | None) -> tuple[Recipe, Setting]:
    """The recipe, from the options over the resumed run's or else the defaults', and the setting."""
    data_dir, options = args.data_dir, data_options(args)
    if resume is not None:
        stored = resume["run"]
        options = DataOptions.from_dict(stored["data_options"] | options.as_dict())
        base = Recipe.from_dict(stored["recipe"])
        data_dir = data_dir or (None if stored["data_dir"] is None else Path(stored["data_dir"]))
    else:
        base = DIGITS if data_dir is None else _DEFAULTS
    recipe = base.with_options(_options_for(base, _resolved(model_options(args), fresh=resume is None)))
    output = args.output or Path("output", f"{recipe.model}-{datetime.now():%Y%m%d-%H%M%S}")
    if resume is None and not args.dry_run:
        _check_is_new(output)
    workers = args.workers if args.workers is not None else _default_workers(data_dir)
    setting = Setting(
        data_dir,
        output,
        chosen_device(args),
        workers,
        args.initial_checkpoint,
        new_head=args.num_classes is not None,
        save_every=args.save_every,
        keep=args.keep,
        fsdp=args.fsdp,
        compile=args.compile,
        channels_last=args.channels_last,
        tensorboard=args.tensorboard,
        data_options=options,
    )
    return recipe, setting


def _resolved(options: dict[str, Any], *, fresh: bool) -> dict[str, Any]:
    """The options with what follows from files: a schedule, whose model is meant if none is named; dense's weights."""
    if options["distill_teacher"] == DENSE and options["distill_checkpoint"] is None:
        path = options["initial_checkpoint"]
        options["distill_checkpoint"] = None if path is None else _path_from_anywhere(path)
    if options["prune"] is not None:
        schedule = read_schedule(options["prune"])
        options["prune"] = schedule.as_dict()
        if fresh and options["model"] is None:
            options["model"] = schedule.model
    return options


def _options_for(base: Recipe, options: dict[str, Any]) -> dict[str, Any]:
    """The options, and what follows from them for settings of the base that were not meant for them."""
    follows: dict[str, Any] = {}
    if options["model"] not in (None, base.model) and options["model_kwargs"] is None:
        follows["model_kwargs"] = {}
    if options["epochs"] is not None and options["warmup_epochs"] is None:
        follows["warmup_epochs"] = min(base.warmup_epochs, options["epochs"] - 1)
    return options | follows


def _default_workers(data_dir: Path | None) -> int:
    """None for the digits, which are in memory."""
    return 0 if data_dir is None else min(4, os.cpu_count() or 1)


def _check_is_new(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(
            f"{output}: the folder is not empty; name another with --output, or go on with --resume {output}"
        )
