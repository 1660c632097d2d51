"""Batches for training and evaluation, on timm's transforms; files that cannot be read are left out and counted."""

import logging
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vssm.data.images import LabelledImages, UnreadableImage
from vssm.data.pixels import Normalise, PixelBatch, Pixels, PixelTransform, collate_pixels
from vssm.data.policies import allow_no_bits
from vssm.data.randomness import Purpose, seed_for, seeded
from vssm.data.sampling import ALONE, Draw, EvaluationBatches, Share, TrainingBatches

_logger = logging.getLogger(__name__)
_CPU = torch.device("cpu")
_TOLERATED = 0.01  # share of unreadable files that an epoch may have
_LONGEST = 1000  # times the shorter side: resized to a model's size, a longer image would take gigabytes


@dataclass(frozen=True)
class InputConfig:
    """How images become the input of a model.

    Args:
        channels: 1 for grey, 3 for colour.
        height: In pixels.
        width: In pixels.
        mean: Per channel, of values from 0 to 1; subtracted.
        std: Per channel; divided by.
        interpolation: bilinear, bicubic or nearest.
        crop_pct: Part of the resized image's side that evaluation sees.
    """

    channels: int = 3
    height: int = 224
    width: int = 224
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875

    def transform(self) -> Any:
        """The transform of evaluation: an image to a tensor (channels, height, width)."""
        return self._timm_transform()

    def pixel_transform(self) -> PixelTransform:
        """The same without the normalisation, which loaders leave to the device."""
        return PixelTransform(self._timm_transform(use_prefetcher=True))

    def _timm_transform(self, **more: Any) -> Any:
        options = asdict(self)
        size = (options.pop("channels"), options.pop("height"), options.pop("width"))
        return create_transform(size, is_training=False, **options, **more)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images, by the names of timm.

    Args:
        scale: Smallest and largest part of the image's area that a random crop takes.
        hflip: Probability of a horizontal flip.
        color_jitter: Strength of changes of brightness, contrast and saturation; unused with ``aa``.
        aa: Policy such as ``rand-m9-mstd0.5-inc1``; empty for none.
        reprob: Probability of erasing a random rectangle.
        interpolation: bilinear, bicubic or random.
        repeats: Copies of an image in an epoch, which then sees as many times fewer images.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = 0.5
    color_jitter: float = 0.4
    aa: str = ""
    reprob: float = 0.0
    interpolation: str = "random"
    repeats: int = 1

    def transform(self, config: InputConfig) -> PixelTransform:
        """The transform of training, without the normalisation, which loaders leave to the device.

        Raises:
            ValueError: timm does not know the policy.
        """
        try:
            return self._transform(config)
        except AssertionError as error:  # with which timm refuses policies
            raise ValueError(f"--aa {self.aa}: {error}; expected a policy such as rand-m9-mstd0.5-inc1") from error

    def timm_options(self) -> dict[str, Any]:
        """What timm's transform is to be made with, but for the erasing."""
        return {
            "is_training": True,
            "scale": self.scale,
            "hflip": self.hflip,
            "color_jitter": self.color_jitter,
            "auto_augment": self.aa or None,
            "interpolation": self.interpolation,
        }

    def _transform(self, config: InputConfig) -> PixelTransform:
        transform = create_transform(
            (config.channels, config.height, config.width),
            mean=config.mean,
            use_prefetcher=True,  # which is to say: without normalisation and erasing
            **self.timm_options(),
        )
        allow_no_bits(transform)
        return PixelTransform(transform, reprob=self.reprob)


_Item = tuple[Pixels, int, int] | str  # pixels, target and place of an image, or why there are none


