"""Compares ways to train by the held-out images that their runs get right."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vssm.engine.plot import COLOURS, new_figure
from vssm.engine.records import read_results
from vssm.files import atomic_path

RESAMPLES = 10_000
WEIGHTS = "final.safetensors"  # of a run
_AT_ONCE = 1_000  # resamples, for the sake of memory
_LOG = "log.csv"


class Difference(NamedTuple):
    """How much better one group of runs is than another, in points of top-1, with its 95 % interval."""

    points: float
    low: float
    high: float


class Curve(NamedTuple):
    """Held-out accuracy of a group of runs after every epoch, in percent."""

    epochs: list[int]
    mean: list[float]
    lowest: list[float]
    highest: list[float]


def paired_difference(first: np.ndarray, second: np.ndarray, *, resamples: int = RESAMPLES) -> Difference:
    """The difference of two groups of runs on the same images, and how sure it is.

    Images and, apart in each group, runs are drawn anew with replacement; the interval holds the middle 95 % of the
    differences. Drawing the same images for both groups makes it paired.

    Args:
        first: Whether each run is right on each image, (runs, images).
        second: The same of the other group; it may have another number of runs.
        resamples: How often to draw.

    Raises:
        ValueError: The groups have not the same images.

    Reference:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"compare: expected the same images, got {first.shape[1]} and {second.shape[1]}")
    random = np.random.default_rng(0)
    images = first.shape[1]
    differences = np.empty(resamples)
    for i in range(resamples):
        drawn = np.bincount(random.integers(images, size=images), minlength=images)
        differences[i] = _of_drawn_runs(first, drawn, random) - _of_drawn_runs(second, drawn, random)
    low, high = np.percentile(differences, [2.5, 97.5])
    return Difference(100 * float(first.mean() - second.mean()), float(low), float(high))


def difference_within_runs(first: np.ndarray, second: np.ndarray, *, resamples: int = RESAMPLES) -> Difference:
    """As `paired_difference`, of the same runs treated in two ways: what is drawn are images and pairs of runs.

    Args:
        first: Whether each run is right on each image after the first treatment, (runs, images).
        second: The same after the second.
        resamples: How often to draw.

    Raises:
        ValueError: The runs or the images are not as many.
    """
    if first.shape != second.shape:
        raise ValueError(f"compare: expected the same runs and images, got {first.shape} and {second.shape}")
    gained = first.astype(np.float32) - second  # (runs, images)
    drawn, weights = _draws(*gained.shape, resamples)
    parts = (slice(start, start + _AT_ONCE) for start in range(0, resamples, _AT_ONCE))
    sums = [np.einsum("sr,sr->s", drawn[part].astype(np.float32) @ gained.T, weights[part]) for part in parts]
    low, high = np.percentile(np.concatenate(sums), [2.5, 97.5]) * 100 / gained.size
    return Difference(100 * float(first.mean() - second.mean()), float(low), float(high))


@functools.lru_cache(maxsize=1)  # comparisons of one study differ in nothing that this depends on
def _draws(runs: int, images: int, resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each image (resamples, images) and each run (resamples, runs) is drawn."""
    random = np.random.default_rng(0)

    def counts(size: int) -> np.ndarray:
        return np.bincount(random.integers(size, size=size), minlength=size).astype(np.uint8)

    return np.stack([counts(images) for _ in range(resamples)]), np.stack([counts(runs) for _ in range(resamples)])


def group_records(groups: Mapping[str, Sequence[np.ndarray]], *, resamples: int = RESAMPLES) -> list[dict[str, Any]]:
    """One record per group of runs: its accuracy, and how it differs from the first group.

    Args:
        groups: Per name, whether each run is right on each image, (images,) each.
        resamples: As of `paired_difference`.

    Returns:
        ``group``, ``runs``, ``images``, ``top1`` (mean over runs, in percent) and ``top1_of_runs``; but for the first
        group, ``difference``, ``difference_low`` and ``difference_high``, in points, the latter two of the 95 %
        interval.
    """
    baseline, *_ = groups
    records = []
    for name, hits in groups.items():
        stacked = np.stack(hits)
        record = {
            "group": name,
            "runs": len(stacked),
            "images": stacked.shape[1],
            "top1": 100 * float(stacked.mean()),
            "top1_of_runs": [100 * float(run.mean()) for run in stacked],
        }
        if name != baseline:
            points, low, high = paired_difference(stacked, np.stack(groups[baseline]), resamples=resamples)
            record |= {"difference": points, "difference_low": low, "difference_high": high}
        records.append(record)
    return records


def curve_of(runs: Sequence[str | os.PathLike]) -> Curve:
    """The accuracies in the logs of runs, as far as all of them have gone.

    Raises:
        FileNotFoundError: A folder holds no log.
        ValueError: A log holds no epoch.
    """
    logs = [read_results(Path(run) / _LOG) for run in runs]
    epochs = [int(row["epoch"]) for row in min(logs, key=len)]
    if not epochs:
        raise ValueError(f"compare: expected at least one epoch in the {_LOG} of every run, got none")
    accuracies = np.array([[float(row["val_top1"]) for row in log[: len(epochs)]] for log in logs])
    return Curve(epochs, accuracies.mean(0).tolist(), accuracies.min(0).tolist(), accuracies.max(0).tolist())


def draw_comparison(path: str | os.PathLike, curves: Mapping[str, Curve]) -> None:
    """Draws the accuracy of groups of runs over the epochs: means as lines, lowest to highest as bands.

    Args:
        path: Target; its suffix chooses the format.
        curves: Per name of a group.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = new_figure(width=6.8, height=4.2)
    axes = figure.add_subplot(xlabel="epoch", ylabel="held-out top-1 (%)")
    for index, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(curve.epochs, curve.mean, color=colour, linewidth=1.8, label=f"{name}: {curve.mean[-1]:.1f} %")
        axes.fill_between(curve.epochs, curve.lowest, curve.highest, color=colour, alpha=0.2, linewidth=0)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False, loc="lower right")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def measured(runs: Mapping[str, Sequence[Path]], hits_of: Callable[[Path], np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Which images each run of each group gets right.

    Raises:
        ValueError: Two runs have other numbers of images.
    """
    found = {name: [hits_of(run) for run in group] for name, group in runs.items()}
    sizes = {len(hits) for group in found.values() for hits in group}
    if len(sizes) > 1:
        raise ValueError(f"compare: expected the same held-out images in all runs, got {sorted(sizes)} images")
    return found


def _of_drawn_runs(hits: np.ndarray, drawn: np.ndarray, random: np.random.Generator) -> float:
    """Top-1 in percent over runs drawn anew, of images that count as often as they were drawn."""
    runs = random.integers(len(hits), size=len(hits))
    return 100 * float((hits[runs] @ drawn).mean() / drawn.sum())
