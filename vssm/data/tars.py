"""Images in tar files, read by their place in the file: class folders in a tar, and webdataset shards."""

import io
import os
import re
import sys
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from timm.utils.misc import natural_key
from tqdm import tqdm

from vssm.data.images import LabelledImages, UnreadableImage, decode_image
from vssm.data.labels import some
from vssm.data.listing import Listing, Select
from vssm.data.tar_index import read_index

_KEPT_OPEN = 256  # tar files per process; systems allow some thousand open files, or 1024
_NUMBERED = re.compile(r"(^|[-_.])\d+$")  # train-0012: a shard, no class
LAYOUT = (
    "expected CLASS/*.jpg in the tar, or webdataset samples, KEY.jpg with KEY.cls (an index) or KEY.json (with 'label')"
)


class TarImages(LabelledImages):
    """Images in tar files.

    Args:
        tars: The files.
        places: File, first byte and size of each image, integers (count, 3).
        names: Path inside its file per image.
        source: Where the images come from, for messages.
        classes: Names of the classes.
        targets: Class index per image.
    """

    def __init__(
        self,
        tars: Sequence[Path],
        places: np.ndarray,
        *,
        names: Sequence[str],
        source: str,
        classes: Sequence[str],
        targets: Sequence[int],
    ) -> None:
        super().__init__(source=source, classes=classes, targets=targets)
        self._files = _OpenFiles(tars)
        self._places = places
        self._names = names

    def load(self, index: int, *, channels: int) -> Image.Image:
        """Reads an image to 1 (grey) or 3 (colour) channels; raises `UnreadableImage`."""
        name = self.name(index)
        content = self._files.read(*map(int, self._places[index]), name=name)
        return decode_image(io.BytesIO(content), name=name, channels=channels)

    def name(self, index: int) -> str:
        """The tar file's path and the path in it."""
        return f"{self._files.paths[self._places[index, 0]]}/{self._names[index]}"


class _OpenFiles:
    """Files that stay open for reading; each process opens them for itself.

    Args:
        paths: The files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._start()

    def read(self, which: int, start: int, size: int, *, name: str) -> bytes:
        """Bytes of a file; raises `UnreadableImage` if there are fewer."""
        if self._process != os.getpid():
            self._start()
        try:
            content = self._read(which, start, size)
        except OSError as error:
            raise UnreadableImage(f"{name}: cannot be read ({error})") from error
        if len(content) < size:
            raise UnreadableImage(f"{name}: cannot be read, the tar file is shorter than it was")
        return content

    def _start(self) -> None:
        self._process = os.getpid()
        self._open: dict[int, int] = {}
        weakref.finalize(self, _close, self._open)

    def _read(self, which: int, start: int, size: int) -> bytes:
        if which in self._open:
            return os.pread(self._open[which], size, start)
        file = os.open(self.paths[which], os.O_RDONLY)
        if len(self._open) < _KEPT_OPEN:
            self._open[which] = file
            return os.pread(file, size, start)
        try:
            return os.pread(file, size, start)
        finally:
            os.close(file)

    def __reduce__(self) -> tuple:
        return _OpenFiles, (self.paths,)


def list_tars(
    tars: Sequence[Path], *, source: str, label_key: str | None = None, select: Select | None = None
) -> Listing:
    """Finds the images of tar files.

    Args:
        tars: The files.
        source: What to call them in messages.
        label_key: Key of the class in webdataset's .json members.
        select: Of all names the places of those wanted, and the folder they are in.

    Returns:
        The images, file by file in natural order of their names, with their classes: those that members beside them
        tell, or else the folder an image is in, or the file's name where each file holds the images of one class.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file is no complete tar, there are no images, or the classes of only some of them are told.
    """
    tars = sorted(tars, key=lambda path: natural_key(str(path)))
    names, places, told = _gather(tars, label_key)
    if not names:
        raise ValueError(f"{source}: no images found, {LAYOUT}")
    if select is not None:
        chosen, folder = select(names)
        source = "/".join((source, folder)).rstrip("/")
        names, places, told = [names[i] for i in chosen], places[chosen], [told[i] for i in chosen]
    labels = _labels(names, told, source=source)
    if not any(label != "" for label in labels) and len(tars) > 1:
        labels = _named_after_files(tars, places[:, 0].tolist())
    create = partial(TarImages, tars, places, names=names)
    return Listing(source=source, layout=LAYOUT, names=names, labels=labels, create=create)


def _gather(tars: Sequence[Path], label_key: str | None) -> tuple[list[str], np.ndarray, list[str | int | None]]:
    """Names, places (count, 3) and told labels of the images of all files."""
    names: list[str] = []
    told: list[str | int | None] = []
    places = [np.empty((0, 3), dtype=np.int64)]
    for which, path in enumerate(tqdm(tars, desc="indexing", leave=False, disable=not sys.stderr.isatty())):
        index = read_index(path, label_key=label_key)
        names += index.names
        told += index.labels
        files = np.full(len(index.names), which, dtype=np.int64)
        places.append(np.stack([files, np.asarray(index.offsets, dtype=np.int64), index.sizes], axis=1))
    return names, np.concatenate(places), told


def _labels(names: Sequence[str], told: Sequence[str | int | None], *, source: str) -> list[str | int]:
    """The labels that are told, or else the names of the folders, empty for images outside of one."""
    labels = [label for label in told if label is not None]
    if not labels:
        return [PurePosixPath(name).parent.name for name in names]
    if len(labels) < len(told):
        without = [name for name, label in zip(names, told, strict=True) if label is None]
        raise ValueError(
            f"{source}: no class beside {len(without)} of {len(names)} images ({some(without)}), while others have a "
            f".cls or .json; {LAYOUT}"
        )
    if len({type(label) for label in labels}) > 1:
        raise ValueError(f"{source}: some classes are indices and some are names; {LAYOUT}")
    return labels


def _named_after_files(tars: Sequence[Path], which: Sequence[int]) -> list[str | int]:
    """Each file's name as the class of its images; empty where the names are numbers of shards."""
    stems = ["" if _NUMBERED.search(path.stem) else path.stem for path in tars]
    return [stems[index] for index in which]


def _close(files: dict[int, int]) -> None:
    for file in files.values():
        os.close(file)
