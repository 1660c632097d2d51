"""Objects in images: boxes, classes and masks of a detector, as records and as pictures."""

import copy
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks

from vssm import checkpoint, detection
from vssm.data.scenes import run_lengths
from vssm.engine.views import require_files, views
from vssm.files import atomic_path
from vssm.yolo import MambaYoloDetector

DETECTORS = {"fasterrcnn": detection.fasterrcnn, "maskrcnn": detection.maskrcnn, "retinanet": detection.retinanet}
_COLOURS = (
    "#E6194B",
    "#3CB44B",
    "#4363D8",
    "#F58231",
    "#911EB4",
    "#42D4F4",
    "#F032E6",
    "#9A6324",
    "#808000",
    "#469990",
)
_LEGIBLE = 640  # pixels; smaller images are drawn several times as large
_FONT = 14  # pixels
_MULTIPLE, _GREY = 32, 114 / 255  # to which sides are padded for Mamba-YOLO, and with what
_INK = 0.5  # probability from which a pixel belongs to a mask of torchvision's Mask R-CNN


@dataclass(frozen=True)
class Found:
    """What a detector found in an image, best first.

    Attributes:
        boxes: (n, 4): x0, y0, x1, y1 in pixels.
        scores: (n,), from 0 to 1.
        labels: Class indices (n,).
        masks: (n, h, w), bool; None if the detector makes none.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def above(self, threshold: float) -> "Found":
        """The objects whose score is at least a threshold."""
        kept = self.scores >= threshold
        masks = None if self.masks is None else self.masks[kept]
        return Found(self.boxes[kept], self.scores[kept], self.labels[kept], masks)


@dataclass(frozen=True)
class Detector:
    """A detector of either kind.

    Attributes:
        find: Finds objects in an RGB image.
        classes: Names of the classes, without the background.
    """

    find: Callable[[Image.Image], Found]
    classes: Sequence[str]


def open_torchvision(
    kind: str,
    model_name: str,
    checkpoint_path: str | os.PathLike,
    *,
    classes: Sequence[str],
    device: torch.device,
    **kwargs: Any,
) -> Detector:
    """Opens a detector of `vssm.detection` with the weights of a whole detector.

    Args:
        kind: ``"fasterrcnn"``, ``"maskrcnn"`` or ``"retinanet"``.
        model_name: Registered name of its backbone.
        checkpoint_path: State dict of the detector.
        classes: Names of its classes without the background, which has the index 0.
        device: Where to compute.
        **kwargs: Arguments of torchvision's class, such as ``min_size``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such model, or weights do not fit.
    """
    model = DETECTORS[kind](model_name, len(classes) + 1, **kwargs)
    weights = checkpoint.read_whole(checkpoint_path)
    checkpoint.check(model, weights)
    model.load_state_dict(weights)
    model.to(device).eval()

    @torch.inference_mode()
    def find(image: Image.Image) -> Found:
        (found,) = model([pil_to_tensor(image).to(device) / 255])
        masks = found["masks"].squeeze(1) >= _INK if "masks" in found else None
        return Found(found["boxes"], found["scores"], found["labels"] - 1, masks)

    return Detector(find, tuple(classes))


def open_mambayolo(
    model_name: str,
    checkpoint_path: str | os.PathLike,
    *,
    classes: Sequence[str],
    device: torch.device,
    img_size: int = 640,
) -> Detector:
    """Opens a `MambaYoloDetector` with the weights of a whole detector.

    Args:
        model_name: Registered name of its backbone.
        checkpoint_path: State dict of the detector, with its authors' keys or ours.
        classes: Names of its classes.
        device: Where to compute.
        img_size: Longer side that images are resized to, in pixels.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such model, or weights do not fit.
    """
    model = MambaYoloDetector(model_name, len(classes))
    checkpoint.load(model, checkpoint.read_whole(checkpoint_path))
    model.to(device).eval()

    @torch.inference_mode()
    def find(image: Image.Image) -> Found:
        scale = img_size / max(image.size)
        width, height = (max(round(side * scale), 1) for side in image.size)
        resized = pil_to_tensor(image.resize((width, height), Image.Resampling.BILINEAR)).to(device) / 255
        padded = F.pad(resized, (0, -width % _MULTIPLE, 0, -height % _MULTIPLE), value=_GREY)
        (found,) = model.detect(padded[None])
        limits = torch.tensor(image.size * 2, device=device)
        return Found((found["boxes"] / scale).minimum(limits), found["scores"], found["labels"])

    return Detector(find, tuple(classes))


def open_mmdet(recipe: str | os.PathLike, checkpoint_path: str | os.PathLike, *, device: torch.device) -> Detector:
    """Opens a detector of mmdetection.

    Args:
        recipe: Its config.
        checkpoint_path: Weights of the whole detector; training checkpoints hold pickled objects, trust is needed.
        device: Where to compute.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If mmdetection is not installed, or the config does not say how images are read.
    """
    require_files(recipe, checkpoint_path)
    apis = framework("mmdet")
    # Any palette, since with none the data set to test on is built to ask for its own.
    model = apis.init_detector(read_recipe(recipe), str(checkpoint_path), palette="random", device=str(device))

    def find(image: Image.Image) -> Found:
        found = apis.inference_detector(model, np.asarray(image)[..., ::-1]).pred_instances  # of blue, green and red
        masks = torch.as_tensor(found.masks).bool() if "masks" in found else None
        return Found(found.bboxes, found.scores, found.labels, masks)

    return Detector(find, tuple(model.dataset_meta["classes"]))


def detect(
    detector: Detector,
    paths: Sequence[str | os.PathLike],
    *,
    threshold: float = 0.5,
    pictures: str | os.PathLike | None = None,
    every: int = 1,
) -> list[dict[str, Any]]:
    """Finds objects in images; those that cannot be read are left out, with a line in the log for each.

    Args:
        detector: What to ask.
        paths: Image files, folders of such, and videos.
        threshold: Least score of an object.
        pictures: Folder for the images with boxes and masks drawn in; none are drawn when not given.
        every: Take every how manyth frame of a video.

    Returns:
        Per image: ``image``, ``height``, ``width``, ``picture``, of a video ``frame`` and ``seconds``, and ``objects``:
        their ``class``, ``score``, ``box`` (x0, y0, x1, y1) and ``mask`` (run lengths down the columns, as COCO has
        them), best first.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If there are no images in a folder.
    """
    records = []
    for view in views(paths, pictures, every=every):
        found = detector.find(view.image).above(threshold)
        if view.picture is not None:
            _draw(view.picture, view.image, found, detector.classes)
        records.append({**view.record(), "objects": _objects(found, detector.classes)})
    return records


def framework(name: str) -> Any:
    """The module ``apis`` of mmdet or mmseg, with our backbones and operators in place.

    Raises:
        ValueError: If it cannot be imported.
    """
    try:
        importlib.import_module("vssm.openmmlab")  # before the framework, which needs its operators
        return importlib.import_module(f"{name}.apis")
    except ImportError as error:
        raise ValueError(f'{name} cannot be used ({error}): pip install "vssm[mm]"') from error


def read_recipe(recipe: str | os.PathLike) -> Any:
    """A config of mmdet or mmseg, which says how images are read both where the one and where the other looks for it.

    mmseg wants the steps as ``test_pipeline``, mmdet with the data to test on, ``test_dataloader.dataset.pipeline`` or
    that of a data set inside of it. What is missing is taken from the other place.

    Raises:
        ValueError: If they are in neither place.
    """
    config = importlib.import_module("mmengine.config").Config.fromfile(str(recipe))
    own = config.get("test_pipeline")
    tested = _pipeline((config.get("test_dataloader") or {}).get("dataset") or {})
    if not (own or tested):
        raise ValueError(
            f"{os.fspath(recipe)}: expected test_pipeline or test_dataloader.dataset.pipeline, the steps from a file "
            "to the model's input, got neither; add to the config those of training without what is random"
        )
    config.test_pipeline = copy.deepcopy(own or tested)  # mmseg changes it
    if not tested:
        config.test_dataloader = {"dataset": {"pipeline": own}}
    return config


def _pipeline(dataset: Mapping[str, Any]) -> Sequence[dict] | None:
    """The steps of a data set, or of the first one inside of it."""
    inner = dataset.get("dataset") or next(iter(dataset.get("datasets") or ()), None)
    return dataset.get("pipeline") or (None if inner is None else _pipeline(inner))


def _objects(found: Found, classes: Sequence[str]) -> list[dict[str, Any]]:
    masks = [None] * len(found.labels) if found.masks is None else found.masks.cpu().numpy()
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), masks, strict=True)
    return [
        {"class": classes[label], "score": score, "box": box}
        | ({} if mask is None else {"mask": {"size": list(mask.shape), "counts": run_lengths(mask)}})
        for label, score, box, mask in rows
    ]


def _draw(path: Path, image: Image.Image, found: Found, classes: Sequence[str]) -> None:
    enlarged = max(1, round(_LEGIBLE / max(image.size)))
    picture = image.resize((image.width * enlarged, image.height * enlarged), Image.Resampling.NEAREST)
    colours = [_COLOURS[label % len(_COLOURS)] for label in found.labels.tolist()]
    if found.masks is not None and colours:
        masks = found.masks.cpu().repeat_interleave(enlarged, 1).repeat_interleave(enlarged, 2)
        picture = to_pil_image(draw_segmentation_masks(pil_to_tensor(picture), masks, alpha=0.5, colors=list(colours)))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT)
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), colours, strict=True)
    for label, score, (x0, y0, x1, y1), colour in rows:
        corner = (x0 * enlarged, y0 * enlarged)
        pen.rectangle((*corner, max(x1 * enlarged - 1, corner[0]), max(y1 * enlarged - 1, corner[1])), outline=colour)
        text, place = f"{classes[label]} {score:.2f}", (corner[0] + 2, max(corner[1] - _FONT - 3, 0))
        pen.rectangle(pen.textbbox(place, text, font=font), fill=colour, outline=colour)
        pen.text(place, text, fill="white", font=font)
    with atomic_path(path) as temporary:
        picture.save(temporary)
