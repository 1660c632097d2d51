"""Which part of a data set is meant, ``train`` or ``val``: by names of folders, tar files, or folders in a tar."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from vssm.data.labels import some

Split = Literal["train", "val"]

# The names that data sets give to their parts; the first that is there is taken.
PART_NAMES: dict[str, tuple[str, ...]] = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
_ALL_NAMES = frozenset(name for names in PART_NAMES.values() for name in names)
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 100_000  # numbers in a range


@dataclass(frozen=True)
class Wanted:
    """The part that is looked for.

    Args:
        split: ``"train"`` or ``"val"``.
        name: What the data set calls it; one of the usual names when not given.
    """

    split: Split
    name: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names that it may have."""
        return PART_NAMES[self.split] if self.name is None else (self.name,)

    @property
    def may_be_whole(self) -> bool:
        """Whether data without parts will do: to measure on, but not to train on, for which two parts are needed."""
        return self.split == "val" and self.name is None


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern such as ``train-{0000..0127}.tar`` or ``{a,b-{0..3}}.tar`` stands for.

    Raises:
        ValueError: Braces do not match, or a range is not one.
    """
    if pattern.count("{") != pattern.count("}"):
        raise ValueError(f"{pattern}: expected matching braces, as in train-{{0000..0127}}.tar")
    return list(_expanded(pattern))


def is_pattern(data: str) -> bool:
    """Whether a name is a pattern with braces."""
    return "{" in data or "}" in data


def choose_tars(pattern: str, wanted: Wanted) -> list[Path]:
    """The tar files of a pattern that are a part of the data set.

    Raises:
        FileNotFoundError: Files of the pattern are not there.
        ValueError: It is no pattern of tar files, or none of them is named after the part.
    """
    paths = find_tars(pattern)
    for name in wanted.names:
        if found := [path for path in paths if _has_word(path.name, name)]:
            return found
    if wanted.may_be_whole and not any(_has_word(path.name, name) for path in paths for name in _ALL_NAMES):
        return paths
    raise ValueError(
        f"{pattern}: none of its {len(paths)} files has {_either(wanted.names)} in its name; expected a pattern of "
        "both parts, as in {train-{0000..0127},val-{00..07}}.tar, or the folder of all"
    )


def find_tars(pattern: str) -> list[Path]:
    """The tar files of a pattern.

    Raises:
        FileNotFoundError: Files of the pattern are not there.
        ValueError: It is no pattern of tar files.
    """
    paths = [Path(name) for name in expand_braces(pattern)]
    if others := [path for path in paths if path.suffix.lower() != ".tar"]:
        raise ValueError(f"{pattern}: expected a pattern of .tar files, got {others[0].name}")
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{pattern}: {len(missing)} of its {len(paths)} files are not there ({some(missing)})")
    return paths


def choose_in_folder(root: Path, wanted: Wanted, *, layout: str) -> Path | list[Path]:
    """The folder of a part, or the tar files that are the part.

    Args:
        root: Folder of the data set.
        wanted: The part.
        layout: How the data should lie, for messages.

    Raises:
        FileNotFoundError: There is no such part.
    """
    tars = _tars_in(root)
    for name in wanted.names:
        if (root / name).is_dir():
            return _tars_or_folder(root / name)
        if found := [path for path in tars if _has_word(path.name, name)]:
            return found
    found = sorted(path.name for path in root.iterdir())
    parted = any((root / name).is_dir() or any(_has_word(tar.name, name) for tar in tars) for name in _ALL_NAMES)
    if wanted.may_be_whole and found and not parted:
        return _tars_or_folder(root)
    content = f"it holds {some(found)}" if found else "it is empty"
    raise FileNotFoundError(f"{root}: no folder {_either(wanted.names)} in it, {content}; {layout}")


def choose_in_tar(path: Path, names: Sequence[str], wanted: Wanted) -> tuple[list[int], str]:
    """The images of a part in one tar file that holds several, and their folder in it.

    Args:
        path: The tar file, for messages.
        names: Paths of the images in it.
        wanted: The part.

    Raises:
        ValueError: There is no such part.
    """
    folders = [PurePosixPath(name).parent.parts for name in names]
    shared = _shared(folders)
    for name in wanted.names:
        if chosen := [index for index, parts in enumerate(folders) if parts[len(shared) : len(shared) + 1] == (name,)]:
            return chosen, "/".join((*shared, name))
        if name in shared:
            return list(range(len(names))), "/".join(shared)
    tops = sorted({"/".join(parts[: len(shared) + 1]) for parts in folders if parts})
    if wanted.may_be_whole and not any(set(parts[: len(shared) + 1]) & _ALL_NAMES for parts in folders):
        return list(range(len(names))), ""
    raise ValueError(f"{path}: no folder {_either(wanted.names)} in it, it holds {some(tops) or 'no folders'}")


def _tars_or_folder(folder: Path) -> Path | list[Path]:
    """The tar files of a folder that has no folders in it; or else the folder."""
    return folder if any(path.is_dir() for path in folder.iterdir()) else _tars_in(folder) or folder


def _tars_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix.lower() == ".tar" and not path.name.startswith(".")]


def _shared(folders: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The folders that all paths begin with."""
    first, last = min(folders), max(folders)
    differ = [index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]]
    return first[: differ[0] if differ else min(len(first), len(last))]


def _has_word(text: str, word: str) -> bool:
    """Whether a file name has a word in it: train in imagenet1k-train-0000.tar, not in trains.tar."""
    return re.search(rf"(?<![a-z]){re.escape(word.lower())}(?![a-z])", text.lower()) is not None


def _either(names: Sequence[str]) -> str:
    return " or ".join(names)


def _expanded(pattern: str) -> Iterator[str]:
    """Expands the first pair of braces, what is in it, and what follows it."""
    head, brace, _ = pattern.partition("{")
    if not brace:
        yield pattern
        return
    end = _closing(pattern, len(head))
    tails = list(_expanded(pattern[end + 1 :]))
    for word in _words(pattern[len(head) + 1 : end]):
        for inner in _expanded(word):
            yield from (head + inner + tail for tail in tails)


def _closing(pattern: str, start: int) -> int:
    """Place of the brace that closes the one at ``start``."""
    depth = 0
    for place in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"{pattern}: expected matching braces, as in train-{{0000..0127}}.tar")


def _words(content: str) -> list[str]:
    """What stands between the commas that are in no further braces, or the numbers of a range."""
    span = _RANGE.fullmatch(content)
    if span is not None:
        first, last = int(span[1]), int(span[2])
        if not first <= last < first + _MOST:
            raise ValueError(f"{{{content}}}: expected a range of 1 to {_MOST} numbers")
        return [str(number).zfill(len(span[1])) for number in range(first, last + 1)]
    words, depth = [""], 0
    for character in content:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            words.append("")
        else:
            words[-1] += character
    if len(words) < 2:
        raise ValueError(f"{{{content}}}: expected {{first..last}} or {{one,other}} in braces")
    return words
