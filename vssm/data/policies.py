"""timm's augmentation policies with the present Pillow."""

from itertools import chain
from typing import Any

from PIL import Image
from timm.data import auto_augment


def allow_no_bits(transform: Any) -> None:
    """Lets a policy posterize an image to 0 bits, which makes it black.

    The policies of published recipes do so at their largest magnitudes, and Pillow did until version 13, which refuses.

    Args:
        transform: Of timm, in which a policy may be; it is changed in place.
    """
    for part in transform.transforms:
        for operation in (*getattr(part, "ops", ()), *chain(*getattr(part, "policy", ()))):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **options)
