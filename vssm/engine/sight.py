"""What a model sees of images, for pictures of it, and the maps that it makes of them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vssm.data import LabelledImages, open_digits
from vssm.data.images import UNKNOWN
from vssm.data.loaders import InputConfig
from vssm.engine.classifier import Classifier
from vssm.engine.predict import gather_images

_CONTRAST = 0.5  # of what lies under colours


@dataclass(frozen=True)
class Sight:
    """One image as a model sees it.

    Args:
        name: What to call it.
        pixels: The model's input (c, H, W).
        colours: The same without the normalisation, (H, W, 3), red, green and blue from 0 to 1.
        true: Its class, where that is known.
    """

    name: str
    pixels: Tensor
    colours: np.ndarray
    true: str | None


def look(classifier: Classifier, image: str | os.PathLike | None, *, first: int = 0, count: int = 1) -> list[Sight]:
    """What a model sees of an image, of those in a folder, or of the embedded digits that are held out.

    Args:
        classifier: The model with its input.
        image: File or folder; the digits when not given.
        first: Place of the first image to take.
        count: Images to take; as many as there are, if that is fewer.

    Returns:
        At least one.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: There is no image in it, none at that place, or one that cannot be read.
    """
    images = open_digits("val") if image is None else gather_images([image], classifier)
    if first >= len(images):
        raise ValueError(f"look: expected an index from 0 to {len(images) - 1} in {images.source}, got {first}")
    return [_see(classifier.config, images, index) for index in range(first, min(first + count, len(images)))]


def last_map(model: nn.Module, images: Tensor, *, norm: bool = False) -> Tensor:
    """The last map of a model's features.

    Args:
        model: Of vssm or timm.
        images: (b, c, H, W).
        norm: Whether to apply the model's last norm.

    Returns:
        (b, c, h, w).

    Raises:
        ValueError: The model makes no maps.
    """
    intermediates: Callable[..., Any] | None = getattr(model, "forward_intermediates", None)
    if intermediates is None:
        raise ValueError(
            f"last_map: expected a model with forward_intermediates, which makes maps, {type(model).__name__} has none"
        )
    return cast(Tensor, intermediates(images, indices=1, norm=norm, intermediates_only=True)[-1])


def colours_of(pixels: Tensor, config: InputConfig) -> np.ndarray:
    """A model's input (c, H, W) as colours (H, W, 3) from 0 to 1, without the normalisation."""
    seen = pixels * torch.tensor(config.std)[:, None, None] + torch.tensor(config.mean)[:, None, None]
    return seen.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()


def colours_of_image(image: Image.Image) -> np.ndarray:
    """An image as colours (H, W, 3) from 0 to 1."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def backdrop(colours: np.ndarray) -> np.ndarray:
    """Light greys (H, W) of an image (H, W, 3), over which colours keep what they mean."""
    return 1 - _CONTRAST * (1 - colours.mean(2))


def _see(config: InputConfig, images: LabelledImages, index: int) -> Sight:
    pixels = config.transform()(images.load(index, channels=config.channels))
    name = Path(images.name(index))
    target = images.targets[index]
    return Sight(
        name="/".join(name.parts[-2:]),
        pixels=pixels,
        colours=colours_of(pixels, config),
        true=None if target == UNKNOWN else images.classes[target],
    )
