"""Classes of images: from what a data set says of them to the indices that a classifier counts in."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm.data import ImageNetInfo
from timm.utils.misc import natural_key

_SHOWN = 5
_WORD = re.compile(r"n\d{8}")  # a synset of WordNet, which is what ImageNet calls a class
_DEVKIT = 1000  # the largest number in the development kit's ground truth, which counts from 1
_FORMATS = "expected lines of 'IMAGE CLASS', or one CLASS per line for the images in the order of their names"


def number_classes(
    labels: Sequence[str | int],
    *,
    source: str,
    layout: str,
    classes: Sequence[str] | None = None,
    preferred: Sequence[str] | None = None,
) -> tuple[list[str], list[int]]:
    """Numbers the classes of a data set.

    Args:
        labels: Per image the name of its class, or its index.
        source: Where the images come from, for messages.
        layout: How the data should lie, for messages.
        classes: Names of the classes in the order of their indices. Every label must be one of them.
        preferred: Such names to count by only if every label is one of them.

    Returns:
        The names of the classes, and the index of each image's. Without names to count by, those of the labels in
        natural order; where labels are indices, these as text.

    Raises:
        ValueError: A label is not among the classes, or there is a single class and no names to count by.
    """
    found = sorted(set(labels), key=lambda label: natural_key(str(label)))
    if classes is None and preferred is not None and not _unknown(found, preferred):
        classes = preferred
    if classes is None:
        if len(found) < 2:
            raise ValueError(
                f"{source}: found 1 class ({found[0]}) of {len(labels)} images, at least 2 are needed; {layout}"
            )
        classes = _names_of(found)
    unknown = _unknown(found, classes)
    if unknown:
        raise ValueError(
            f"{source}: {len(unknown)} of its {len(found)} classes ({some(unknown)}) are not among the "
            f"{len(classes)} known ({some(classes)})"
        )
    place = {name: index for index, name in enumerate(classes)}
    return list(classes), [label if isinstance(label, int) else place[label] for label in labels]


def read_class_names(path: Path) -> list[str]:
    """Reads names of classes, one per line, in the order of their indices.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has fewer than two names, or one twice.
    """
    names = [line.strip() for line in _read(path, "file of class names").splitlines() if line.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        problem = f"{some(twice)} more than once" if twice else f"{len(names)} lines"
        raise ValueError(f"{path}: expected one class name per line, at least 2 and each once, got {problem}")
    return names


def read_labels(path: Path, names: Sequence[str]) -> list[str | int]:
    """Reads the classes of images that do not lie in class folders, such as ImageNet's 50,000 for validation.

    Formats: ``IMAGE CLASS`` per line, with a blank or a comma between them, the image with or without its suffix (of
    Kaggle's ``LOC_val_solution.csv`` the class is the first word of the second column); or a class per line, for the
    images in the order of their names. A class is a name, such as a synset, or an index from 0.

    Args:
        path: The file.
        names: Names of the images, whose last parts count.

    Returns:
        Per image its class.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not have the classes of these images.
    """
    rows = [line.replace(",", " ").split() for line in _read(path, "file of labels").splitlines() if line.strip()]
    if rows and rows[0][0] == "ImageId":
        rows = rows[1:]
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(names):
            raise ValueError(f"{path}: expected {len(names)} lines, one per image, got {len(rows)}; {_FORMATS}")
        order = sorted(range(len(names)), key=lambda index: natural_key(Path(names[index]).name))
        found = {index: row[0] for index, row in zip(order, rows, strict=True)}
        labels = [found[index] for index in range(len(names))]
    else:
        labels = _by_name(path, {Path(row[0]).stem: row[1] for row in rows if len(row) > 1}, names)
    return _as_indices(path, labels)


def imagenet_synsets() -> list[str]:
    """What ImageNet-1k calls its classes, such as n01440764, in the order of the models' outputs."""
    return list(ImageNetInfo().label_names())


def some(names: Sequence[object]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + more


def _unknown(found: Sequence[str | int], classes: Sequence[str]) -> list[str | int]:
    """The labels that are no class: names of none, indices past the last."""
    known = set(classes)
    return [
        label for label in found if (not 0 <= label < len(classes) if isinstance(label, int) else label not in known)
    ]


def _names_of(found: Sequence[str | int]) -> list[str]:
    indices = [label for label in found if isinstance(label, int)]
    return [str(index) for index in range(max(indices) + 1)] if indices else list(map(str, found))


def _read(path: Path, kind: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {kind}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected a {kind} in plain text, got something else") from None


def _by_name(path: Path, classes: Mapping[str, str], names: Sequence[str]) -> list[str]:
    stems = [Path(name).stem for name in names]
    missing = [stem for stem in stems if stem not in classes]
    if missing:
        raise ValueError(f"{path}: no class of {len(missing)} of {len(names)} images ({some(missing)}); {_FORMATS}")
    return [classes[stem] for stem in stems]


def _as_indices(path: Path, labels: list[str]) -> list[str | int]:
    """The labels as integers where all are."""
    if not all(label.isdecimal() for label in labels):
        return list(labels)
    indices = [int(label) for label in labels]
    if max(indices) == _DEVKIT and min(indices) == 1:
        raise ValueError(
            f"{path}: numbers from 1 to {_DEVKIT} are those of ImageNet's development kit, whose order is not that of "
            "the models; expected synsets such as n01440764, or indices from 0"
        )
    return list(indices)
