"""Classes of single images with their probabilities."""

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vssm.data import DataOptions, LabelledImages, open_images
from vssm.data.images import UNKNOWN
from vssm.data.loaders import eval_loader
from vssm.engine.classifier import Classifier
from vssm.engine.evaluate import autocast
from vssm.engine.memory import halving

_logger = logging.getLogger(__name__)


def gather_images(
    paths: Sequence[str | os.PathLike], classifier: Classifier, *, options: DataOptions | None = None
) -> LabelledImages:
    """Image files, all images in folders, and the images of data sets.

    An image of a folder that lies in a folder with the name of a class is taken to be of that class.

    Args:
        paths: Files, folders and data sets, as `vssm.data.open_images` takes them.
        classifier: Whose classes they may have.
        options: How to read data sets.

    Returns:
        The images, in the order of ``paths``.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: There are no images in a place, or it cannot be used as it is.
    """
    places = {name: index for index, name in enumerate(classifier.classes)}
    if classifier.data_classes is None:
        places |= {name: index for index, name in enumerate(classifier.usual_names)}
    return open_images(paths, places, count=len(classifier.classes), options=options or DataOptions())


def predict(
    classifier: Classifier,
    images: LabelledImages,
    *,
    device: torch.device,
    top_k: int = 5,
    batch_size: int = 64,
    workers: int = 0,
    amp_dtype: torch.dtype | None = None,
) -> list[dict[str, Any]]:
    """Classifies images; those that cannot be read are left out, with a line in the log for each.

    Args:
        classifier: What to ask.
        images: From `gather_images` or a data set.
        device: Where to compute.
        top_k: Number of classes per image; all where there are fewer.
        batch_size: Images per step; halved until a step fits into memory.
        workers: Processes that read images; 0 to read in this one.
        amp_dtype: Half precision for autocast; float32 when not given.

    Returns:
        Per image: its place as ``index`` and its name as ``image``; ``predictions`` (``class`` and ``probability`` of
        the most probable classes, in falling order); ``true`` and ``correct``, None where the class is not known.

    Raises:
        ValueError: One image does not fit into memory.
    """
    model = classifier.model.to(device).eval()

    def work(size: int) -> list[dict[str, Any]]:
        loader = eval_loader(images, classifier.config, batch_size=size, workers=workers, device=device)
        records, unreadable = [], []
        for batch in tqdm(loader, desc="predicting", leave=False, disable=not sys.stderr.isatty()):
            unreadable += batch.unreadable
            if not len(batch.targets):
                continue
            with torch.inference_mode(), autocast(device, amp_dtype):
                logits = model(batch.images.to(device, non_blocking=True))
            probabilities = logits.float().softmax(-1).cpu()
            for index, row in zip(batch.indices.tolist(), probabilities, strict=True):
                records.append(_record(images, index, row.topk(min(top_k, len(row))), classifier.classes))
        for message in unreadable:
            _logger.warning("left out: %s", message)
        return records

    return halving(work, batch_size)


def flat_record(record: dict[str, Any]) -> dict[str, Any]:
    """The record of an image with a column for each of its classes and probabilities, for a table."""
    flat = {key: value for key, value in record.items() if key != "predictions"}
    for place, each in enumerate(record["predictions"], start=1):
        flat |= {f"class_{place}": each["class"], f"probability_{place}": each["probability"]}
    return flat


def _record(images: LabelledImages, index: int, top: Sequence[Tensor], classes: Sequence[str]) -> dict[str, Any]:
    probabilities, indices = (values.tolist() for values in top)
    target = images.targets[index]
    return {
        "index": index,
        "image": images.name(index),
        "true": None if target == UNKNOWN else classes[target],
        "correct": None if target == UNKNOWN else indices[0] == target,
        "predictions": [
            {"class": classes[each], "probability": probability}
            for each, probability in zip(indices, probabilities, strict=True)
        ],
    }
