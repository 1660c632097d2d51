"""From the name of a data set, whatever its kind, to its images."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vssm.data.digits import open_digits
from vssm.data.folder import list_folder
from vssm.data.hub import PREFIX, list_hub
from vssm.data.images import UNKNOWN, ImageFiles, JoinedImages, LabelledImages, find_images
from vssm.data.labels import number_classes, read_class_names, read_labels, some
from vssm.data.listing import Listing
from vssm.data.parts import Split, Wanted, choose_in_folder, choose_in_tar, choose_tars, find_tars, is_pattern
from vssm.data.tars import list_tars

_LAYOUT = "expected class folders as in {root}/{split}/CLASS/*.jpg, or tar files named after the part"


@dataclass(frozen=True)
class DataOptions:
    """How a data set is to be read, where that is not as usual.

    Args:
        train_split: What it calls the part to train on.
        val_split: What it calls the part to validate on.
        class_names: File of the classes' names, one per line, in the order of their indices.
        val_labels: File of the classes of the images to validate on, where these do not lie in class folders.
        image_key: Column of the images, of a Hugging Face data set.
        label_key: Column of the classes, or their key in webdataset's .json members.
    """

    train_split: str | None = None
    val_split: str | None = None
    class_names: Path | None = None
    val_labels: Path | None = None
    image_key: str | None = None
    label_key: str | None = None

    def wanted(self, split: Split) -> Wanted:
        """The part that is looked for."""
        return Wanted(split, self.train_split if split == "train" else self.val_split)

    def as_dict(self) -> dict[str, str]:
        """The options that are given, as text; `from_dict` reads them."""
        return {name: str(value) for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataOptions":
        """The options that `as_dict` has written."""
        files = {name: Path(values[name]) for name in ("class_names", "val_labels") if name in values}
        return cls(**{**values, **files})


_USUAL = DataOptions()


def open_dataset(
    data: str | os.PathLike | None,
    split: Split,
    *,
    classes: Sequence[str] | None = None,
    preferred: Sequence[str] | None = None,
    options: DataOptions = _USUAL,
) -> LabelledImages:
    """Opens one part of a data set.

    Args:
        data: Where it is; the embedded digits when not given. A folder with a folder of class folders, or with tar
            files, for each part; a tar file of such a folder; a pattern of tar files such as
            ``{train-{0000..0127},val-{00..07}}.tar``; or ``hfds/NAME``, a Hugging Face data set. What has no parts at
            all is the part to validate on.
        split: ``"train"`` or ``"val"``; the latter may also be called ``validation``, ``valid`` or ``test``.
        classes: Names of the classes in the order of their indices; those of the data set when not given. Every class
            of the data must be one of them; one without images is fine.
        preferred: Such names, to count by only if every class of the data is one of them.
        options: How to read the data set.

    Returns:
        The images with their classes.

    Raises:
        FileNotFoundError: There is no such file, folder or part.
        ValueError: The data cannot be used as they are, or what reads them is not installed.
    """
    if data is None:
        return _open_digits(split, classes)
    listing = _find(os.fspath(data), options.wanted(split), options)
    if split == "val" and options.val_labels is not None:
        listing = replace(listing, labels=read_labels(options.val_labels, listing.names), class_names=None)
    return _open(listing, classes, preferred, options)


def open_images(
    paths: Sequence[str | os.PathLike], places: Mapping[str, int], *, count: int, options: DataOptions = _USUAL
) -> LabelledImages:
    """Opens images whose classes need not be known.

    Args:
        paths: Image files, folders of such at any depth, and data sets as `open_dataset` takes them, of which all
            images count unless ``options`` names the part to validate on.
        places: Index of each class by its names.
        count: Number of classes.
        options: How to read data sets.

    Returns:
        The images, in the order of ``paths``. The target of one whose class is not known is `UNKNOWN`.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: There are no images in a place, or it cannot be used as it is.
    """
    names = None if options.class_names is None else read_class_names(options.class_names)
    parts = []
    for path in [os.fspath(each) for each in paths]:
        listing = _list_all(path, options)
        called = names or listing.class_names
        labels = listing.labels if options.val_labels is None else read_labels(options.val_labels, listing.names)
        targets = [_place(label, places, called, count) for label in labels]
        classes = [*map(str, range(count))]
        parts.append(listing.create(source=listing.source, classes=classes, targets=targets))
    return parts[0] if len(parts) == 1 else JoinedImages(parts)


def data_id(data: str | os.PathLike | None) -> str | None:
    """A name of a data set that means the same in every working directory; None for the embedded digits."""
    if data is None or str(data).startswith(PREFIX):
        return None if data is None else str(data)
    return os.path.abspath(data)


def _open_digits(split: Split, classes: Sequence[str] | None) -> LabelledImages:
    digits = open_digits(split)
    if classes is not None and tuple(classes) != digits.classes:
        raise ValueError(
            f"the embedded digits have the classes 0 to 9, expected {len(classes)} others: name a data folder"
        )
    return digits


def _find(data: str, wanted: Wanted, options: DataOptions) -> Listing:
    """The images of a part, wherever it is."""
    if data.startswith(PREFIX):
        return list_hub(data, wanted, image_key=options.image_key, label_key=options.label_key)
    if is_pattern(data):
        return list_tars(choose_tars(data, wanted), source=data, label_key=options.label_key)
    root = Path(data)
    layout = _LAYOUT.format(root=root, split=wanted.names[0])
    if root.is_file() and root.suffix.lower() == ".tar":
        select = partial(choose_in_tar, root, wanted=wanted)
        return list_tars([root], source=data, label_key=options.label_key, select=select)
    if root.is_file():
        raise FileNotFoundError(f"{root}: a file, not a data folder or a .tar, {layout}")
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such data folder, {layout}")
    place = choose_in_folder(root, wanted, layout=layout)
    if isinstance(place, list):
        more = f" and {len(place) - 1} more" if len(place) > 1 else ""
        return list_tars(place, source=f"{place[0]}{more}", label_key=options.label_key)
    loose = wanted.split == "val" and options.val_labels is not None
    return _list_loose(place, layout) if loose else list_folder(place, layout=layout)


def _list_all(path: str, options: DataOptions) -> Listing:
    """All images of a place, or those of the part to validate on where that has been named."""
    if options.val_split is not None or path.startswith(PREFIX):
        return _find(path, options.wanted("val"), options)
    if is_pattern(path):
        return list_tars(find_tars(path), source=path, label_key=options.label_key)
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"{path}: no such image file or folder")
    if place.suffix.lower() == ".tar" and place.is_file():
        return list_tars([place], source=path, label_key=options.label_key)
    files = find_images(place) if place.is_dir() else [place]
    if files:
        labels = [file.parent.name if place.is_dir() else "" for file in files]
        return Listing(path, "", list(map(str, files)), labels, partial(ImageFiles, files))
    tars = [file for file in place.iterdir() if file.suffix.lower() == ".tar"]
    if not tars:
        raise ValueError(f"{path}: no images in this folder")
    return list_tars(tars, source=path, label_key=options.label_key)


def _place(label: str | int, places: Mapping[str, int], names: Sequence[str] | None, count: int) -> int:
    """Index of a class, or `UNKNOWN`."""
    if isinstance(label, str):
        return places.get(label, UNKNOWN)
    if names is not None:
        return places.get(names[label], UNKNOWN) if 0 <= label < len(names) else UNKNOWN
    return label if 0 <= label < count else UNKNOWN


def _list_loose(folder: Path, layout: str) -> Listing:
    """All images of a folder, whose classes a file tells."""
    paths = find_images(folder)
    if not paths:
        raise ValueError(f"{folder}: no images found, {layout}")
    return Listing(str(folder), layout, list(map(str, paths)), [""] * len(paths), partial(ImageFiles, paths))


def _open(
    listing: Listing, classes: Sequence[str] | None, preferred: Sequence[str] | None, options: DataOptions
) -> LabelledImages:
    """Numbers the classes of a listing."""
    labels, names = listing.labels, listing.class_names
    if loose := sum(label == "" for label in labels):
        raise ValueError(f"{listing.source}: {loose} images lie outside of class folders, {listing.layout}")
    if options.class_names is not None:
        names = read_class_names(options.class_names)
    if names is not None:
        labels = _named(labels, names, source=listing.source)
        if classes is None:
            classes = preferred if preferred is not None and set(labels) <= set(preferred) else names
    numbered, targets = number_classes(
        labels, source=listing.source, layout=listing.layout, classes=classes, preferred=preferred
    )
    return listing.create(source=listing.source, classes=numbered, targets=targets)


def _named(labels: Sequence[str | int], names: Sequence[str], *, source: str) -> list[str | int]:
    """The labels with indices replaced by names."""
    if beyond := sorted({label for label in labels if isinstance(label, int) and not 0 <= label < len(names)}):
        raise ValueError(
            f"{source}: expected class indices below {len(names)}, of which there are names, got {some(beyond)}"
        )
    return [names[label] if isinstance(label, int) else label for label in labels]
