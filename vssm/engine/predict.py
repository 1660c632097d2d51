"""Classes of single images with their probabilities."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vssm.data import LabelledImages
from vssm.data.images import ImageFiles, UnreadableImage, find_images
from vssm.data.loaders import eval_loader
from vssm.engine.classifier import Classifier
from vssm.engine.evaluate import autocast

_UNKNOWN = -1  # target of an image whose class nobody has told


def gather_images(paths: Sequence[str | os.PathLike], classes: Sequence[str]) -> ImageFiles:
    """Image files, and all images in folders.

    An image of a folder that lies in a folder with the name of a class is taken to be of that class.

    Args:
        paths: Files and folders.
        classes: Names of the classes.

    Returns:
        The images, in the order of ``paths``; the target of one whose class is not known is -1.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: A folder has no images in it.
    """
    known = {name: index for index, name in enumerate(classes)}
    files: list[Path] = []
    targets: list[int] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such image file or folder")
        found = find_images(path) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path}: no images in this folder")
        files += found
        targets += [known.get(file.parent.name, _UNKNOWN) if path.is_dir() else _UNKNOWN for file in found]
    return ImageFiles(files, source=", ".join(map(str, paths)), classes=classes, targets=targets)


def predict(
    classifier: Classifier,
    images: LabelledImages,
    *,
    device: torch.device,
    top_k: int = 5,
    batch_size: int = 64,
    amp_dtype: torch.dtype | None = None,
) -> list[dict[str, Any]]:
    """Classifies images.

    Args:
        classifier: What to ask.
        images: From `gather_images` or a data set.
        device: Where to compute.
        top_k: Number of classes per image; all where there are fewer.
        batch_size: Images per step.
        amp_dtype: Half precision for autocast; float32 when not given.

    Returns:
        Per image: its place as ``index`` and its name as ``image``; ``predictions`` (``class`` and ``probability`` of
        the most probable classes, in falling order); ``true`` and ``correct``, None where the class is not known.

    Raises:
        UnreadableImage: A file is no image, or damaged.
    """
    model = classifier.model.to(device).eval()
    loader = eval_loader(images, classifier.config, batch_size=batch_size)
    records = []
    for batch in tqdm(loader, desc="predicting", leave=False, disable=not sys.stderr.isatty()):
        if batch.unreadable:
            raise UnreadableImage(batch.unreadable[0])
        with torch.inference_mode(), autocast(device, amp_dtype):
            logits = model(batch.images.to(device))
        probabilities = logits.float().softmax(-1).cpu()
        for index, row in zip(batch.indices.tolist(), probabilities, strict=True):
            records.append(_record(images, index, row.topk(min(top_k, len(row))), classifier.classes))
    return records


def _record(images: LabelledImages, index: int, top: Sequence[Tensor], classes: Sequence[str]) -> dict[str, Any]:
    probabilities, indices = (values.tolist() for values in top)
    target = images.targets[index]
    return {
        "index": index,
        "image": images.name(index),
        "true": None if target == _UNKNOWN else classes[target],
        "correct": None if target == _UNKNOWN else indices[0] == target,
        "predictions": [
            {"class": classes[each], "probability": probability}
            for each, probability in zip(indices, probabilities, strict=True)
        ],
    }
