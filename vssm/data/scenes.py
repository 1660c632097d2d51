"""Scenes of the embedded digits, for detection and segmentation: every box, mask and class in them is known exactly.

A scene is a dark picture with one to five digits in colour, none of which touches another's box. It depends on its
part, its number and its size alone, so two machines draw the same ones.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vssm.data.digits import Digits, open_digits
from vssm.files import atomic_path

_MOST = 5  # digits in a scene
_TRIES = 20  # to find a free place for a digit
_INK = 112  # grey value from which a pixel belongs to a digit
_NO_INK = 16  # grey value from which a pixel may belong to one
_MARGIN = 2  # pixels between boxes

Split = Literal["train", "val"]
_SEEDS: dict[str, int] = {"train": 1, "val": 2}
_COCO_FOLDERS: dict[str, str] = {"train": "train2017", "val": "val2017"}
_ADE_FOLDERS: dict[str, str] = {"train": "training", "val": "validation"}
ADE_CLASSES = ("background", *map(str, range(10)))


class Scene(NamedTuple):
    """A picture and what is in it.

    Attributes:
        image: Pixels (h, w, 3), uint8.
        labels: The n digits, from 0 to 9.
        boxes: (n, 4), the first and the last column and row plus one: x0, y0, x1, y1 in pixels.
        masks: (n, h, w), bool.
        unclear: (h, w), bool: the digits' soft edges, which belong neither to them nor to the background.
    """

    image: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray
    unclear: np.ndarray


class DigitScenes(Dataset):
    """Scenes as torchvision's detectors take them, for training and held out, of different digits.

    Args:
        split: ``"train"`` or ``"val"``.
        count: Number of scenes.
        size: Height and width, in pixels, at least 32.

    Raises:
        ValueError: If scikit-learn, which has the digits, is not installed, or the scenes are too small.
    """

    def __init__(self, split: Split, count: int, *, size: tuple[int, int] = (96, 128)) -> None:
        if min(size) < 32:
            raise ValueError(f"DigitScenes: expected a size of at least 32×32 pixels, got {size[0]}×{size[1]}")
        self.split = split
        self.count = count
        self.size = size
        self._digits = open_digits(split)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """An image (3, h, w) in [0, 1] and its ``boxes``, ``labels``, the digits plus one, and ``masks``."""
        scene = self.scene(index)
        image = torch.from_numpy(scene.image).permute(2, 0, 1).float() / 255
        target = {
            "boxes": torch.from_numpy(scene.boxes).float(),
            "labels": torch.from_numpy(scene.labels) + 1,
            "masks": torch.from_numpy(scene.masks).to(torch.uint8),
        }
        return image, target

    def scene(self, index: int) -> Scene:
        """Draws one scene."""
        if not 0 <= index < self.count:
            raise IndexError(f"DigitScenes: expected an index below {self.count}, got {index}")
        return _draw(self._digits, np.random.default_rng((_SEEDS[self.split], index)), self.size)


def write_coco(root: str | os.PathLike, *, train: int, val: int, size: tuple[int, int] = (96, 128)) -> Path:
    """Writes scenes in the layout of COCO 2017: ``train2017/*.jpg``, ``annotations/instances_train2017.json`` ...

    Args:
        root: Folder; what it holds already stays.
        train: Number of scenes for training.
        val: Number of scenes held out.
        size: Height and width, in pixels.

    Returns:
        The folder. Its categories 1 to 10 are named "0" to "9".
    """
    root = Path(root)
    for folder, scenes in _parts(train, val, size, _COCO_FOLDERS):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(len(scenes)):
            scene, name = scenes.scene(index), f"{index + 1:012d}.jpg"
            _save(root / folder / name, scene.image)
            images.append({"id": index + 1, "file_name": name, "height": size[0], "width": size[1]})
            for each in _coco_annotations(scene, image_id=index + 1):
                annotations.append({"id": len(annotations) + 1, **each})
        categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
        content = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
        with atomic_path(root / "annotations" / f"instances_{folder}.json") as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
    return root


def write_ade(root: str | os.PathLike, *, train: int, val: int, size: tuple[int, int] = (96, 128)) -> Path:
    """Writes scenes in the layout of ADE20K: ``images/training/*.jpg``, ``annotations/training/*.png`` ...

    Args:
        root: Folder; what it holds already stays.
        train: Number of scenes for training.
        val: Number of scenes held out.
        size: Height and width, in pixels.

    Returns:
        The folder. Pixels of annotations are 0 where nothing is said and otherwise 1 plus an index of `ADE_CLASSES`.
    """
    root = Path(root)
    for folder, scenes in _parts(train, val, size, _ADE_FOLDERS):
        for index in range(len(scenes)):
            scene, name = scenes.scene(index), f"ADE_{index + 1:08d}"
            classes = np.ones(size, dtype=np.uint8)
            classes[scene.unclear] = 0
            for label, mask in zip(scene.labels, scene.masks, strict=True):
                classes[mask] = label + 2
            _save(root / "images" / folder / f"{name}.jpg", scene.image)
            _save(root / "annotations" / folder / f"{name}.png", classes)
    return root


def run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of zeros and ones in turn, down the columns of a mask (h, w), as COCO counts them."""
    flat = np.concatenate([[False], mask.T.ravel()])
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]), mask.size)
    return np.diff(ends, prepend=0).tolist()


def _parts(train: int, val: int, size: tuple[int, int], folders: dict[str, str]) -> Iterator[tuple[str, DigitScenes]]:
    yield folders["train"], DigitScenes("train", train, size=size)
    yield folders["val"], DigitScenes("val", val, size=size)


def _save(path: Path, pixels: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, quality=95)  # which PNG leaves out of account


def _draw(digits: Digits, rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    image = _background(rng, size)
    labels, boxes, masks = [], [], []
    unclear = np.zeros(size, dtype=bool)
    for _ in range(int(rng.integers(1, _MOST + 1))):
        index, ink = _digit(digits, rng, most=min(size) // 2)
        place = _free_place(rng, ink.shape, size, boxes)
        if place is None:
            continue
        rows, columns = (slice(start, start + length) for start, length in zip(place, ink.shape, strict=True))
        colour = rng.integers(128, 256, 3)
        opacity = ink[..., None] / 255
        image[rows, columns] = np.rint(image[rows, columns] * (1 - opacity) + colour * opacity)
        mask = np.zeros(size, dtype=bool)
        mask[rows, columns] = ink >= _INK
        unclear[rows, columns] |= (ink >= _NO_INK) & (ink < _INK)
        labels.append(digits.targets[index])
        boxes.append(_box(mask))
        masks.append(mask)
    return Scene(image.astype(np.uint8), np.array(labels), np.array(boxes), np.stack(masks), unclear)


def _background(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A slope between two dark colours, with noise, (h, w, 3) in float."""
    first, last = rng.integers(0, 80, (2, 3))
    slope = np.add.outer(np.linspace(0, 0.5, size[0]), np.linspace(0, 0.5, size[1]))[..., None]
    return np.clip(first * (1 - slope) + last * slope + rng.integers(-12, 13, (*size, 3)), 0, 255)


def _digit(digits: Digits, rng: np.random.Generator, *, most: int) -> tuple[int, np.ndarray]:
    """The index of a digit, and its grey values enlarged to a random side, cut to where they are not black."""
    index, side = int(rng.integers(len(digits))), int(rng.integers(16, most + 1))
    grey = np.asarray(digits.load(index, channels=1).resize((side, side), Image.Resampling.BICUBIC))
    left, top, right, bottom = _box(grey >= _NO_INK)
    return index, grey[top:bottom, left:right]


def _free_place(
    rng: np.random.Generator, shape: tuple[int, ...], size: tuple[int, int], boxes: list[np.ndarray]
) -> tuple[int, int] | None:
    """Top row and left column of a place that no box is near; None if none was found."""
    for _ in range(_TRIES):
        top, left = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(size, shape, strict=True))
        bottom, right = top + shape[0] + _MARGIN, left + shape[1] + _MARGIN
        if not any(
            x0 - _MARGIN < right and left - _MARGIN < x1 and y0 - _MARGIN < bottom and top - _MARGIN < y1
            for x0, y0, x1, y1 in boxes
        ):
            return top, left
    return None


def _box(mask: np.ndarray) -> np.ndarray:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def _coco_annotations(scene: Scene, *, image_id: int) -> Iterator[dict[str, Any]]:
    for label, (x0, y0, x1, y1), mask in zip(scene.labels, scene.boxes.tolist(), scene.masks, strict=True):
        yield {
            "image_id": image_id,
            "category_id": int(label) + 1,
            "iscrowd": 0,
            "area": int(mask.sum()),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)},
        }
