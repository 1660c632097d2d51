"""Images to train and evaluate on: folders of classes, and digits that are always at hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vssm.data.digits import open_digits
from vssm.data.folder import open_folder
from vssm.data.images import LabelledImages

__all__ = ["LabelledImages", "open_dataset", "open_digits", "open_folder"]


def open_dataset(
    root: Path | None, split: Literal["train", "val"], *, classes: Sequence[str] | None = None
) -> LabelledImages:
    """Opens one part of a data set.

    Args:
        root: Folder with class folders in ``train`` and ``val``; the embedded digits when not given.
        split: ``"train"`` or ``"val"``.
        classes: Names of the classes in the order of their indices; those of the data set when not given.

    Returns:
        The images with their classes.

    Raises:
        FileNotFoundError: There is no such folder or part.
        ValueError: The folder cannot be used as it is, or the embedded digits are not installed.
    """
    if root is not None:
        return open_folder(root, split, classes=classes)
    digits = open_digits(split)
    if classes is not None and tuple(classes) != digits.classes:
        raise ValueError(
            f"the embedded digits have the classes 0 to 9, expected {len(classes)} others: name a data folder"
        )
    return digits
