"""Images in class folders: ``DIR/train/CLASS/*.jpg`` and ``DIR/val/CLASS/*.jpg``."""

from functools import partial
from pathlib import Path

from timm.data.readers.reader_image_folder import find_images_and_targets

from vssm.data.images import ImageFiles, image_suffixes
from vssm.data.listing import Listing


def list_folder(folder: Path, *, layout: str) -> Listing:
    """Finds the images in class folders.

    Args:
        folder: The part of the data set.
        layout: How the data should lie, for messages.

    Returns:
        The images in natural order of their paths, each of the class that its folder is named after.

    Raises:
        ValueError: There are no images.
    """
    samples, indices = find_images_and_targets(str(folder), types=image_suffixes())
    if not samples:
        raise ValueError(f"{folder}: no images found, {layout}")
    found = sorted(indices, key=indices.__getitem__)
    names = [path for path, _ in samples]
    create = partial(ImageFiles, [Path(name) for name in names])
    return Listing(str(folder), layout, names, [found[target] for _, target in samples], create)
