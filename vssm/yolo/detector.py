"""The whole detector in plain torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from vssm.dense import DenseBackbone
from vssm.models import _official_keys, mambayolo
from vssm.yolo.head import CellPredictions, YoloHead
from vssm.yolo.loss import Objects, detection_losses
from vssm.yolo.neck import MambaYoloNeck

# Scans in each block of the neck of the published sizes.
_NECK_MIXERS = {"mambayolo_large": 2}
_CANDIDATES = 30_000  # pairs of a box and a class, the best ones, that are compared for overlap


class MambaYoloDetector(nn.Module):
    """Mamba-YOLO: finds objects in RGB images in [0, 1], of any size.

    Its parts have the names that mmdetection gives to those of a detector, so weights of either fit the other.

    Args:
        name: Registered name of the backbone, of which the stages of strides 8, 16 and 32 are read.
        num_classes: Number of classes.
        neck_mixers: Scans in each block of the neck; the published number for the size when not given.
        **backbone_kwargs: Arguments of `DenseBackbone` and of the model.

    Raises:
        ValueError: If there is no such model, or it cannot give what is asked for.

    Reference:
        Wang et al., "Mamba YOLO", 2024, https://arxiv.org/abs/2406.05835
    """

    def __init__(
        self, name: str, num_classes: int = 80, *, neck_mixers: int | None = None, **backbone_kwargs: Any
    ) -> None:
        super().__init__()
        self.backbone = DenseBackbone(name, **{"out_indices": (1, 2, 3), **backbone_kwargs})
        mixers = _NECK_MIXERS.get(name, 1) if neck_mixers is None else neck_mixers
        self.neck = MambaYoloNeck(self.backbone.out_channels, mixers=mixers)
        self.bbox_head = YoloHead(num_classes, self.neck.out_channels, strides=self.backbone.out_strides)

    def forward(self, images: Tensor) -> CellPredictions:
        """What the detector says of each cell of images (b, 3, H, W)."""
        return self.bbox_head.cells(self.bbox_head(self.neck(self.backbone(images))))

    def losses(self, images: Tensor, objects: Sequence[Objects]) -> dict[str, Tensor]:
        """Losses of a batch, as `detection_losses`; the official training minimises their sum times the batch size."""
        return detection_losses(self(images), objects)

    @torch.no_grad()
    def detect(
        self, images: Tensor, *, threshold: float = 0.001, iou_threshold: float = 0.7, most: int = 300
    ) -> list[dict[str, Tensor]]:
        """Finds objects.

        Args:
            images: (b, 3, H, W).
            threshold: Least score.
            iou_threshold: Of boxes of one class that overlap more than that, the best one is kept.
            most: Objects that are kept of an image.

        Returns:
            For each image ``boxes`` (n, 4): x0, y0, x1, y1 in pixels, ``scores`` (n,) and ``labels`` (n,), best first.
        """
        cells, (height, width) = self(images), images.shape[2:]
        limits = torch.tensor([width, height, width, height], device=images.device)
        found = []
        for boxes, scores in zip(cells.boxes(), cells.classes.sigmoid(), strict=True):
            places, labels = (scores > threshold).nonzero(as_tuple=True)
            best = scores[places, labels].topk(min(len(places), _CANDIDATES)).indices
            places, labels = places[best], labels[best]
            chosen, scores = boxes[places].clamp(min=0).minimum(limits), scores[places, labels]
            kept = batched_nms(chosen, scores, labels, iou_threshold)[:most]
            found.append({"boxes": chosen[kept], "scores": scores[kept], "labels": labels[kept]})
        return found


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: MambaYoloDetector) -> dict[str, Tensor]:
    """Brings the state dict of an official detector to this model's keys; one that has them already keeps them.

    The fixed weights of the expectation over bins are left out.

    Raises:
        ValueError: If there is a key that the official models do not have.
    """
    if any(key.startswith("backbone.") for key in state_dict):
        return state_dict
    rest = {key: value for key, value in state_dict.items() if not _is_fixed(key)}
    of_backbone = {key: rest.pop(key) for key in list(rest) if mambayolo.BACKBONE_KEY.match(key)}
    backbone = mambayolo.checkpoint_filter_fn(of_backbone, model.backbone.model)
    renamed = _official_keys.rename(rest, _patterns(), family="mambayolo")
    return {f"backbone.model.{key}": value for key, value in backbone.items()} | mambayolo.reshape_like(model, renamed)


def _is_fixed(key: str) -> bool:
    return key == "model.21.dfl.conv.weight"


def _patterns() -> Mapping[str, str]:
    """Patterns of the official keys of neck and head, whose order is that of the official list of layers."""
    pooling = {"cv1": "reduce", "cv2": "expand"}
    convs = {rf"model\.8\.{theirs}": f"neck.pooling.{ours}" for theirs, ours in pooling.items()}
    convs |= {rf"model\.{number}": f"neck.downsample.{i}" for i, number in enumerate((15, 18))}
    patterns = {rf"{theirs}\.((?:conv|bn)\..+)": rf"{ours}.\1" for theirs, ours in convs.items()}
    blocks = {11: "top_down.1", 14: "top_down.0", 17: "bottom_up.0", 20: "bottom_up.1"}
    for number, ours in blocks.items():
        mixers = {r"ss2d\.(?P<mixer>\d+)": r"mixer.\g<mixer>"}
        patterns |= mambayolo.block_patterns(rf"model\.{number}\.", f"neck.{ours}.", mixers=mixers)
    for theirs, ours in {"cv2": "sides", "cv3": "classes"}.items():
        patterns[rf"model\.21\.{theirs}\.(\d\.\d\..+)"] = rf"bbox_head.{ours}.\1"
    return patterns