class Batch(NamedTuple):
    """What a loader yields.

    Args:
        images: Normalised (b, c, h, w).
        targets: Class indices (b,).
        indices: Places of the images in the data set (b,).
        unreadable: Why files were left out, one message each.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    unreadable: list[str]


class _Transformed(Dataset):
    """Pixels of images, or the reason why there are none."""

    def __init__(self, images: LabelledImages, *, channels: int, transform: PixelTransform) -> None:
        self.images = images
        self.channels = channels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> _Item:
        try:
            image: Image.Image = self.images.load(index, channels=self.channels)
        except (UnreadableImage, FileNotFoundError) as error:  # files may go away after they were listed
            return str(error)
        if max(image.size) > _LONGEST * min(image.size):
            sides = f"{image.width} x {image.height} pixels"
            return f"{self.images.name(index)}: {sides}, one side more than {_LONGEST} times the other"
        return self.transform(image), self.images.targets[index], index


class _Augmented(Dataset):
    """Pixels of randomly changed images, by `Draw`, on whose epoch and place alone the changes depend."""

    def __init__(self, transformed: _Transformed, *, seed: int) -> None:
        self.transformed = transformed
        self.seed = seed

    def __len__(self) -> int:
        return len(self.transformed)

    def __getitem__(self, draw: Draw) -> _Item:
        with seeded(seed_for(Purpose.AUGMENTATION, self.seed, draw.epoch, draw.place)):
            return self.transformed[draw.image]


def train_loader(
    images: LabelledImages,
    config: InputConfig,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    share: Share = ALONE,
    workers: int = 0,
    device: torch.device = _CPU,
) -> DataLoader:
    """Batches in a random order; ``loader.batch_sampler.begin(epoch, step)`` says of which epoch, and from which on.

    What an image of a batch looks like depends on seed, epoch and its place in the epoch's order, not on ``workers``,
    nor on how many processes share a batch, nor on where an epoch begins.

    Args:
        images: Training images.
        config: Input of the model.
        augmentation: Random changes.
        batch_size: Images per batch, of all processes together; all images when there are fewer.
        seed: Of the order and of the random changes.
        share: Part of every batch that this process takes.
        workers: Processes that read images; 0 to read in this one.
        device: Where batches are normalised, and then are.

    Returns:
        A loader of `Batch`.

    Raises:
        ValueError: A process would get no image of a batch.
    """
    transformed = _Transformed(images, channels=config.channels, transform=augmentation.transform(config))
    batches = TrainingBatches(len(images), batch_size=batch_size, seed=seed, repeats=augmentation.repeats, share=share)
    if batches.batch_size < share.ranks:
        raise ValueError(
            f"train: expected at least as many images in a batch as the {share.ranks} processes, "
            f"got {batches.batch_size}"
        )
    return _Loader(
        _Augmented(transformed, seed=seed),
        config=config,
        device=device,
        batch_sampler=batches,
        num_workers=workers,
    )


def eval_loader(
    images: LabelledImages,
    config: InputConfig,
    *,
    batch_size: int,
    share: Share = ALONE,
    workers: int = 0,
    device: torch.device = _CPU,
) -> DataLoader:
    """Batches of all images in their order, without random changes.

    Processes that share the images get equally many batches, the last of which may be empty; no image comes twice.
    Arguments as in `train_loader`, but that ``batch_size`` counts the images of this process.
    """
    return _Loader(
        _Transformed(images, channels=config.channels, transform=config.pixel_transform()),
        config=config,
        device=device,
        batch_sampler=EvaluationBatches(len(images), batch_size=batch_size, share=share),
        num_workers=workers,
    )


class ReadingCheck:
    """Counts the files of one pass that cannot be read, and ends the pass when they are too many.

    Args:
        source: Where the images come from.
        total: Number of files in the pass.
    """

    def __init__(self, source: str, total: int) -> None:
        self.source = source
        self.total = total
        self.unreadable: list[str] = []

    def update(self, batch: Batch) -> None:
        """Counts what a batch left out.

        Raises:
            ValueError: More than 1 % of the files of the pass cannot be read.
        """
        self.unreadable += batch.unreadable
        if len(self.unreadable) > _TOLERATED * self.total:
            raise ValueError(
                f"{self.source}: {len(self.unreadable)} of {self.total} files cannot be read, more than 1 % of them; "
                f"the first: {self.unreadable[0]}"
            )

    def warn(self) -> None:
        """Says at the end of a pass how many files were skipped, if any."""
        if self.unreadable:
            _logger.warning(
                "%s: skipped %d of %d files; the first: %s",
                self.source,
                len(self.unreadable),
                self.total,
                self.unreadable[0],
            )


class _RawBatch(NamedTuple):
    """A batch before its normalisation."""

    pixels: PixelBatch
    targets: Tensor
    indices: Tensor
    unreadable: list[str]


class _Loader(DataLoader):
    """A loader of `Batch` that normalises where the model computes.

    Args:
        dataset: Of `_Item`.
        config: Input of the model.
        device: Where to normalise.
        options: Of `DataLoader`.

    Raises:
        ChildProcessError: A process that reads images has died.
    """

    def __init__(self, dataset: Dataset, *, config: InputConfig, device: torch.device, **options: Any) -> None:
        shape = (config.channels, config.height, config.width)
        super().__init__(
            dataset,
            collate_fn=partial(_collate, shape=shape),
            worker_init_fn=_leave_signals_to_the_run,
            pin_memory=device.type == "cuda",
            **options,
        )
        self._normalise = Normalise(config.mean, config.std, device=device)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  DataLoader names its own class
        return self._finished(super().__iter__())

    def _finished(self, batches: Iterator[_RawBatch]) -> Iterator[Batch]:
        try:
            for raw in batches:
                yield Batch(self._normalise(raw.pixels), raw.targets, raw.indices, raw.unreadable)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ChildProcessError(
                f"one of the {self.num_workers} processes that read images has died, perhaps for want of memory; try "
                f"fewer --workers ({str(error).partition('. ')[0]})"
            ) from error


def _collate(items: Sequence[_Item], *, shape: tuple[int, int, int]) -> _RawBatch:
    readable = [item for item in items if not isinstance(item, str)]
    unreadable = [item for item in items if isinstance(item, str)]
    pixels = collate_pixels([pixels for pixels, _, _ in readable], shape=shape)
    targets = torch.tensor([target for _, target, _ in readable], dtype=torch.long)
    indices = torch.tensor([index for _, _, index in readable], dtype=torch.long)
    return _RawBatch(pixels, targets, indices, unreadable)


def _leave_signals_to_the_run(worker: int) -> None:
    """Lets a worker go on at signals that reach every process, as Ctrl-C does: the run first ends its step."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
