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
Erased = tuple[int, Place, Tensor]  # image of a batch, rectangle, and what takes its place


class Pixels(NamedTuple):
    """One image.

    Args:
        values: From 0 to 255, uint8 (h, w, c), as images lie in memory.
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
        values = torch.as_tensor(self.transform(image))  # (c, h, w)
        erased = []
        if self.erasing is not None:
            recorder: Any = _Recorder(values.shape)
            erased = self.erasing(recorder).erased
        return Pixels(values.permute(1, 2, 0), erased)


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


def collate_pixels(images: Sequence[Pixels], *, shape: tuple[int, int, int]) -> tuple[Tensor, list[Erased]]:
    """Puts images into one tensor, in shared memory where a worker process does it.

    Args:
        images: Any number of images.
        shape: Channels, height and width, of a batch of none.

    Returns:
        Values (b, h, w, c), and the rectangles of all images, each with its place in the batch.
    """
    if not images:
        channels, height, width = shape
        return torch.empty(0, height, width, channels, dtype=torch.uint8), []
    erased = [(index, place, noise) for index, image in enumerate(images) for place, noise in image.erased]
    return default_collate([image.values for image in images]), erased


class Normalise:
    """Values from 0 to 255 to those that a model takes: ((values / 255) − mean) / std, float32.

    The operations and their order are those of torchvision's transforms, so that the numbers are the same, too.

    Args:
        mean: Per channel, of values from 0 to 1.
        std: Per channel.
        device: Where to compute.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, device: torch.device) -> None:
        self.device = device
        self.mean, self.std = (
            torch.tensor(each, dtype=torch.float32, device=device).view(-1, 1, 1) for each in (mean, std)
        )

    def __call__(self, values: Tensor, erased: Sequence[Erased]) -> Tensor:
        """Takes images (b, h, w, c) and returns them as (b, c, h, w)."""
        bytes_there = values.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        images = bytes_there.to(torch.float32, memory_format=torch.contiguous_format)
        images.div_(255).sub_(self.mean).div_(self.std)
        for index, place, noise in erased:
            images[index][place] = noise.to(self.device, non_blocking=True)
        return images
