"""Accuracy of a classifier on labelled images."""

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm import tqdm

from vssm.data import LabelledImages, open_dataset
from vssm.data.loaders import ReadingCheck, eval_loader
from vssm.engine.classifier import Classifier


def evaluate(
    model: nn.Module, loader: DataLoader, *, source: str, device: torch.device, amp_dtype: torch.dtype | None = None
) -> dict[str, float | int]:
    """Runs a model over all images of a loader.

    Args:
        model: Maps images to logits; it is put into evaluation mode and back.
        loader: From `vssm.data.loaders.eval_loader`.
        source: Where the images come from, for messages.
        device: Where to compute; the model is there.
        amp_dtype: Half precision for autocast; float32 when not given.

    Returns:
        ``top1`` and ``top5`` in percent, ``loss`` (mean cross-entropy in nats), the counts ``images``,
        ``correct_top1``, ``correct_top5`` and ``unreadable``, and ``images_per_s``.

    Raises:
        ValueError: More than 1 % of the files cannot be read, or logits are not finite.
    """
    training = model.training
    model.eval()
    check = ReadingCheck(source, len(loader.dataset))  # type: ignore[arg-type]  ours have a length
    counts = torch.zeros(4, dtype=torch.float64)
    start = time.perf_counter()
    for batch in tqdm(loader, desc="evaluating", leave=False, disable=not sys.stderr.isatty()):
        check.update(batch)
        if len(batch.targets):
            with torch.inference_mode(), autocast(device, amp_dtype):
                logits = model(batch.images.to(device, non_blocking=True))
            counts += _count(logits.float().cpu(), batch.targets)
    check.warn()
    model.train(training)
    images, top1, top5, loss = counts.tolist()
    return {
        "top1": 100 * top1 / images,
        "top5": 100 * top5 / images,
        "loss": loss / images,
        "images": int(images),
        "correct_top1": int(top1),
        "correct_top5": int(top5),
        "unreadable": len(check.unreadable),
        "images_per_s": images / (time.perf_counter() - start),
    }


def validate(
    classifier: Classifier,
    data_dir: Path | None,
    *,
    device: torch.device,
    batch_size: int = 128,
    workers: int = 0,
    amp_dtype: torch.dtype | None = None,
) -> dict[str, float | int]:
    """Evaluates a classifier on the held-out part of a data set; returns what `evaluate` does.

    Args:
        classifier: What to evaluate.
        data_dir: Folder of the data set; the embedded digits when not given.
        device: Where to compute.
        batch_size: Images per step.
        workers: Processes that read images; 0 to read in this one.
        amp_dtype: Half precision for autocast; float32 when not given.

    Raises:
        FileNotFoundError: There is no such data.
        ValueError: The data has other classes than the classifier.
    """
    images = open_for(classifier, data_dir)
    loader = eval_loader(
        images, classifier.config, batch_size=batch_size, workers=workers, pin_memory=device.type == "cuda"
    )
    model = classifier.model.to(device)
    return evaluate(model, loader, source=images.source, device=device, amp_dtype=amp_dtype)


def open_for(classifier: Classifier, data_dir: Path | None) -> LabelledImages:
    """Opens the held-out part of a data set with the class indices of a classifier.

    Where the classifier's classes have no names, the classes of the data must be as many, and count in their order.

    Raises:
        FileNotFoundError: There is no such data.
        ValueError: The data has other classes than the classifier.
    """
    images = open_dataset(data_dir, "val", classes=classifier.data_classes)
    count = classifier.spec.num_classes
    if classifier.data_classes is None and len(images.classes) != count:
        raise ValueError(
            f"{images.source}: expected {count} classes, as {classifier.spec.model} has, got {len(images.classes)}"
        )
    return images


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Half precision where that is safe; nothing when ``dtype`` is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _count(logits: Tensor, targets: Tensor) -> Tensor:
    """Images, correct ones among the first and the first five predictions, and the sum of the losses."""
    if not logits.isfinite().all():
        raise ValueError("evaluate: the model's logits are not finite; half precision may be too coarse for it")
    order = logits.topk(min(5, logits.shape[1])).indices
    hits = order == targets[:, None]
    loss = cross_entropy(logits, targets, reduction="sum")
    return torch.tensor([len(targets), hits[:, 0].sum(), hits.any(1).sum(), loss], dtype=torch.float64)
