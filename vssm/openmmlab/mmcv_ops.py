"""Operators that mmcv-lite lacks, made of torchvision's, which run on the CPU and on CUDA alike.

mmcv's Python part calls a compiled module, ``mmcv._ext``. Where there is none, `provide_operators` puts a module of
that name in its place. It has what Mask R-CNN, Cascade Mask R-CNN, RetinaNet, UPerNet and Semantic FPN call; every
other operator says that it needs a compiled mmcv when it is called. The functions have mmcv's own signatures.
"""
# pyright: reportMissingImports=false

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor

_NAME = "mmcv._ext"
_HARD, _LINEAR, _GAUSSIAN = 0, 1, 2  # methods of softnms
_AVERAGE = 1  # pooling mode of RoIAlign


def provide_operators() -> Literal["compiled", "torchvision"]:
    """Puts the operators in place unless mmcv has compiled ones; to be called before ``mmcv.ops`` is imported.

    Returns:
        Which operators mmcv has now.
    """
    if _NAME not in sys.modules and find_spec(_NAME) is None:
        import mmcv

        sys.modules[_NAME] = mmcv._ext = _Operators()
    return "torchvision" if isinstance(sys.modules.get(_NAME), _Operators) else "compiled"


class _Operators(ModuleType):
    def __init__(self) -> None:
        super().__init__(_NAME)
        self.__spec__ = ModuleSpec(_NAME, None, origin="torchvision")  # mmengine looks for it
        for function in (
            nms,
            softnms,
            roi_align_forward,
            roi_align_backward,
            sigmoid_focal_loss_forward,
            sigmoid_focal_loss_backward,
            get_compiler_version,
            get_compiling_cuda_version,
        ):
            setattr(self, function.__name__, function)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_args: Any, **_kwargs: Any) -> Any:
            raise NotImplementedError(f"{name} needs mmcv with its compiled operators in place of mmcv-lite")

        return missing


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes (n, 4) that non-maximum suppression keeps; ``offset`` 1 counts the last pixel in."""
    last = torch.tensor([0, 0, offset, offset], dtype=boxes.dtype, device=boxes.device)
    return torch.ops.torchvision.nms(_full(boxes + last), _full(scores), float(iou_threshold))


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Indices of boxes (n, 4) in falling order of their scores, which those of overlapping boxes lower.

    The boxes and their new scores are written to ``dets`` (n, 5).

    Reference:
        Bodla et al., "Soft-NMS", 2017, equations 1 to 3, https://arxiv.org/abs/1704.04503
    """
    boxes, scores, left = boxes.float(), scores.clone().float(), torch.arange(len(scores))
    kept: list[int] = []
    while len(left):
        best = left[scores[left].argmax()]
        dets[len(kept), :4], dets[len(kept), 4] = boxes[best], scores[best]
        kept.append(int(best))
        left = left[left != best]
        overlap = _iou(boxes[best], boxes[left], offset)
        scores[left] *= _kept_share(overlap, method, iou_threshold=iou_threshold, sigma=sigma)
        left = left[scores[left] >= min_score]
    return torch.tensor(kept, dtype=torch.long)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Averages maps (b, c, h, w) over regions (n, 5) into ``output`` (n, c, aligned_height, aligned_width)."""
    if pool_mode != _AVERAGE:
        raise NotImplementedError("RoIAlign with pool_mode='max' needs mmcv with its compiled operators")
    maps, size = _full(input), (aligned_height, aligned_width)
    pooled = torch.ops.torchvision.roi_align(
        maps, rois.to(maps.dtype), float(spatial_scale), *size, int(sampling_ratio), bool(aligned)
    )
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Writes the gradient of `roi_align_forward` by its maps to ``grad_input`` (b, c, h, w)."""
    gradient, size = _full(grad_output), (aligned_height, aligned_width)
    spread = torch.ops.torchvision._roi_align_backward(
        gradient,
        rois.to(gradient.dtype),
        float(spatial_scale),
        *size,
        *grad_input.shape,
        int(sampling_ratio),
        bool(aligned),
    )
    grad_input.copy_(spread)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Writes the focal loss of logits (n, c) to ``output`` (n, c); the target c stands for the background."""
    output.copy_(_focal_loss(_full(input), target, weight, gamma=gamma, alpha=alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Writes the gradient of `sigmoid_focal_loss_forward` by its logits to ``grad_input`` (n, c)."""
    with torch.enable_grad():
        logits = _full(input).detach().requires_grad_()
        loss = _focal_loss(logits, target, weight, gamma=gamma, alpha=alpha)
        grad_input.copy_(torch.autograd.grad(loss.sum(), logits)[0])


def get_compiler_version() -> str:
    """What mmcv prints as the compiler of its operators."""
    return "none"


def get_compiling_cuda_version() -> str:
    """What mmcv prints as the CUDA version of its operators."""
    return "none"


def _full(x: Tensor) -> Tensor:
    """Half precision as float32, for torchvision's operators do not take every kind of it."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _iou(box: Tensor, boxes: Tensor, offset: int) -> Tensor:
    """Intersection over union of a box (4,) with boxes (n, 4)."""
    sides = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2]) + offset).clamp(min=0)
    areas = [(each[..., 2:] - each[..., :2] + offset).prod(-1) for each in (box, boxes)]
    intersection = sides.prod(-1)
    return intersection / (areas[0] + areas[1] - intersection)


def _kept_share(overlap: Tensor, method: int, *, iou_threshold: float, sigma: float) -> Tensor:
    """By what the scores of boxes are multiplied that overlap a better one so much."""
    if method == _GAUSSIAN:
        return torch.exp(-overlap.square() / sigma)
    lowered = 1 - overlap if method == _LINEAR else torch.zeros_like(overlap)
    return torch.where(overlap >= iou_threshold, lowered, torch.ones_like(overlap))


def _focal_loss(logits: Tensor, target: Tensor, weight: Tensor, *, gamma: float, alpha: float) -> Tensor:
    """Focal loss (n, c) of each logit.

    Reference:
        Lin et al., "Focal Loss for Dense Object Detection", 2017, equation 5, https://arxiv.org/abs/1708.02002
    """
    classes = logits.shape[1]
    hit = F.one_hot(target, classes + 1)[:, :classes].to(logits.dtype)
    probability = logits.sigmoid()
    missed = hit * (1 - probability) + (1 - hit) * probability
    balance = hit * alpha + (1 - hit) * (1 - alpha)
    loss = balance * missed**gamma * F.binary_cross_entropy_with_logits(logits, hit, reduction="none")
    return loss * weight[target.clamp(max=len(weight) - 1)][:, None] if weight.numel() else loss
