"""The default data set: 1,797 real handwritten digits that ship inside scikit-learn's wheel (extra ``demo``).

They are scans of 8x8 pixels with 17 grey levels, the test part of the UCI set "Optical Recognition of Handwritten
Digits" (Alpaydin and Kaynak, 1998, https://archive.ics.uci.edu/dataset/80, CC BY 4.0). No two of them are equal.

The split is a rule, without random numbers: of each class, in the order of the data set, every fifth image is held out.
That makes 1,442 images for training and 355 held out, in equal shares of every digit. Both parts are of the same 13
writers.
"""

from typing import Literal

import numpy as np
from PIL import Image

from vssm.data.images import LabelledImages

_EVERY = 5  # one image in so many of a class is held out
_WHITE = 16  # the largest value of a pixel


class Digits(LabelledImages):
    """One part of the digits.

    Args:
        pixels: Images (count, 8, 8), of integers from 0 (background) to 16 (ink).
        targets: The digits.
        numbers: Place of each image in the whole data set.
        source: Name of the part.
    """

    def __init__(self, pixels: np.ndarray, *, targets: list[int], numbers: list[int], source: str) -> None:
        super().__init__(source=source, classes=[str(digit) for digit in range(10)], targets=targets)
        self.numbers = tuple(numbers)
        self._pixels = np.round(pixels * (255 / _WHITE)).astype(np.uint8)

    def load(self, index: int, *, channels: int) -> Image.Image:
        """An image of 8x8 pixels, grey values in 1 or 3 channels, ink white."""
        image = Image.fromarray(self._pixels[index])
        return image if channels == 1 else image.convert("RGB")

    def name(self, index: int) -> str:
        """Such as ``digits/0042``, the place in the whole data set."""
        return f"digits/{self.numbers[index]:04d}"


def open_digits(split: Literal["train", "val"]) -> Digits:
    """Opens the training part or the held-out part.

    Args:
        split: ``"train"`` or ``"val"``.

    Returns:
        1,442 or 355 images.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "the embedded digits come with scikit-learn, which is not installed: name a data folder, "
            'or pip install "vssm[demo]"'
        ) from None
    pixels, targets = load_digits(return_X_y=True)
    chosen = np.flatnonzero(_held_out(targets) == (split == "val"))
    return Digits(
        pixels[chosen].reshape(-1, 8, 8),
        targets=targets[chosen].tolist(),
        numbers=chosen.tolist(),
        source=f"the embedded digits ({split})",
    )


def _held_out(targets: np.ndarray) -> np.ndarray:
    """Whether each image is held out: the fifth, tenth, ... of its class."""
    held_out = np.zeros(len(targets), dtype=bool)
    for digit in range(10):
        held_out[np.flatnonzero(targets == digit)[_EVERY - 1 :: _EVERY]] = True
    return held_out
