"""Images in class folders: ``DIR/train/CLASS/*.jpg`` and ``DIR/val/CLASS/*.jpg``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from timm.data.readers.reader_image_folder import find_images_and_targets

from vssm.data.images import ImageFiles

# The names that data sets give to their parts; the first that is there is taken.
_FOLDERS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
_LAYOUT = "expected class folders as in {root}/{split}/CLASS/*.jpg"
_SHOWN = 5


def open_folder(root: Path, split: Literal["train", "val"], *, classes: Sequence[str] | None = None) -> ImageFiles:
    """Opens one part of a data set on disk.

    Args:
        root: Folder with a folder of class folders for each part.
        split: ``"train"`` or ``"val"``; a part to validate on may also be called ``validation``, ``valid`` or ``test``.
        classes: Names of the classes in the order of their indices; those of the folders, naturally sorted, when not
            given. Every folder must be one of them; a class without images is fine.

    Returns:
        The images.

    Raises:
        FileNotFoundError: There is no such folder, or it has no folder for this part.
        ValueError: There are no images, images outside of class folders, a single class, or an unknown one.
    """
    folder = _folder_of(root, split)
    samples, indices = find_images_and_targets(str(folder))
    layout = _LAYOUT.format(root=root, split=folder.name)
    if not samples:
        raise ValueError(f"{folder}: no images found, {layout}")
    if "" in indices:
        loose = sum(target == indices[""] for _, target in samples)
        raise ValueError(f"{folder}: {loose} images lie outside of class folders, {layout}")
    if len(indices) < 2:
        raise ValueError(
            f"{folder}: found 1 class ({next(iter(indices))}) of {len(samples)} images, at least 2 are needed; {layout}"
        )
    found = sorted(indices, key=indices.__getitem__)
    names = list(found if classes is None else classes)
    unknown = [name for name in found if name not in names]
    if unknown:
        raise ValueError(
            f"{folder}: {len(unknown)} of its {len(found)} classes ({_some(unknown)}) are not among the "
            f"{len(names)} known ({_some(names)})"
        )
    place = {name: index for index, name in enumerate(names)}
    paths = [Path(path) for path, _ in samples]
    targets = [place[found[target]] for _, target in samples]
    return ImageFiles(paths, source=str(folder), classes=names, targets=targets)


def _folder_of(root: Path, split: Literal["train", "val"]) -> Path:
    names = _FOLDERS[split]
    layout = _LAYOUT.format(root=root, split=names[0])
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such data folder, {layout}")
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: a file, not a data folder, {layout}")
    for name in names:
        if (root / name).is_dir():
            return root / name
    found = sorted(path.name for path in root.iterdir())
    content = f"it holds {_some(found)}" if found else "it is empty"
    raise FileNotFoundError(f"{root}: no folder {' or '.join(names)} in it, {content}; {layout}")


def _some(names: Sequence[str]) -> str:
    """The first few names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
