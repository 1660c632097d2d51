"""torchvision's detectors on any registered model: Faster R-CNN, Mask R-CNN and RetinaNet.

They are torchvision's own classes, so training loops, losses and results are those that its users know.
"""

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

import vssm
from vssm.dense import DenseBackbone, has_one_stride, usual_indices

Detector = TypeVar("Detector", FasterRCNN, MaskRCNN, RetinaNet)
_CHANNELS = 256  # of the feature pyramid, as in torchvision's own detectors
_ASPECT_RATIOS = (0.5, 1.0, 2.0)
_RESIZING = ("size_divisible", "fixed_size")  # which torchvision's detectors hand on to their transform


class BackboneWithFPN(nn.Module):
    """A backbone and a feature pyramid network, as torchvision's detectors want them.

    Args:
        body: Gives the levels.
        extra_blocks: Makes coarser levels of the last one.

    Attributes:
        out_channels: Channels of every map.
        strides: Pixels per map cell, from the finest map to the coarsest.
    """

    def __init__(self, body: DenseBackbone, *, extra_blocks: LastLevelMaxPool | LastLevelP6P7) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.out_channels, _CHANNELS, extra_blocks=extra_blocks)
        self.out_channels = _CHANNELS
        extra = 2 if isinstance(extra_blocks, LastLevelP6P7) else 1
        self.strides = body.out_strides + [body.out_strides[-1] * 2**i for i in range(1, extra + 1)]

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Maps images (b, 3, H, W) to maps (b, out_channels, h_i, w_i) by name, ``"0"`` for the finest."""
        return self.fpn(OrderedDict((str(i), each) for i, each in enumerate(self.body(images))))


def fasterrcnn(
    name: str,
    num_classes: int = 91,
    *,
    pretrained: bool | str | PathLike = False,
    trainable_layers: int | None = None,
    backbone_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> FasterRCNN:
    """Makes a Faster R-CNN.

    Args:
        name: Registered name of the backbone. One of a single stride gets a pyramid around it.
        num_classes: Classes, the background among them.
        pretrained: True to start from the backbone's published classification weights; or a file of such.
        trainable_layers: Train that many of the backbone's last stages, or blocks for a single stride, and freeze what
            comes before them; train everything when not given.
        backbone_kwargs: Arguments of `DenseBackbone` and of the model, such as ``drop_path_rate``.
        **kwargs: Arguments of torchvision's class, such as ``min_size``.

    Returns:
        torchvision's detector, in training mode.

    Raises:
        FileNotFoundError: If there is no file ``pretrained``.
        ValueError: If there is no such model, weights do not fit, or torchvision's class has no such argument.
    """
    body = make_body(name, pretrained=pretrained, trainable_layers=trainable_layers, **(backbone_kwargs or {}))
    backbone = BackboneWithFPN(body, extra_blocks=LastLevelMaxPool())
    return _build(FasterRCNN, backbone, num_classes, _rcnn_parts(backbone) | kwargs)


def maskrcnn(
    name: str,
    num_classes: int = 91,
    *,
    pretrained: bool | str | PathLike = False,
    trainable_layers: int | None = None,
    backbone_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> MaskRCNN:
    """Makes a Mask R-CNN; arguments, result and errors are those of `fasterrcnn`."""
    body = make_body(name, pretrained=pretrained, trainable_layers=trainable_layers, **(backbone_kwargs or {}))
    backbone = BackboneWithFPN(body, extra_blocks=LastLevelMaxPool())
    parts = {"mask_roi_pool": _roi_align(body, 14), **_rcnn_parts(backbone)}
    return _build(MaskRCNN, backbone, num_classes, parts | kwargs)


def retinanet(
    name: str,
    num_classes: int = 91,
    *,
    pretrained: bool | str | PathLike = False,
    trainable_layers: int | None = None,
    backbone_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> RetinaNet:
    """Makes a RetinaNet, which leaves the finest level out; arguments, result and errors are those of `fasterrcnn`."""
    body = make_body(name, skip=1, pretrained=pretrained, trainable_layers=trainable_layers, **(backbone_kwargs or {}))
    backbone = BackboneWithFPN(body, extra_blocks=LastLevelP6P7(_CHANNELS, _CHANNELS))
    octaves = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
    sizes = [tuple(int(4 * stride * octave) for octave in octaves) for stride in backbone.strides]
    return _build(RetinaNet, backbone, num_classes, {"anchor_generator": _anchors(sizes)} | kwargs)


def make_body(
    name: str,
    *,
    pretrained: bool | str | PathLike = False,
    trainable_layers: int | None = None,
    skip: int = 0,
    **kwargs: Any,
) -> DenseBackbone:
    """Makes the backbone of a detector, with a pyramid if it has one stride.

    Args:
        name: Registered name.
        pretrained: True for published weights, or a file.
        trainable_layers: Number of last stages or blocks to train; all and the stem when not given.
        skip: Leave out so many of the finest levels.
        **kwargs: Arguments of `DenseBackbone` and of the model.

    Raises:
        FileNotFoundError: If there is no file ``pretrained``.
        ValueError: If there is no such model, it cannot give what is asked for, or weights do not fit.
    """
    model_kwargs = {
        key: value for key, value in kwargs.items() if key not in inspect.signature(DenseBackbone).parameters
    }
    with torch.device("meta"):
        model = vssm.create_model(name, **{"global_pool": "", **model_kwargs})
    arguments = {"out_indices": usual_indices(model)[skip:], "pyramid": has_one_stride(model), **kwargs}
    if trainable_layers is not None:
        layers = arguments["out_indices"][-1] + 1
        if not 0 <= trainable_layers <= layers:
            raise ValueError(f"detection: trainable_layers of {name} must be 0 to {layers}, got {trainable_layers}")
        arguments["frozen_stages"] = layers - trainable_layers
    body = DenseBackbone(name, **arguments)
    if pretrained is not False:
        body.load_pretrained(pretrained)
    return body


def _build(
    detector: type[Detector], backbone: BackboneWithFPN, num_classes: int, arguments: dict[str, Any]
) -> Detector:
    """Makes a detector that gets images as the backbone's weights were trained with."""
    unknown = arguments.keys() - inspect.signature(detector).parameters.keys() - set(_RESIZING)
    if unknown:  # torchvision would leave them out in silence
        raise ValueError(f"detection: {detector.__name__} has no argument {min(unknown)!r}")
    cfg = backbone.body.model.pretrained_cfg
    colours = {"image_mean": list(cfg["mean"]), "image_std": list(cfg["std"])}
    everything: dict[str, Any] = {**colours, **arguments}
    return detector(backbone, num_classes, **everything)


def _rcnn_parts(backbone: BackboneWithFPN) -> dict[str, Any]:
    """What torchvision's R-CNNs have for strides 4 to 64, for those of this backbone."""
    sizes = [(8 * stride,) for stride in backbone.strides]
    return {"rpn_anchor_generator": _anchors(sizes), "box_roi_pool": _roi_align(backbone.body, 7)}


def _roi_align(body: DenseBackbone, output_size: int) -> MultiScaleRoIAlign:
    names = [str(level) for level in range(len(body.out_channels))]
    return MultiScaleRoIAlign(names, output_size, sampling_ratio=2)


def _anchors(sizes: Sequence[tuple[int, ...]]) -> AnchorGenerator:
    return AnchorGenerator(tuple(sizes), (_ASPECT_RATIOS,) * len(sizes))
