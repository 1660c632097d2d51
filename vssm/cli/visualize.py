"""Draw a scan order, and what a model sees: its receptive field, the path, memory and class of an image, its tokens."""

import argparse
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from vssm.cli import UsageError
from vssm.cli._options import nearest, picture_path, positive_int
from vssm.cli._training import add_model_arguments, count, model_options, open_classifier
from vssm.data.images import read_image
from vssm.engine.class_activation import class_activation, draw_class_activation
from vssm.engine.classifier import Classifier, ModelSpec, build
from vssm.engine.draw_tokens import draw_kept_tokens
from vssm.engine.receptive_field import draw_receptive_fields, effective_receptive_field
from vssm.engine.scan_paths import scan_paths, visit_times
from vssm.engine.sight import colours_of_image, look
from vssm.engine.state_decay import draw_decay
from vssm.engine.visualize import draw_paths, draw_scan_order
from vssm.pruning import read_schedule
from vssm.scan_order import BUILDERS, scan_order

_logger = logging.getLogger(__name__)
_SEED = 0  # of random weights
_WEIGHTS = (".safetensors", ".pth", ".pt")  # suffixes that tell the file of a checkpoint from the name of a model
_IMAGES = 16  # over which a receptive field is averaged
# Which pictures an option belongs to, where it does not belong to all.
_OPTIONS = {
    "models": ("erf",),
    "before": ("erf",),
    "count": ("erf",),
    "class_name": ("cam",),
    "block": ("path", "decay"),
    "token": ("decay",),
    "index": ("path", "erf", "cam", "decay"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``vssm visualize``."""
    parser.add_argument("output", type=picture_path, help="picture to write: .png, .svg or .pdf")
    parser.add_argument(
        "--what",
        choices=list(_DRAW),
        default="order",
        help="order: the path of each direction of a scan order; path: the same over an image, or of a block of a "
        "model; erf: effective receptive field; cam: class-activation map; decay: how much of a token's input is left "
        "in the state along the paths of a block",
    )
    parser.add_argument("--order", choices=list(BUILDERS), default="cross", help="scan order")
    parser.add_argument(
        "--grid", type=_grid, default="7x7", metavar="HxW", help="rows and columns of the grid, in tokens"
    )
    parser.add_argument(
        "--window", type=positive_int, metavar="N", help="side of the windows of --order window, in tokens"
    )
    group = parser.add_argument_group("image")
    group.add_argument(
        "--image", type=Path, metavar="FILE", help="image, or folder of images; a held-out digit if absent"
    )
    group.add_argument(
        "--index", type=count, metavar="N", help="place of the image, from 0, among digits or in a folder"
    )
    group.add_argument("--count", type=positive_int, metavar="N", help=f"images that erf averages over ({_IMAGES})")
    group = parser.add_argument_group("model", "With neither --checkpoint nor --pretrained, its weights are random")
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights, such as those that vssm train writes")
    group.add_argument(
        "--models", type=_names, metavar="A,B", help="names or checkpoints whose erf stands side by side"
    )
    group.add_argument("--before", action="store_true", default=None, help="also draw the erf with random weights")
    group.add_argument("--class", dest="class_name", metavar="NAME", help="class of the map, not the most probable one")
    group.add_argument("--block", type=positive_int, metavar="N", help="block whose scans are drawn, from 1 (1)")
    group.add_argument("--token", type=_token, metavar="ROW,COLUMN", help="token that decay follows, not the centre")
    add_model_arguments(group)
    group = parser.add_argument_group("tokens that stay", "The model is that of the schedule, if none is given")
    group.add_argument("--prune", type=Path, metavar="FILE.yaml", help="schedule, such as those in configs/pruning")


def run(args: argparse.Namespace) -> int:
    """Draws the picture, and says where it is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name, pictures in _OPTIONS.items():
        if getattr(args, name) is not None and args.what not in pictures:
            option = "--class" if name == "class_name" else f"--{name}"
            raise UsageError(f"{option} belongs to --what {' or '.join(pictures)}, got --what {args.what}")
    print(f"{args.output}: {_DRAW[args.what](args)}")
    return 0


def _draw_order(args: argparse.Namespace) -> str:
    if (args.prune is None) != (args.image is None):
        raise UsageError("expected --prune FILE.yaml and --image FILE together, got one of them")
    if args.prune is not None:
        return _draw_tokens(args)
    height, width = args.grid
    record = draw_scan_order(args.output, args.order, height, width, window=args.window)
    return f"{args.order} over {height}x{width} tokens, {record['directions']} direction(s)"


def _draw_tokens(args: argparse.Namespace) -> str:
    schedule = read_schedule(args.prune)
    if args.model is None and args.checkpoint is None:
        args.model = schedule.model
    record = draw_kept_tokens(args.output, open_classifier(args), args.image, schedule)
    cuts = zip(record["after"], record["kept"], record["patches"], strict=True)
    return ", ".join(f"{kept} of {all_} after block {cut}" for cut, kept, all_ in cuts)


def _draw_path(args: argparse.Namespace) -> str:
    if args.model is None and args.checkpoint is None:
        if args.block is not None:
            raise UsageError("--block belongs to a model: expected --model NAME or --checkpoint FILE, too")
        order = scan_order(args.order, args.grid[0], args.grid[1], "cpu", window=args.window)
        times = [visit_times(row, args.grid).numpy() for row in order]
        image = None if args.image is None else colours_of_image(read_image(args.image))
        title = f"{args.order}, {args.grid[0]}×{args.grid[1]} tokens"
    else:
        classifier, block = _open(args), args.block or 1
        sight = look(classifier, args.image, first=args.index or 0)[0]
        paths = scan_paths(classifier.model, sight.pixels, block)
        times = [visit_times(path.cells, path.size).numpy() for path in paths]
        image, title = sight.colours, f"{classifier.spec.model}, block {block}"
    record = draw_paths(args.output, times, image=image, title=title)
    return f"{title}, {record['directions']} direction(s)"


def _draw_erf(args: argparse.Namespace) -> str:
    if args.models is not None and (args.model is not None or args.checkpoint is not None):
        raise UsageError("expected --models A,B, or --model or --checkpoint, got both")
    titles, fields = [], []
    for chosen in [args] if args.models is None else [_choose(args, each) for each in args.models]:
        for state, classifier in _states(chosen):
            sights = look(classifier, args.image, first=args.index or 0, count=args.count or _IMAGES)
            images = torch.stack([each.pixels for each in sights])
            titles.append(f"{classifier.spec.model}\n{state}")
            fields.append(effective_receptive_field(classifier.model, images))
    record = draw_receptive_fields(args.output, titles, fields)
    areas = zip(titles, record["half_area"], strict=True)
    said = "; ".join(f"{title}: half of the field within {area:.1%} of the area" for title, area in areas)
    return said.replace("\n", ", ")


def _draw_cam(args: argparse.Namespace) -> str:
    classifier = _open(args)
    index = None if args.class_name is None else _class_index(classifier, args.class_name)
    sight = look(classifier, args.image, first=args.index or 0)[0]
    activation = class_activation(classifier.model, sight.pixels, index)
    record = draw_class_activation(args.output, sight, activation, label=classifier.classes[activation.index])
    return f"{record['method']} at {record['layer']} of {record['class']} ({record['probability']:.1%}), {sight.name}"


def _draw_decay(args: argparse.Namespace) -> str:
    classifier, block = _open(args), args.block or 1
    sight = look(classifier, args.image, first=args.index or 0)[0]
    paths = scan_paths(classifier.model, sight.pixels, block)
    record = draw_decay(
        args.output, sight, paths, token=args.token, title=f"{classifier.spec.model}, block {block}, {sight.name}"
    )
    lives = ("beyond the path" if each is None else str(each) for each in record["half_life"])
    return f"half-life in steps, by direction: {', '.join(lives)}"


_DRAW = {"order": _draw_order, "path": _draw_path, "erf": _draw_erf, "cam": _draw_cam, "decay": _draw_decay}


def _open(args: argparse.Namespace) -> Classifier:
    """The model of the options; with random weights where they name none, which the log says."""
    if args.prune is not None:
        raise UsageError(f"--prune draws tokens that stay, expected no --what, got --what {args.what}")
    if args.checkpoint is not None or args.pretrained:
        return open_classifier(args)
    if args.model is None:
        raise UsageError(f"--what {args.what} needs a model: expected --model NAME or --checkpoint FILE")
    return _build_random(ModelSpec().with_options(model_options(args)))


def _states(args: argparse.Namespace) -> Iterator[tuple[str, Classifier]]:
    """The model of the options, with ``--before`` once more with random weights, and in which state it is."""
    trained = args.checkpoint is not None or args.pretrained
    if args.before and not trained:
        raise UsageError(
            "--before shows random weights beside trained ones: expected --checkpoint or --pretrained, too"
        )
    classifier = _open(args)
    if args.before:
        yield "random weights", _build_random(classifier.spec)
    yield "trained" if trained else "random weights", classifier


def _build_random(spec: ModelSpec) -> Classifier:
    torch.manual_seed(_SEED)
    classifier = build(replace(spec, pretrained=False))
    classifier.model.eval()
    _logger.info("%s: random weights, of seed %d; --checkpoint or --pretrained gives trained ones", spec.model, _SEED)
    return classifier


def _choose(args: argparse.Namespace, choice: str) -> argparse.Namespace:
    """The options for one of several models, a name or the file of a checkpoint."""
    file = Path(choice)
    is_file = file.suffix in _WEIGHTS or file.is_file()
    own = {"checkpoint": file, "pretrained": None} if is_file else {"model": choice}
    return argparse.Namespace(**{**vars(args), **own})


def _class_index(classifier: Classifier, name: str) -> int:
    if name in classifier.classes:
        return classifier.classes.index(name)
    if name.isdecimal():
        return int(name)
    raise UsageError(f"--class: the model has no class {name!r}{nearest(name, classifier.classes)}")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names with commas between them, got {text!r}")
    return names


def _token(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+),(\d+)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a row and a column from 0, such as 4,4, got {text!r}")
    return int(match[1]), int(match[2])


def _grid(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected rows x columns such as 7x7 or 4x10, got {text!r}")
    return int(match[1]), int(match[2])
