"""Mamba-YOLO in mmdetection: neck, head, and two steps of its training pipeline that mmdet has otherwise.

A config names this module beside the package, ``custom_imports = dict(imports=["vssm.openmmlab.yolo"])``, for it needs
mmdet. The networks, the assignment of cells and the losses are those of `vssm.yolo`; points, boxes and suppression are
mmdet's.
"""
# pyright: reportMissingImports=false

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.task_modules.coders import DistancePointBBoxCoder
from mmdet.models.task_modules.prior_generators import MlvlPointGenerator
from mmdet.structures.bbox import HorizontalBoxes, autocast_box_type, get_box_tensor
from mmengine.dist import get_world_size
from mmengine.model import BaseModule
from mmengine.registry import MODELS, TRANSFORMS
from torch import Tensor

from vssm.yolo.head import HeadMaps, YoloHead
from vssm.yolo.loss import Gains, Objects, detection_losses
from vssm.yolo.neck import MambaYoloNeck

_GREY = (114, 114, 114)


@MODELS.register_module()
class VSSMYoloNeck(MambaYoloNeck, BaseModule):
    """`MambaYoloNeck` as a neck of mmdetection, with its arguments."""


@MODELS.register_module()
class VSSMYoloHead(YoloHead, BaseDenseHead):
    """`YoloHead` as a head of mmdetection.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the maps, from the finest to the coarsest.
        strides: Pixels per cell of each level.
        bins: Distances from 0 to bins − 1 cells that a side can have.
        gains: Weights of the losses by name, as `Gains` has them; the published ones when not given.
        train_cfg: Not used; mmdetection hands it to every head.
        test_cfg: Limits of `BaseDenseHead`: ``score_thr``, ``nms_pre``, ``nms``, ``max_per_img``.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        strides: Sequence[int] = (8, 16, 32),
        bins: int = 16,
        gains: dict[str, float] | None = None,
        train_cfg: Any = None,
        test_cfg: Any = None,
    ) -> None:
        super().__init__(num_classes, in_channels, strides=strides, bins=bins)
        self.gains = Gains(**(gains or {}))
        self.train_cfg = train_cfg
        self.test_cfg = test_cfg
        # What `BaseDenseHead` asks for when it predicts.
        self.prior_generator = MlvlPointGenerator(strides, offset=0.5)
        self.bbox_coder = DistancePointBBoxCoder()
        self.cls_out_channels = num_classes
        self.use_sigmoid_cls = True
        self.loss_cls = None

    def loss_by_feat(
        self,
        classes: list[Tensor],
        sides: list[Tensor],
        batch_gt_instances: Sequence[Any],
        batch_img_metas: Sequence[dict[str, Any]],
        batch_gt_instances_ignore: Any = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch times its size on all processes, as the official training sums gradients over images."""
        objects = [Objects(get_box_tensor(each.bboxes), each.labels) for each in batch_gt_instances]
        losses = detection_losses(self.cells(HeadMaps(classes, sides)), objects, gains=self.gains)
        images = len(batch_img_metas) * get_world_size()
        return {name: images * loss for name, loss in losses.items()}

    def predict_by_feat(self, classes: list[Tensor], sides: list[Tensor], **kwargs: Any) -> Any:
        """Results of each image, by `BaseDenseHead` with boxes as distances in pixels."""
        distances = [self.expected(each) * stride for each, stride in zip(sides, self.strides, strict=True)]
        return super().predict_by_feat(classes, distances, **kwargs)


@TRANSFORMS.register_module()
class VSSMScaleShift(BaseTransform):
    """Scales an image about its centre, shifts that from the centre of the result, and cuts or fills to a size.

    A box is kept if it has more than 2 pixels a side, more than a tenth of its area and less than 100 times the longer
    side of what is left of it. mmdet's ``RandomAffine`` scales about a corner.

    Args:
        size: Width and height of the result, in pixels.
        scale: Sides are multiplied by a factor from 1 − scale to 1 + scale.
        shift: Largest shift, as a share of the size.
    """

    def __init__(self, size: Sequence[int] = (640, 640), *, scale: float = 0.5, shift: float = 0.1) -> None:
        self.size = tuple(size)
        self.scale = scale
        self.shift = shift

    @autocast_box_type()
    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Transforms the image and its boxes."""
        width, height = self.size
        matrix = self._matrix(results["img"].shape)
        results["img"] = cv2.warpAffine(results["img"], matrix[:2], dsize=(width, height), borderValue=_GREY)
        results["img_shape"] = (height, width)
        boxes = results["gt_bboxes"]
        areas = boxes.areas * matrix[0, 0] ** 2
        boxes.project_(matrix)
        boxes.clip_((height, width))
        kept = _is_left(boxes, areas).numpy()
        for name in ("gt_bboxes", "gt_bboxes_labels", "gt_ignore_flags"):
            results[name] = results[name][kept]
        return results

    def _matrix(self, shape: Sequence[int]) -> np.ndarray:
        """Matrix (3, 3) that takes points of an image of a shape (h, w, 3) to those of the result."""
        factor = np.random.uniform(1 - self.scale, 1 + self.scale)
        x, y = np.random.uniform(0.5 - self.shift, 0.5 + self.shift, 2) * self.size
        return np.array(
            [[factor, 0, x - factor * shape[1] / 2], [0, factor, y - factor * shape[0] / 2], [0, 0, 1]],
            dtype=np.float32,
        )


@TRANSFORMS.register_module()
class VSSMColourGains(BaseTransform):
    """Multiplies hue, saturation and value by random factors; mmdet's ``YOLOXHSVRandomAug`` adds random numbers.

    Args:
        hue: Its factor is from 1 − hue to 1 + hue; so are the next ones.
        saturation: That of the saturation.
        value: That of the value.
    """

    def __init__(self, hue: float = 0.015, saturation: float = 0.7, *, value: float = 0.4) -> None:
        self.gains = np.array([hue, saturation, value])

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Changes the colours of an image of blue, green and red."""
        factors = 1 + np.random.uniform(-1, 1, 3) * self.gains
        colours = cv2.cvtColor(results["img"], cv2.COLOR_BGR2HSV) * factors
        colours[..., 0] %= 180  # degrees of hue come halved
        colours[..., 1:] = colours[..., 1:].clip(0, 255)
        results["img"] = cv2.cvtColor(colours.astype(np.uint8), cv2.COLOR_HSV2BGR)
        return results


def _is_left(boxes: HorizontalBoxes, areas: Tensor) -> Tensor:
    """Which boxes (n,) are large enough after they were clipped, beside what their areas (n,) were before."""
    widths, heights = boxes.widths, boxes.heights
    is_square_enough = widths.maximum(heights) < 100 * widths.minimum(heights)
    return (widths > 2) & (heights > 2) & (boxes.areas > 0.1 * areas) & is_square_enough
