"""Classes of pixels: what a segmentor of mmsegmentation makes of images, as records and as pictures."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from vssm.engine.detect import framework, read_recipe
from vssm.engine.views import require_files, views
from vssm.files import atomic_path

_OPACITY = 0.5  # of colours over the image


@dataclass(frozen=True)
class Segmentor:
    """A segmentor.

    Attributes:
        classify: Class indices (h, w) of an RGB image.
        classes: Names of the classes.
        colours: Red, green and blue of each class, (n, 3).
    """

    classify: Callable[[Image.Image], np.ndarray]
    classes: Sequence[str]
    colours: np.ndarray


def open_mmseg(recipe: str | os.PathLike, checkpoint_path: str | os.PathLike, *, device: torch.device) -> Segmentor:
    """Opens a segmentor of mmsegmentation.

    Args:
        recipe: Its config.
        checkpoint_path: Weights of the whole segmentor; training checkpoints hold pickled objects, trust is needed.
        device: Where to compute.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If mmsegmentation is not installed, or the config does not say how images are read.
    """
    require_files(recipe, checkpoint_path)
    apis = framework("mmseg")
    model = apis.init_model(read_recipe(recipe), str(checkpoint_path), device=str(device))

    def classify(image: Image.Image) -> np.ndarray:
        found = apis.inference_model(model, np.asarray(image)[..., ::-1])  # of blue, green and red
        return found.pred_sem_seg.data[0].cpu().numpy()

    meta = model.dataset_meta
    return Segmentor(classify, tuple(meta["classes"]), np.array(meta["palette"], dtype=np.uint8))


def segment(
    segmentor: Segmentor,
    paths: Sequence[str | os.PathLike],
    *,
    pictures: str | os.PathLike | None = None,
    every: int = 1,
) -> list[dict[str, Any]]:
    """Finds the class of every pixel of images; those that cannot be read are left out, with a line in the log each.

    Args:
        segmentor: What to ask.
        paths: Image files, folders of such, and videos.
        pictures: Folder for the images in the colours of their classes, and, in ``classes/``, for the indices of the
            classes as grey pictures; none are written when not given.
        every: Take every how manyth frame of a video.

    Returns:
        Per image: ``image``, ``height``, ``width``, ``picture``, of a video ``frame`` and ``seconds``, and ``shares``,
        the part of its pixels by class, largest first.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If there are no images in a folder.
    """
    records = []
    for view in views(paths, pictures, every=every):
        indices = segmentor.classify(view.image)
        if view.picture is not None:
            colours = Image.fromarray(segmentor.colours[indices])
            with atomic_path(view.picture) as temporary:
                Image.blend(view.image, colours, _OPACITY).save(temporary)
            with atomic_path(view.picture.parent / "classes" / view.picture.name) as temporary:
                Image.fromarray(indices.astype(np.uint8)).save(temporary)
        found, counts = np.unique(indices, return_counts=True)
        largest = sorted(zip(counts.tolist(), found.tolist(), strict=True), reverse=True)
        shares = {segmentor.classes[each]: number / indices.size for number, each in largest}
        records.append({**view.record(), "shares": shares})
    return records
