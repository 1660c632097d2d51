"""Accuracy of a classifier on labelled images."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm import tqdm

from vssm.data import DataOptions, LabelledImages, open_dataset
from vssm.data.loaders import Batch, ReadingCheck, eval_loader
from vssm.engine import distributed
from vssm.engine.classifier import Classifier
from vssm.engine.memory import halving
from vssm.engine.tallies import PerClass, RealLabels, Tally, read_real_labels, real_labels_of


def evaluate(
    model: nn.Module,
    loader: DataLoader,
    *,
    source: str,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    tallies: Sequence[Tally] = (),
    after_batch: Callable[[], None] | None = None,
) -> dict[str, float | int]:
    """Runs a model over all images of a loader, or of the loaders of processes that share the images.

    Args:
        model: Maps images to logits; it is put into evaluation mode and back.
        loader: From `vssm.data.loaders.eval_loader`.
        source: Where the images come from, for messages.
        device: Where to compute; the model is there.
        amp_dtype: Half precision for autocast; float32 when not given.
        tallies: What else counts the answers, of this process.
        after_batch: Called after every batch; what it raises ends the evaluation.

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
    shown = sys.stderr.isatty() and distributed.is_main()
    for batch in tqdm(loader, desc="evaluating", leave=False, disable=not shown):
        check.update(batch)
        logits = _logits(model, batch, device, amp_dtype)
        counts += _count(logits, batch.targets)
        for tally in tallies:
            tally.update(logits, batch)
        if after_batch is not None:
            after_batch()
    check.warn()
    model.train(training)
    images, top1, top5, loss, unreadable = distributed.summed(*counts.tolist(), len(check.unreadable))
    return {
        "top1": 100 * top1 / images,
        "top5": 100 * top5 / images,
        "loss": loss / images,
        "images": int(images),
        "correct_top1": int(top1),
        "correct_top5": int(top5),
        "unreadable": int(unreadable),
        "images_per_s": images / (time.perf_counter() - start),
    }


def validate(
    classifier: Classifier,
    data_dir: str | os.PathLike | None,
    *,
    device: torch.device,
    batch_size: int = 128,
    workers: int = 0,
    amp_dtype: torch.dtype | None = None,
    options: DataOptions | None = None,
    real_labels: str | None = None,
    per_class: bool = False,
    tallies: Sequence[Tally] = (),
) -> dict[str, Any]:
    """Evaluates a classifier on the held-out part of a data set.

    Args:
        classifier: What to evaluate.
        data_dir: The data set, as `vssm.data.open_dataset` takes it; the embedded digits when not given.
        device: Where to compute.
        batch_size: Images per step; halved until a step fits into memory.
        workers: Processes that read images; 0 to read in this one.
        amp_dtype: Half precision for autocast; float32 when not given.
        options: How to read the data set.
        real_labels: File of several right classes per image, or ``imagenet`` for the one that comes with timm.
        per_class: Also count per class.
        tallies: What else counts the answers.

    Returns:
        What `evaluate` does, and ``batch_size``; with real labels ``real_top1``, ``real_top5`` and ``real_images``, and
        per class the list ``per_class``, as `vssm.engine.tallies` describes them.

    Raises:
        FileNotFoundError: There is no such data.
        ValueError: The data has other classes than the classifier, or one image does not fit into memory.
    """
    images = open_for(classifier, data_dir, options=options)
    right = None if real_labels is None else real_labels_of(images, read_real_labels(real_labels), source=real_labels)
    names = (*images.classes, *classifier.classes[len(images.classes) :])
    model = classifier.model.to(device)

    def work(size: int) -> dict[str, Any]:
        loader = eval_loader(images, classifier.config, batch_size=size, workers=workers, device=device)
        real, classes = None if right is None else RealLabels(right), PerClass(names) if per_class else None
        counting = [*tallies, *(tally for tally in (real, classes) if tally is not None)]
        metrics = evaluate(model, loader, source=images.source, device=device, amp_dtype=amp_dtype, tallies=counting)
        more = {} if real is None else real.metrics()
        rows = {} if classes is None else {"per_class": classes.rows()}
        return {**metrics, **more, "batch_size": size, **rows}

    return halving(work, batch_size)


def open_for(
    classifier: Classifier, data_dir: str | os.PathLike | None, *, options: DataOptions | None = None
) -> LabelledImages:
    """Opens the held-out part of a data set with the class indices of a classifier.

    Where the classifier's classes have no names, those of the data count in their order and must be as many; unless
    the data calls them as ImageNet does, or by their indices.

    Raises:
        FileNotFoundError: There is no such data.
        ValueError: The data has other classes than the classifier.
    """
    count = classifier.spec.num_classes
    images = open_dataset(
        data_dir,
        "val",
        classes=classifier.data_classes,
        preferred=classifier.usual_names,
        options=options or DataOptions(),
    )
    if classifier.data_classes is None and len(images.classes) != count:
        raise ValueError(
            f"{images.source}: expected {count} classes, as {classifier.spec.model} has, got {len(images.classes)}"
        )
    return images


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Half precision where that is safe; nothing when ``dtype`` is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _logits(model: nn.Module, batch: Batch, device: torch.device, amp_dtype: torch.dtype | None) -> Tensor:
    """Logits (b, classes) of a batch, on the CPU.

    A model that is cut into parts needs all processes to run it: one without images of its own runs on a blank.
    """
    images = batch.images if len(batch.targets) else batch.images.new_zeros(1, *batch.images.shape[1:])
    # Not in inference_mode: sharded parameters are gathered into buffers that training uses again.
    with torch.no_grad(), autocast(device, amp_dtype):
        logits = model(images.to(device, non_blocking=True))
    return logits.float().cpu()[: len(batch.targets)]


def _count(logits: Tensor, targets: Tensor) -> Tensor:
    """Images, correct ones among the first and the first five predictions, and the sum of the losses."""
    if not logits.isfinite().all():
        raise ValueError("evaluate: the model's logits are not finite; half precision may be too coarse for it")
    order = logits.topk(min(5, logits.shape[1])).indices
    hits = order == targets[:, None]
    loss = cross_entropy(logits, targets, reduction="sum")
    return torch.tensor([len(targets), hits[:, 0].sum(), hits.any(1).sum(), loss], dtype=torch.float64)
