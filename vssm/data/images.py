"""Labelled images, whatever they come from, and reading of image files that may be damaged."""

import os
import re
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import Dataset

_MODES = {1: "L", 3: "RGB"}
_16_BITS = ("PNG", "PPM")  # formats whose integers ("I") are of 16 bits
_MORE_SUFFIXES = (".avif", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
UNKNOWN = -1  # target of an image whose class nobody has told


class UnreadableImage(ValueError):
    """A file that is no image, or a truncated or otherwise damaged one, or one too large to be decoded."""


class LabelledImages(Dataset):
    """Images with the indices of their classes.

    Args:
        source: Where the images come from, for messages.
        classes: Names of the classes.
        targets: Class index per image.
    """

    def __init__(self, *, source: str, classes: Sequence[str], targets: Sequence[int]) -> None:
        self.source = source
        self.classes = tuple(classes)
        self.targets = tuple(targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.load(index, channels=3), self.targets[index]

    def load(self, index: int, *, channels: int) -> Image.Image:
        """Decodes an image to 1 (grey) or 3 (colour) channels; raises `UnreadableImage`."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What to call an image in messages and results."""
        raise NotImplementedError


class JoinedImages(LabelledImages):
    """Images of several places, one after the other.

    Args:
        parts: At least one, with the same classes.
    """

    def __init__(self, parts: Sequence[LabelledImages]) -> None:
        source = ", ".join(part.source for part in parts)
        targets = [target for part in parts for target in part.targets]
        super().__init__(source=source, classes=parts[0].classes, targets=targets)
        self._parts = tuple(parts)
        self._ends = list(accumulate(map(len, parts)))

    def load(self, index: int, *, channels: int) -> Image.Image:
        """Reads an image to 1 (grey) or 3 (colour) channels; raises `UnreadableImage`."""
        part, place = self._find(index)
        return part.load(place, channels=channels)

    def name(self, index: int) -> str:
        """What its place calls it."""
        part, place = self._find(index)
        return part.name(place)

    def _find(self, index: int) -> tuple[LabelledImages, int]:
        which = bisect_right(self._ends, index)
        return self._parts[which], index - (self._ends[which - 1] if which else 0)


class SomeImages(LabelledImages):
    """Some of the images of a data set.

    Args:
        images: All of them.
        chosen: Places of those that are meant.
    """

    def __init__(self, images: LabelledImages, chosen: Sequence[int]) -> None:
        targets = [images.targets[place] for place in chosen]
        super().__init__(source=images.source, classes=images.classes, targets=targets)
        self._images = images
        self._chosen = tuple(chosen)

    def load(self, index: int, *, channels: int) -> Image.Image:
        """Reads an image to 1 (grey) or 3 (colour) channels; raises `UnreadableImage`."""
        return self._images.load(self._chosen[index], channels=channels)

    def name(self, index: int) -> str:
        """What the data set calls it."""
        return self._images.name(self._chosen[index])


class DecodedImages(LabelledImages):
    """Images of a data set, each of which is decoded once and kept in memory.

    Args:
        images: The data set.
    """

    def __init__(self, images: LabelledImages) -> None:
        super().__init__(source=images.source, classes=images.classes, targets=images.targets)
        self._images = images
        self._decoded: dict[tuple[int, int], Image.Image] = {}

    def load(self, index: int, *, channels: int) -> Image.Image:
        """Gives a copy of an image of 1 (grey) or 3 (colour) channels; raises `UnreadableImage`."""
        key = (index, channels)
        if key not in self._decoded:
            self._decoded[key] = self._images.load(index, channels=channels)
        return self._decoded[key].copy()

    def name(self, index: int) -> str:
        """What the data set calls it."""
        return self._images.name(index)


class ImageFiles(LabelledImages):
    """Images in files.

    Args:
        paths: File per image.
        source: Folder they come from.
        classes: Names of the classes.
        targets: Class index per image.
    """

    def __init__(self, paths: Sequence[Path], *, source: str, classes: Sequence[str], targets: Sequence[int]) -> None:
        super().__init__(source=source, classes=classes, targets=targets)
        self.paths = tuple(paths)

    def load(self, index: int, *, channels: int) -> Image.Image:
        """Reads a file to 1 (grey) or 3 (colour) channels; raises `UnreadableImage`."""
        return read_image(self.paths[index], channels=channels)

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.paths[index])


def read_image(path: str | os.PathLike, *, channels: int = 3) -> Image.Image:
    """Reads an image file whole.

    Args:
        path: Image file.
        channels: 1 for grey, 3 for colour.

    Returns:
        The decoded image, of mode ``"L"`` or ``"RGB"``.

    Raises:
        FileNotFoundError: There is no such file.
        UnreadableImage: It is no image, is damaged, or would decode to more than Pillow's limit of pixels.
        ValueError: ``channels`` is something else.
    """
    return decode_image(path, name=str(path), channels=channels)


def decode_image(file: str | os.PathLike | IO[bytes], *, name: str, channels: int = 3) -> Image.Image:
    """Decodes an image whole.

    The pixels are those that torchvision's and timm's loaders give: the first frame of an animation, as it is stored,
    whatever EXIF says of turning it, with colours as they are under transparency. Of 16 bits per value, which those
    clip to white, the upper 8 are taken; other values beyond 0 to 255, as TIFF may have, are clipped.

    Args:
        file: Image file, or one open for reading.
        name: What to call it in messages.
        channels: 1 for grey, 3 for colour.

    Returns:
        The decoded image, of mode ``"L"`` or ``"RGB"``.

    Raises:
        FileNotFoundError: There is no such file.
        UnreadableImage: It is no image, is damaged, or would decode to more than Pillow's limit of pixels.
        ValueError: ``channels`` is something else.
    """
    if channels not in _MODES:
        raise ValueError(f"decode_image: expected 1 (grey) or 3 (colour) channels, got {channels}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata, which nobody here reads
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                image.load()
                return _converted(image, _MODES[channels])
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such image file") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise almost anything at damaged files, RuntimeError and AttributeError too
        raise UnreadableImage(f"{name}: not a readable image ({_reason(file, error)})") from error


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """The image in a mode of 8 bits per value."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _16_BITS):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "LAB":
        image = image.convert("RGB")  # from where there is a way to grey
    return image if image.mode == mode else image.convert(mode)


def _reason(file: str | os.PathLike | IO[bytes], error: Exception) -> str:
    """Why a file cannot be decoded, in one line."""
    if isinstance(file, str | os.PathLike):
        size = os.path.getsize(file) if os.path.isfile(file) else None
    else:
        size = file.seek(0, os.SEEK_END) if file.seekable() else None
    if size == 0:
        return "it is empty"
    text = re.sub(r" ('.*'|<_io.*>)$", "", " ".join(f"{error}".split()))
    return text or type(error).__name__


def image_suffixes() -> set[str]:
    """Suffixes of image files, in small letters: those of timm, to which its users may add, and of torchvision."""
    return {*get_img_extensions(), *_MORE_SUFFIXES}


def find_images(folder: str | os.PathLike) -> list[Path]:
    """Image files in a folder and the folders in it, by their suffixes, in the order of their paths."""
    suffixes = image_suffixes()
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in suffixes and path.is_file())
