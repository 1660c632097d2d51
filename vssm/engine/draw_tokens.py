"""Pictures of token reduction: which patches of an image stay after each cut."""

import os
from typing import Any

import numpy as np
import torch

from vssm.data.images import read_image
from vssm.engine.classifier import Classifier
from vssm.engine.plot import new_figure, save_figure
from vssm.engine.sight import colours_of
from vssm.models._base import TokenBackbone
from vssm.pruning import Schedule, TokenMap

_GONE, _FADED = (0.55, 0.67, 0.85), 0.85  # colour over patches that are gone, and its part of the mixture
_LINE = (0.9, 0.9, 0.9)
_SHARP = 400  # pixels, below which an image is enlarged, for lines between patches to be thin
_PANEL = 2.6  # inches


def draw_kept_tokens(
    path: str | os.PathLike, classifier: Classifier, image: str | os.PathLike, schedule: Schedule
) -> dict[str, Any]:
    """Draws what a classifier sees of an image, and once more after each cut with only the patches that stay.

    Patches that were dropped are faded to blue; those that were merged have the mean colour of all that became one.

    Args:
        path: Target, ending in .png, .svg or .pdf.
        classifier: The model, on the CPU.
        image: File of the image.
        schedule: How to reduce tokens.

    Returns:
        What was drawn: ``picture``, ``after`` and, after each cut, ``kept``, the number of patches that stay, and
        ``patches``, the number of all.

    Raises:
        FileNotFoundError: There is no such image.
        ValueError: The file is no image, or the schedule does not suit the model.
    """
    config = classifier.config
    pixels = config.transform()(read_image(image, channels=config.channels))
    with torch.inference_mode(), schedule.reducer(classifier.model.eval()) as reducer:
        classifier.model(pixels[None])
    colours = colours_of(pixels, config)
    colours = colours.repeat(scale := max(1, _SHARP // min(colours.shape[:2])), axis=0).repeat(scale, axis=1)
    holders = {cut: _holders(reducer.backbone, token_map) for cut, token_map in reducer.maps.items()}
    kept = [int((holder == np.arange(holder.size).reshape(holder.shape)).sum()) for holder in holders.values()]

    figure = new_figure(width=_PANEL * (len(holders) + 1), height=_PANEL + 0.3)
    panels = figure.subplots(1, len(holders) + 1, squeeze=False)[0]
    titles = ["what the model sees"]
    titles += [
        f"after block {cut}: {count} of {holder.size}"
        for (cut, holder), count in zip(holders.items(), kept, strict=True)
    ]
    for axes, title, picture in zip(
        panels, titles, [colours, *(_painted(colours, holder) for holder in holders.values())], strict=True
    ):
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    save_figure(figure, path)
    return {
        "picture": os.fspath(path),
        "after": list(holders),
        "kept": kept,
        "patches": [holder.size for holder in holders.values()],
    }


def _holders(backbone: Any, token_map: TokenMap) -> np.ndarray:
    """For each patch, on its grid, the number of the patch that holds it; −1 for none."""
    target = token_map.target[0]
    index = backbone.class_token_index(token_map.tokens) if isinstance(backbone, TokenBackbone) else None
    if index is not None:
        target = torch.cat([target[:index], target[index + 1 :]])
        target = target - (target > index).long()
    return target.reshape(token_map.size).numpy()


def _painted(colours: np.ndarray, holder: np.ndarray) -> np.ndarray:
    """The image (h, w, 3) with dropped patches faded, merged ones in their mean colour, and lines between patches."""
    height, width = colours.shape[:2]
    rows, columns = np.arange(height) * holder.shape[0] // height, np.arange(width) * holder.shape[1] // width
    patch = rows[:, None] * holder.shape[1] + columns  # number of the patch of each pixel
    group = holder.flatten()[patch]
    sizes = np.bincount(holder.flatten() + 1, minlength=holder.size + 1)[1:]  # patches that each patch holds
    picture = colours.copy()
    alone = (group >= 0) & (sizes[np.maximum(group, 0)] == 1)
    merged = (group >= 0) & ~alone
    pixels = np.maximum(np.bincount(group[merged], minlength=holder.size), 1)
    for channel in range(3):
        sums = np.bincount(group[merged], weights=colours[..., channel][merged], minlength=holder.size)
        picture[..., channel][merged] = (sums / pixels)[group[merged]]
    picture[group < 0] = (1 - _FADED) * picture[group < 0] + _FADED * np.array(_GONE)
    edge = (np.diff(rows, prepend=0) > 0)[:, None] | (np.diff(columns, prepend=0) > 0)
    picture[edge] = _LINE
    return picture
