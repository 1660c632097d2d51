"""What detectors and segmentors look at: image files, those in folders, and the frames of videos."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image

from vssm.data.images import UnreadableImage, find_images, read_image

_logger = logging.getLogger(__name__)
_VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


@dataclass(frozen=True)
class View:
    """An image, and where it comes from.

    Attributes:
        path: Image file or video.
        image: RGB.
        picture: Where to draw it; None for nowhere.
        frame: Its number in a video, counted from 0; None for an image file.
        seconds: When the video shows it; None for an image file.
    """

    path: Path
    image: Image.Image
    picture: Path | None
    frame: int | None = None
    seconds: float | None = None

    def record(self) -> dict[str, Any]:
        """What results say of it: ``image``, ``height``, ``width``, ``picture``, and ``frame`` and ``seconds``."""
        place = None if self.picture is None else str(self.picture)
        facts = {"image": str(self.path), "height": self.image.height, "width": self.image.width, "picture": place}
        return facts if self.frame is None else {**facts, "frame": self.frame, "seconds": self.seconds}


def views(
    paths: Sequence[str | os.PathLike], pictures: str | os.PathLike | None = None, *, every: int = 1
) -> Iterator[View]:
    """Images and frames, one after the other; those that cannot be read are left out, with a line in the log for each.

    Args:
        paths: Image files, folders of such, and videos.
        pictures: Folder for pictures, which have the names of images; those of a video's frames, their numbers, in a
            folder of its name.
        every: Take every how manyth frame of a video.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If there are no images in a folder, or videos cannot be read here.
    """
    for path, picture in named_pictures(image_files(paths), pictures):
        try:
            yield from _frames(path, picture, every) if is_video(path) else [View(path, read_image(path), picture)]
        except UnreadableImage as error:
            _logger.warning("left out: %s", error)


def image_files(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """Image files and videos, and the images in folders.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If a folder has no images.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = find_images(path) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path}: no images in this folder")
        require_files(*found)
        files += found
    return files


def require_files(*paths: str | os.PathLike) -> None:
    """Raises FileNotFoundError for the first path that is no file."""
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{os.fspath(path)}: no such file")


def is_video(path: Path) -> bool:
    """Whether a file's name is that of a video."""
    return path.suffix.lower() in _VIDEOS


def named_pictures(
    files: Sequence[Path], folder: str | os.PathLike | None
) -> list[tuple[Path, Path] | tuple[Path, None]]:
    """Each file, and a picture of its name in the folder, numbered where names repeat; None without a folder."""
    if folder is None:
        return [(file, None) for file in files]
    seen: dict[str, int] = {}
    pairs = []
    for file in files:
        seen[file.stem] = seen.get(file.stem, 0) + 1
        suffix = f"-{seen[file.stem]}" if seen[file.stem] > 1 else ""
        pairs.append((file, Path(folder, f"{file.stem}{suffix}.png")))
    return pairs


def _frames(path: Path, picture: Path | None, every: int) -> Iterator[View]:
    try:
        import cv2  # an extra
    except ImportError as error:
        raise ValueError(f'{path}: videos are read with OpenCV ({error}): pip install "vssm[video]"') from error
    video = cv2.VideoCapture(str(path))
    try:
        rate, number = video.get(cv2.CAP_PROP_FPS), 0
        for number in count():
            if not video.grab():
                break
            if number % every:
                continue
            read, frame = video.retrieve()
            if not read:
                raise UnreadableImage(f"{path}: frame {number} cannot be decoded")
            place = None if picture is None else picture.with_suffix("") / f"{number:06d}.png"
            image = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
            yield View(path, image, place, frame=number, seconds=number / rate if rate > 0 else None)
        if number == 0:
            raise UnreadableImage(f"{path}: not a readable video")
    finally:
        video.release()
