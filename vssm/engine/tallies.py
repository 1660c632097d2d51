"""What else than top-1 and top-5 is counted in an evaluation: accuracy per class, and by real labels."""

import json
import pkgutil
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vssm.data import LabelledImages
from vssm.data.labels import some
from vssm.data.loaders import Batch

_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})")
_OWN_FILE = "_info/imagenet_real_labels.json"  # in timm


class Tally(Protocol):
    """Counts something in the course of an evaluation."""

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Takes in a batch with its logits (b, classes), on the CPU."""
        ...


class PerClass:
    """Counts right answers and confusions per class.

    Args:
        names: Names of the classes in the order of the logits.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._answers: Counter[tuple[int, int]] = Counter()  # of class and predicted class

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Takes in a batch with its logits (b, classes), on the CPU."""
        self._answers.update(zip(batch.targets.tolist(), logits.argmax(-1).tolist(), strict=True))

    def rows(self) -> list[dict[str, Any]]:
        """One record per class that has images.

        ``index`` and ``class``; the counts ``images`` and ``correct``; ``top1`` in percent; ``confused_with``, the
        class that it is most often taken for, and ``confused_images``, how often.
        """
        answers: dict[int, Counter[int]] = {}
        for (target, predicted), count in self._answers.items():
            answers.setdefault(target, Counter())[predicted] = count
        return [self._row(target, answers[target]) for target in sorted(answers)]

    def _row(self, target: int, predicted: Counter[int]) -> dict[str, Any]:
        images, correct = predicted.total(), predicted[target]
        # Of classes that are as often confused with it, the first: a counter would go by the order of the images.
        wrong, times = max(
            ((index, count) for index, count in predicted.items() if index != target),
            key=lambda item: (item[1], -item[0]),
            default=(None, 0),
        )
        return {
            "index": target,
            "class": self.names[target],
            "images": images,
            "correct": correct,
            "top1": 100 * correct / images,
            "confused_with": None if wrong is None else self.names[wrong],
            "confused_images": times,
        }


class Answers:
    """Remembers the class of each image and the one that the model finds most probable."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[int, int]] = {}

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Takes in a batch with its logits (b, classes), on the CPU."""
        pairs = zip(batch.targets.tolist(), logits.argmax(-1).tolist(), strict=True)
        self._found.update(zip(batch.indices.tolist(), pairs, strict=True))

    def in_order(self) -> tuple[Tensor, Tensor]:
        """Classes and answers (images,), in the order of the data set."""
        targets, answers = torch.tensor([self._found[index] for index in sorted(self._found)]).T
        return targets, answers


class RealLabels:
    """Counts answers that are among several right ones, for images that have any.

    Args:
        labels: Class indices per image of the data set.

    Reference:
        Beyer et al., "Are we done with ImageNet?", 2020, https://arxiv.org/abs/2006.07159.
    """

    def __init__(self, labels: Sequence[Sequence[int]]) -> None:
        self.labels = labels
        self._counts = torch.zeros(3, dtype=torch.int64)

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Takes in a batch with its logits (b, classes), on the CPU."""
        order = logits.topk(min(5, logits.shape[1])).indices.tolist()
        for index, predicted in zip(batch.indices.tolist(), order, strict=True):
            if right := set(self.labels[index]):
                first, any_of_five = predicted[0] in right, not right.isdisjoint(predicted)
                self._counts += torch.tensor([1, first, any_of_five])

    def metrics(self) -> dict[str, float | int | None]:
        """``real_top1`` and ``real_top5`` in percent, of ``real_images`` images; None where there are none."""
        images, first, five = self._counts.tolist()
        share = {"real_top1": 100 * first / images, "real_top5": 100 * five / images} if images else {}
        return {"real_top1": None, "real_top5": None, **share, "real_images": images}


def read_real_labels(source: str) -> list[list[int]] | dict[str, list[int]]:
    """Reads lists of right class indices: a JSON list of lists, or an object of lists by the names of images.

    Args:
        source: The file; ``imagenet`` for the labels of ImageNet's validation images that come with timm.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not of this format.
    """
    if source == "imagenet":
        content = pkgutil.get_data("timm.data", _OWN_FILE)
        assert content is not None, "timm has the file"
    elif not Path(source).is_file():
        raise FileNotFoundError(f"{source}: no such file of real labels")
    else:
        content = Path(source).read_bytes()
    try:
        labels = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{source}: not a JSON file ({error})") from error
    lists = list(labels.values()) if isinstance(labels, dict) else labels
    if not isinstance(lists, list) or not all(_is_list_of_indices(each) for each in lists):
        raise ValueError(f"{source}: expected a list of lists of class indices, one list per image")
    return labels


def real_labels_of(
    images: LabelledImages, labels: Sequence[Sequence[int]] | Mapping[str, Sequence[int]], *, source: str
) -> list[Sequence[int]]:
    """Brings real labels into the order of a data set.

    Images of ImageNet's validation part are told by their numbers, as in ILSVRC2012_val_00000293.JPEG, which class
    folders bring into another order; other lists are in the order of the images.

    Args:
        images: The data set.
        labels: From `read_real_labels`.
        source: Where they come from, for messages.

    Returns:
        Class indices per image.

    Raises:
        ValueError: There is no list for an image.
    """
    names = [Path(images.name(index)).name for index in range(len(images))]
    if isinstance(labels, Mapping):
        by_stem = {Path(name).stem: each for name, each in labels.items()}
        missing = [name for name in names if Path(name).stem not in by_stem]
        if missing:
            raise ValueError(f"{source}: no labels of {len(missing)} of {len(names)} images ({some(missing)})")
        return [by_stem[Path(name).stem] for name in names]
    numbers = [_NUMBERED.search(name) for name in names]
    places = [int(number[1]) - 1 if number else index for index, number in enumerate(numbers)]
    numbered = all(numbers)
    if not numbered and len(labels) != len(names):
        raise ValueError(
            f"{source}: expected labels of the {len(names)} images of {images.source}, whose names have no numbers as "
            f"in ILSVRC2012_val_00000293, got {len(labels)}"
        )
    if numbered and not 0 <= min(places) <= max(places) < len(labels):
        raise ValueError(f"{source}: expected labels of image {max(places) + 1}, got {len(labels)} lists")
    return [labels[place] for place in (places if numbered else range(len(names)))]


def _is_list_of_indices(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, int) and item >= 0 for item in value)
