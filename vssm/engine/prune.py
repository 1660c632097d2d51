"""Accuracy, speed and operations of a classifier on fewer and fewer tokens."""

import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from vssm.data import DataOptions
from vssm.engine.classifier import Classifier
from vssm.engine.evaluate import autocast, validate
from vssm.engine.info import count_operations, count_reduced
from vssm.engine.memory import halving
from vssm.engine.plot import line_plot
from vssm.engine.timing import measure_time, throughput
from vssm.pruning import Schedule

_DENSE = "all tokens"


class PruneSetting(NamedTuple):
    """How reductions are measured.

    Args:
        device: Where to compute.
        batch_size: Images per step; halved until a step fits into memory.
        workers: Processes that read images; 0 to read in this one.
        amp_dtype: Half precision for autocast; float32 when not given.
        warmup: Steps before the timed ones.
        repeats: Timed steps.
    """

    device: torch.device
    batch_size: int = 64
    workers: int = 0
    amp_dtype: torch.dtype | None = None
    warmup: int = 3
    repeats: int = 10


def grid_of(
    base: Schedule, *, keeps: Sequence[float] = (), policies: Sequence[str] = (), aligns: Sequence[str] = ()
) -> list[Schedule]:
    """All schedules with one of the shares, policies and alignments each; the base's own where none are given.

    A policy that is not the base's comes with its own score, an alignment that is not with its own convolutions.
    """
    amounts = [{"keep": keep} for keep in keeps] or [{}]
    ways = [{} if policy == base.policy else {"policy": policy, "score": None} for policy in policies] or [{}]
    alignments = [{} if align == base.align else {"align": align, "conv": None} for align in aligns] or [{}]
    return [
        base.with_options(**way, **alignment, **amount)
        for way, alignment, amount in itertools.product(ways, alignments, amounts)
    ]


def measure_reductions(
    classifier: Classifier,
    data_dir: str | os.PathLike | None,
    schedules: Sequence[Schedule],
    setting: PruneSetting,
    *,
    options: DataOptions | None = None,
    done: Callable[[list[dict[str, Any]]], object] = lambda records: None,
) -> list[dict[str, Any]]:
    """Evaluates and times a classifier on all tokens, and then as each schedule says, without training it.

    Args:
        classifier: What to evaluate.
        data_dir: The data set, as `vssm.data.open_dataset` takes it; the embedded digits when not given.
        schedules: How to reduce tokens.
        setting: How to measure.
        options: How to read the data set.
        done: Called with all records so far after each.

    Returns:
        Records with ``policy`` (None for all tokens), ``align``, ``keep``, ``remove``, ``score``, ``conv``, ``after``,
        ``tokens_left``, ``gflops``, ``over_dense``, ``top1``, ``top5``, ``loss``, ``images``, ``batch_size`` and
        ``images_per_s`` with its 10th and 90th percentiles, of the model alone on images that lie there.

    Raises:
        FileNotFoundError: There is no such data.
        ValueError: A schedule does not suit the model, or the data has other classes than the classifier.
    """
    classifier.model.to(setting.device).eval()
    for schedule in schedules:
        schedule.reducer(classifier.model)  # refused before the first hour is spent
    config = classifier.config
    image = torch.zeros(1, config.channels, config.height, config.width, device=setting.device)
    dense = count_operations(classifier.model, image)
    records: list[dict[str, Any]] = []
    for schedule in (None, *schedules):
        about = {"policy": None, "gflops": dense / 1e9, "over_dense": 1.0}
        if schedule is not None:
            about = describe_reduction(schedule, count_reduced(classifier.model, image, schedule, dense=dense))
        with nullcontext() if schedule is None else schedule.reducer(classifier.model):
            measured = _measure(classifier, data_dir, setting, options)
        records.append({**about, **measured})
        done(records)
    return records


def plot_reductions(path: str | os.PathLike, records: Sequence[dict[str, Any]], *, model: str) -> None:
    """Draws accuracy against throughput, one line a policy and alignment, and a point for all tokens.

    Args:
        path: Target, ending in .png, .svg or .pdf.
        records: Of `measure_reductions`.
        model: What was measured, for the heading.
    """
    series: dict[str, tuple[list[float], list[float]]] = {}
    for record in sorted(records, key=lambda record: -record["gflops"]):
        label = _DENSE if record["policy"] is None else f"{record['policy']}, {record['align']}"
        rates, accuracies = series.setdefault(label, ([], []))
        rates.append(record["images_per_s"])
        accuracies.append(record["top1"])
    labels = sorted(series, key=lambda label: label == _DENSE)
    line_plot(
        path,
        {label: series[label] for label in labels},
        xlabel="images per second",
        ylabel="top-1 (%)",
        title=f"{model} on fewer tokens, not trained for it",
    )


def describe_reduction(schedule: Schedule, counted: dict[str, Any]) -> dict[str, Any]:
    """What a record says of a schedule.

    Args:
        schedule: How tokens are reduced.
        counted: From `vssm.engine.info.count_reduced`.
    """
    return {
        **{name: value for name, value in schedule.as_dict().items() if name not in ("model", "source")},
        "tokens_left": counted["tokens_left"],
        "gflops": counted["pruned_gflops"],
        "over_dense": counted["pruned_over_dense"],
    }


def _measure(
    classifier: Classifier, data_dir: str | os.PathLike | None, setting: PruneSetting, options: DataOptions | None
) -> dict[str, Any]:
    metrics = validate(
        classifier,
        data_dir,
        device=setting.device,
        batch_size=setting.batch_size,
        workers=setting.workers,
        amp_dtype=setting.amp_dtype,
        options=options,
    )
    kept = ("top1", "top5", "loss", "images", "correct_top1", "unreadable")
    return {**{name: metrics[name] for name in kept}, **_throughput(classifier, setting)}


def _throughput(classifier: Classifier, setting: PruneSetting) -> dict[str, Any]:
    config = classifier.config

    def measure(batch_size: int) -> dict[str, Any]:
        images = torch.randn(batch_size, config.channels, config.height, config.width, device=setting.device)

        def call() -> None:
            with torch.no_grad(), autocast(setting.device, setting.amp_dtype):
                classifier.model(images)

        times = measure_time(call, setting.device, warmup=setting.warmup, repeats=setting.repeats)
        return throughput(times, batch_size)

    return halving(measure, setting.batch_size)
