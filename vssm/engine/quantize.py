"""A classifier in 8-bit integers: calibrated, written, and compared with the one in float."""

import copy
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vssm.data import DataOptions, LabelledImages, open_dataset
from vssm.data.images import SomeImages
from vssm.data.loaders import ReadingCheck, eval_loader
from vssm.engine.classifier import Classifier, load, save
from vssm.engine.evaluate import evaluate, open_for
from vssm.engine.tallies import Answers
from vssm.engine.timing import measure_by_turns
from vssm.quantization import compact, quantize
from vssm_kernels.backend import backend_name

_WARMUP = 3  # calls before the timed ones
_USUAL = DataOptions()


@dataclass(frozen=True)
class QuantizeSetting:
    """How to quantise, and where to measure.

    Args:
        device: Where to compute.
        images: Training images to calibrate on; all where there are fewer.
        percentile: At which the input of scans is clipped, from 50 to 100.
        hadamard: Transform what ``out_proj`` reads of a scan.
        batch_size: Images per step.
        workers: Processes that read images; 0 to read in this one.
        repeats: Timed calls with one image in each of three turns.
    """

    device: torch.device
    images: int = 256
    percentile: float = 99.999
    hadamard: bool = True
    batch_size: int = 64
    workers: int = 0
    repeats: int = 20


def quantize_classifier(
    classifier: Classifier,
    data_dir: str | os.PathLike | None,
    path: Path,
    setting: QuantizeSetting,
    *,
    options: DataOptions = _USUAL,
) -> dict[str, Any]:
    """Writes a classifier with its linear layers in integers, and compares the file with the classifier.

    Args:
        classifier: In float, in evaluation mode; it stays as it is.
        data_dir: The data set, whose training part calibrates, and whose held-out part compares; the embedded digits
            when not given.
        path: Target, ending in .safetensors.
        setting: How to quantise.
        options: How to read the data set.

    Returns:
        What was done: ``calibration_images``, the numbers ``int8_layers``, ``rotated_layers``, ``clipped_layers`` and
        ``kept_layers`` of linear layers, as `Quantized` has them; the percentage of the parameters that are in
        integers, ``int8_percent``, and of those that are not, ``float_percent``, by kinds of modules.
        What came of it: ``top1`` of the file and ``float_top1`` in percent, ``agreement`` (images with the same answer
        of both, in percent) on ``images``; ``bytes`` of the file and ``float_bytes`` of the weights before, and their
        ratio ``size_percent``; ``latency_ms`` and ``float_latency_ms`` of one image, with percentiles, and the
        ``scan_backend`` of both.

    Raises:
        FileNotFoundError: The data or its training part is not there.
        ValueError: The data has other classes than the classifier, or there is nothing to quantise.
    """
    held_out = open_for(classifier, data_dir, options=options)
    calibration = _calibration_images(classifier, data_dir, setting.images, options)
    model = copy.deepcopy(classifier.model).to(setting.device)
    loader = eval_loader(
        calibration,
        classifier.config,
        batch_size=setting.batch_size,
        workers=setting.workers,
        device=setting.device,
    )
    done = quantize(
        model,
        _images(loader, calibration.source),
        images=len(calibration),
        percentile=setting.percentile,
        hadamard=setting.hadamard,
    )
    facts = {"calibration_images": len(calibration), "percentile": setting.percentile, "hadamard": setting.hadamard}
    save(path, classifier, compact(model.state_dict()), {"quantization": facts | done._asdict()})
    layers = {f"{name}_layers": len(names) for name, names in done._asdict().items()}
    shares = _shares(classifier.model, model)
    return facts | layers | shares | _sizes(classifier.model, path) | _compare(classifier, path, held_out, setting)


def _calibration_images(
    classifier: Classifier, data_dir: str | os.PathLike | None, count: int, options: DataOptions
) -> LabelledImages:
    """So many training images, evenly spread over the data set, and so over its classes."""
    images = open_dataset(data_dir, "train", options=options)
    total = len(images)
    return SomeImages(images, [index * total // min(count, total) for index in range(min(count, total))])


def _images(loader: DataLoader, source: str) -> Iterator[Tensor]:
    """The images of a loader, with a bar; damaged files are left out and counted."""
    check = ReadingCheck(source, len(loader.dataset))  # type: ignore[arg-type]  ours have a length
    for batch in tqdm(loader, desc="calibrating", leave=False, disable=not sys.stderr.isatty()):
        check.update(batch)
        if len(batch.targets):
            yield batch.images
    check.warn()


def _shares(model: nn.Module, quantized: nn.Module) -> dict[str, Any]:
    """How many of the parameters are in integers, and where the others are, in percent."""
    total = sum(parameter.numel() for parameter in model.parameters())
    left: Counter[str] = Counter()
    for module in quantized.modules():
        left[type(module).__name__] += sum(each.numel() for each in module.parameters(recurse=False))
    parts = {name: 100 * number / total for name, number in left.most_common() if number}
    return {"int8_percent": 100 - sum(parts.values()), "float_percent": parts}


def _sizes(model: nn.Module, path: Path) -> dict[str, Any]:
    before, after = sum(value.nbytes for value in model.state_dict().values()), path.stat().st_size
    return {"bytes": after, "float_bytes": before, "size_percent": 100 * after / before}


def _compare(classifier: Classifier, path: Path, held_out: LabelledImages, setting: QuantizeSetting) -> dict[str, Any]:
    """Accuracy and time of a classifier and of what a file makes of it, and how often they agree."""
    both = {"float_": classifier, "": load(path)}
    record, answers = {}, []
    for prefix, each in both.items():
        model, tally = each.model.to(setting.device), Answers()
        loader = eval_loader(
            held_out,
            each.config,
            batch_size=setting.batch_size,
            workers=setting.workers,
            device=setting.device,
        )
        metrics = evaluate(model, loader, source=held_out.source, device=setting.device, tallies=[tally])
        record |= {f"{prefix}{name}": metrics[name] for name in ("top1", "top5", "loss", "correct_top1")}
        record["images"] = metrics["images"]
        answers.append(tally.in_order()[1])
    record["agreement"] = 100 * (answers[0] == answers[1]).double().mean().item()
    return record | _latencies(both, setting)


def _latencies(classifiers: Mapping[str, Classifier], setting: QuantizeSetting) -> dict[str, Any]:
    """Times of one image in each model, under names that begin as those of the models."""
    config = classifiers[""].config
    images = torch.randn(1, config.channels, config.height, config.width, device=setting.device)
    calls = {prefix: partial(each.model, images) for prefix, each in classifiers.items()}
    with torch.no_grad():
        times = measure_by_turns(calls, setting.device, warmup=_WARMUP, repeats=setting.repeats)
    record: dict[str, Any] = {"scan_backend": backend_name(setting.device.type)}
    for prefix, each in times.items():
        for key, name in (("median", "latency_ms"), ("p10", "latency_p10_ms"), ("p90", "latency_p90_ms")):
            record[prefix + name] = each[key]
    return record
