"""What the commands' options share: the parser with one-line errors, and the types of common values."""

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch


_LARGEST = 2**31 - 1  # of what is counted: beyond lie sizes that torch cannot express
_LONGEST = 2**16 - 1  # pixels
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")  # of torch.compile


class UsageError(Exception):
    """The command line or its YAML file cannot be understood; the command ends with exit status 2."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of an option where it says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default in (argparse.SUPPRESS, "")
        return action.help if silent or action.nargs == 0 else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are :class:`UsageError`, without abbreviations of options."""

    def __init__(self, *, prog: str, description: str | None = None, add_help: bool = True) -> None:
        super().__init__(
            prog=prog, description=description, add_help=add_help, allow_abbrev=False, formatter_class=HelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        """Raises :class:`UsageError` instead of printing the usage and leaving the process."""
        raise UsageError(message)

    def check_option_names(self, argv: Sequence[str]) -> None:
        """Names the nearest option to the first unknown one.

        argparse reports a missing argument before a misspelt one, although the second is often the cause of the first.

        Args:
            argv: Command line without the command.

        Raises:
            UsageError: An option is unknown, or its value is ``--``.
        """
        for token in argv:
            if token == "--":
                return
            name = token.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                raise UsageError(f"unknown option {name}{nearest(name, self._option_string_actions)}")
            if token == f"{name}=--":  # of which argparse makes an empty list
                raise UsageError(f"argument {name}: expected a value, got '--'")


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean train?"`` with the known word most like ``word``, or a list of all when none is.

    Args:
        word: What came.
        known: What would have been understood.
    """
    names = sorted(known)
    matches = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {matches[0]}?" if matches else f"; known are {', '.join(names)}"


def positive_int(text: str) -> int:
    """Type of an option that counts something: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {value}")
    if value > _LARGEST:
        raise argparse.ArgumentTypeError(f"expected a positive integer of at most {_LARGEST}, got {value}")
    return value


def image_size(text: str) -> tuple[int, int]:
    """Type of ``--img-size``: ``224`` or ``160x256`` (height x width) in pixels, up to 65535."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and 0 < int(part) <= _LONGEST for part in parts):
        raise argparse.ArgumentTypeError(
            f"expected a size in pixels such as 224 or 160x256 (height x width), got {text!r}"
        )
    return int(parts[0]), int(parts[-1])


def results_path(text: str) -> Path:
    """Type of ``--results``: a .json or .csv file, refused before any work is done."""
    return _path_with_suffix(text, (".json", ".csv"))


def picture_path(text: str) -> Path:
    """Type of an option that names a picture: a .png, .svg or .pdf file, refused before any work is done."""
    return _path_with_suffix(text, (".png", ".svg", ".pdf"))


def device(text: str) -> "torch.device":
    """Type of ``--device``: a device that is there."""
    import torch  # not at the top: it takes a second, which every command would pay

    try:
        place = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected a device such as cpu or cuda:0, got {text!r}") from None
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (place.index or 0) >= available.get(place.type, 0):
        raise argparse.ArgumentTypeError(
            f"no device {text!r} here: torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return place


def add_images(parser: argparse.ArgumentParser) -> None:
    """Adds the images to look at, and ``--every``."""
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="image files, folders of such, and videos"
    )
    parser.add_argument("--every", type=positive_int, default=1, metavar="N", help="take every Nth frame of a video")


def named(record: Mapping[str, Any]) -> str:
    """What to call an image or a frame of a video on the terminal."""
    return record["image"] if "frame" not in record else f"{record['image']}, frame {record['frame']}"


def check_none_left_out(*, read: int, images: int) -> None:
    """Raises ValueError if some images could not be read, each of which the log has named."""
    if read < images:
        raise ValueError(f"{images - read} of {images} images cannot be read and were left out")


def add_compile(group: "argparse._ArgumentGroup") -> None:
    """Adds ``--compile [MODE]``, whose value is a mode of ``torch.compile`` or None."""
    group.add_argument(
        "--compile",
        nargs="?",
        choices=COMPILE_MODES,
        const="default",
        metavar="MODE",
        help="compile the model with torch.compile, in a mode of its own; reduce-overhead, with CUDA graphs, is the "
        f"fastest on a GPU ({', '.join(COMPILE_MODES)})",
    )


def _path_with_suffix(text: str, suffixes: tuple[str, ...]) -> Path:
    path = Path(text)
    if path.suffix.lower() not in suffixes:
        raise argparse.ArgumentTypeError(f"expected a file name ending in {' or '.join(suffixes)}, got {text!r}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file name, {text!r} is a folder")
    return path
