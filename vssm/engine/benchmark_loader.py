"""How fast images are read, decoded and transformed: our loaders beside timm's on the same images and transforms."""

import gc
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from timm.data import ImageDataset, create_loader
from torch.utils.data import DataLoader

from vssm.data import DataOptions, LabelledImages, Split, open_dataset
from vssm.data.images import ImageFiles
from vssm.data.loaders import Augmentation, InputConfig, eval_loader, train_loader
from vssm.data.policies import allow_no_bits
from vssm.engine.records import environment

_logger = logging.getLogger(__name__)
_KINDS = {
    "crop and flip": Augmentation(color_jitter=0.0, interpolation="bicubic"),
    "RandAugment and erasing": Augmentation(aa="rand-m9-mstd0.5-inc1", reprob=0.25, interpolation="bicubic"),
    "evaluation": None,
}


class LoaderSetting(NamedTuple):
    """How loaders are measured.

    Args:
        device: Where batches are normalised.
        batch_size: Images per batch.
        workers: Processes that read images; 0 to read in this one.
        img_size: Height and width of the input in pixels.
        repeats: Timed passes.
        images: Most images of a pass.
    """

    device: torch.device
    batch_size: int = 64
    workers: int = 2
    img_size: tuple[int, int] = (224, 224)
    repeats: int = 5
    images: int = 2048


def benchmark_loader(
    data: str | os.PathLike | None, setting: LoaderSetting, *, options: DataOptions | None = None
) -> list[dict[str, Any]]:
    """Measures loaders of training, with light and with full augmentation, and of evaluation, ours and timm's.

    A pass is a part of an epoch, with the start and the end of the worker processes and the normalisation of batches.
    Passes of the two packages alternate, after one of each that is not timed, so that what else the machine does falls
    on both. timm reads class folders alone here; other data is measured without it, with a line in the log.

    Args:
        data: A data set, as `vssm.data.open_dataset` takes it.
        setting: How to measure.
        options: How to read the data set.

    Returns:
        Per loader: ``loader`` (crop and flip; RandAugment and erasing; evaluation), ``package``, ``images`` of a pass;
        ``images_per_s``, median and percentiles over the passes; ``cpu_ms_per_image``, the median of the time of all
        processes, which depends less on what else the machine does; ``speed_over_timm`` and ``cpu_over_timm``, the
        medians of the ratios of neighbouring passes, where timm was measured; the settings; and the environment.

    Raises:
        FileNotFoundError: There is no such data.
        ValueError: The data cannot be used as it is.
    """
    surroundings = {
        "data": "embedded digits" if data is None else Path(data).name,
        "img_size": setting.img_size,
        "batch_size": setting.batch_size,
        "workers": setting.workers,
        "repeats": setting.repeats,
        "cores": os.cpu_count(),
        **environment(setting.device),
    }
    records = []
    for kind, augmentation in _KINDS.items():
        split: Split = "val" if augmentation is None else "train"
        images = open_dataset(data, split, options=options or DataOptions())
        records += [record | surroundings for record in _measure(kind, images, augmentation, setting)]
    return records


def _measure(
    kind: str, images: LabelledImages, augmentation: Augmentation | None, setting: LoaderSetting
) -> list[dict[str, Any]]:
    makers: dict[str, Callable[[], Any]] = {"vssm": partial(_ours, images, augmentation, setting)}
    if isinstance(images, ImageFiles) and Path(images.source).is_dir():
        makers["timm"] = partial(_theirs, images.source, augmentation, setting)
    else:
        _logger.info("%s: no class folders, which timm would read; %s of vssm alone", images.source, kind)
    passes: dict[str, list[_Pass]] = {name: [] for name in makers}
    for _ in range(1 + setting.repeats):
        for name, maker in makers.items():
            passes[name].append(_pass(maker, setting))
    timed = {name: each[1:] for name, each in passes.items()}
    return [_record(kind, name, timed) for name in makers]


def _record(kind: str, name: str, passes: dict[str, list["_Pass"]]) -> dict[str, Any]:
    ours = passes[name]
    deciles = quantiles([each.rate for each in ours], n=10, method="inclusive")
    record = {
        "loader": kind,
        "package": name,
        "images": ours[0].images,
        "images_per_s": deciles[4],
        "images_per_s_p10": deciles[0],
        "images_per_s_p90": deciles[8],
        "cpu_ms_per_image": median(each.cpu_ms for each in ours),
    }
    if name == "vssm" and "timm" in passes:
        pairs = list(zip(ours, passes["timm"], strict=True))
        record["speed_over_timm"] = median(mine.rate / theirs.rate for mine, theirs in pairs)
        record["cpu_over_timm"] = median(mine.cpu_ms / theirs.cpu_ms for mine, theirs in pairs)
    return record


class _Pass(NamedTuple):
    """What one pass took."""

    images: int
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds

    @property
    def cpu_ms(self) -> float:
        """Of an image, in milliseconds."""
        return 1e3 * self.cpu_seconds / self.images


def _pass(maker: Callable[[], Any], setting: LoaderSetting) -> _Pass:
    loader = maker()
    start, cpu = time.perf_counter(), _cpu_seconds()
    images = 0
    for batch in islice(loader, max(1, setting.images // setting.batch_size)):
        images += len(batch[0].to(setting.device))
    if setting.device.type == "cuda":
        torch.cuda.synchronize(setting.device)
    del loader  # which ends the workers, whose time counts only then
    gc.collect()
    return _Pass(images, time.perf_counter() - start, _cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _ours(images: LabelledImages, augmentation: Augmentation | None, setting: LoaderSetting) -> DataLoader:
    config = InputConfig(height=setting.img_size[0], width=setting.img_size[1])
    loading: Any = {"batch_size": setting.batch_size, "workers": setting.workers, "device": setting.device}
    if augmentation is None:
        return eval_loader(images, config, **loading)
    return train_loader(images, config, augmentation, seed=0, **loading)


def _theirs(folder: str, augmentation: Augmentation | None, setting: LoaderSetting) -> Any:
    config = InputConfig()
    changes: dict[str, Any] = {"interpolation": config.interpolation}
    if augmentation is not None:
        changes = {**augmentation.timm_options(), "re_prob": augmentation.reprob, "re_mode": "pixel"}
    dataset = ImageDataset(folder)
    loader = create_loader(
        dataset,
        (config.channels, *setting.img_size),
        setting.batch_size,
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct,
        num_workers=setting.workers,
        persistent_workers=False,
        pin_memory=setting.device.type == "cuda",
        device=setting.device,
        **changes,
    )
    allow_no_bits(dataset.transform)  # else it would end at the first image that is posterized so
    return loader
