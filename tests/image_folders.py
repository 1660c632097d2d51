"""Small data sets on disk, a model that learns them in a second, and a stop at will, for the tests of training."""

from pathlib import Path

import numpy as np
from PIL import Image

# A Vim of some hundred parameters.
TINY_MODEL = ["--model", "test_vim", "--model-kwargs", "embed_dim=8", "depth=1", "patch_size=8", "d_state=1"]
TINY_INPUT = ["--img-size", "16", "--in-chans", "1"]
TINY = [*TINY_MODEL, *TINY_INPUT, "--batch-size", "8", "--workers", "0", "--aa", "none", "--device", "cpu"]


def make_folder(root: Path, *, classes: tuple[str, ...] = ("dark", "light"), train: int = 12, val: int = 4) -> Path:
    """Writes images of 16x16 pixels whose brightness tells their class, ``train`` and ``val`` of each class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for index, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 60, (16, 16, 3)) + 180 * index // max(len(classes) - 1, 1)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03d}.png")
    return root


class StopAtLook:
    """A request to stop that is made at the n-th look, of which there is one after every step and evaluated batch."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left <= 0
