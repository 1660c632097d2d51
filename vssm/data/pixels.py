"""Images on their way to a model: bytes as long as they travel between processes, normalised where the model computes.

Four bytes per value instead of one would be copied from worker processes and to the GPU.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import default_collate

Place = tuple[slice, slice, slice]
Spot = tuple[int, Place]  # image of a batch, and a rectangle in it


class Pixels(NamedTuple):
    """One image.

    Args:
        values: From 0 to 255, uint8 (c, h, w).
        erased: Rectangles to be erased after normalisation, with what takes their place.
    """

    values: Tensor
    erased: list[tuple[Place, Tensor]]


class PixelTransform:
    """A transform of images that leaves normalisation and erasing to `Normalise`.

    Args:
        transform: Of timm, from an image to values from 0 to 255 (c, h, w).
        reprob: Probability of erasing a rectangle.
    """

    def __init__(self, transform: Any, *, reprob: float = 0.0) -> None:
        self.transform = transform
        self.erasing = RandomErasing(probability=reprob, mode="pixel", device="cpu") if reprob else None

    def __call__(self, image: Image.Image) -> Pixels:
        """Changes and reads an image."""
        values = torch.as_tensor(self.transform(image))
        erased = []
        if self.erasing is not None:
            recorder: Any = _Recorder(values.shape)
            erased = self.erasing(recorder).erased
        return Pixels(values, erased)


class _Recorder:
    """Stands in for an image that rectangles are erased in, and keeps these."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.erased: list[tuple[Place, Tensor]] = []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, place: Place, values: Tensor) -> None:
        self.erased.append((place, values))


class PixelBatch(NamedTuple):
    """Images of a batch.

    Args:
        values: From 0 to 255, uint8 (b, c, h, w).
        spots: Rectangles to be erased.
        noise: What takes their place, one after the other: a tensor for each would take a file to send.
    """

    values: Tensor
    spots: list[Spot]
    noise: Tensor


def collate_pixels(images: Sequence[Pixels], *, shape: tuple[int, int, int]) -> PixelBatch:
    """Puts images into one tensor, in shared memory where a worker process does it.

    Args:
        images: Any number of images.
        shape: Channels, height and width, of a batch of none.

    """
    if not images:
        return PixelBatch(torch.empty(0, *shape, dtype=torch.uint8), [], torch.empty(0))
    spots = [(index, place) for index, image in enumerate(images) for place, _ in image.erased]
    noise = [noise.flatten() for image in images for _, noise in image.erased]
    values = default_collate([image.values for image in images])
    return PixelBatch(values, spots, torch.cat(noise) if noise else torch.empty(0))


class Normalise:
    """Values from 0 to 255 to those that a model takes: (values − 255·mean) / (255·std), float32.

    The operations and their order are those of timm's loaders, so that the numbers are the same, too.

    Args:
        mean: Per channel, of values from 0 to 1.
        std: Per channel.
        device: Where to compute.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, device: torch.device) -> None:
        self.device = device
        self.mean, self.std = (
            torch.tensor([255 * value for value in each], device=device).view(-1, 1, 1) for each in (mean, std)
        )

    def __call__(self, batch: PixelBatch) -> Tensor:
        """Returns images (b, c, h, w)."""
        images = batch.values.to(self.device, non_blocking=True).to(torch.float32)
        images.sub_(self.mean).div_(self.std)
        noise, start = batch.noise.to(self.device, non_blocking=True), 0
        for index, place in batch.spots:
            spot = images[index][place]
            spot.copy_(noise[start : start + spot.numel()].view_as(spot))
            start += spot.numel()
        return images
