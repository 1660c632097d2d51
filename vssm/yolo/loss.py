"""What the head is trained towards: which cells answer for which object, and how wrong they are."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import complete_box_iou, complete_box_iou_loss

from vssm.yolo.head import CellPredictions

_CANDIDATES = 10  # cells that an object picks
_SCORE_POWER, _OVERLAP_POWER = 0.5, 6.0
_TINY = 1e-9


class Objects(NamedTuple):
    """The n objects of an image.

    Attributes:
        boxes: (n, 4): x0, y0, x1, y1 in pixels.
        labels: Classes (n,), from 0.
    """

    boxes: Tensor
    labels: Tensor


class Targets(NamedTuple):
    """What the cells of an image are to say.

    Attributes:
        boxes: (a, 4) in pixels; of no meaning where there is no score.
        scores: (a, num_classes), from 0 to 1.
    """

    boxes: Tensor
    scores: Tensor


class Gains(NamedTuple):
    """Weights of the losses."""

    box: float = 7.5
    classes: float = 0.5
    sides: float = 1.5


PUBLISHED_GAINS = Gains()


@torch.no_grad()
def assign(objects: Objects, boxes: Tensor, scores: Tensor, centres: Tensor) -> Targets:
    """Assigns cells to the objects for which class and box agree best, the task-aligned way.

    An object picks ten of the cells whose centres it contains, by score^0.5·CIoU^6. A cell that is picked by several
    belongs to that with the highest CIoU among all that contain it. Its target score is its metric, scaled so that the
    best cell of an object has the highest CIoU of its cells. mmdetection's assigner does the same with plain IoU, and
    gives shared cells to one of those that picked them.

    Args:
        objects: The objects of an image.
        boxes: Predicted boxes (a, 4) in pixels.
        scores: Predicted probabilities (a, num_classes).
        centres: Centres (a, 2) of the cells in pixels.

    Reference:
        Feng et al., "TOOD: Task-aligned One-stage Object Detection", 2021, section 3.2, https://arxiv.org/abs/2108.07755
    """
    if len(objects.boxes) == 0:
        return Targets(torch.zeros_like(boxes), torch.zeros_like(scores))
    inside = _distances(objects.boxes[:, None], centres).amin(-1) > _TINY  # (n, a)
    overlaps = complete_box_iou(objects.boxes, boxes).nan_to_num(0.0).clamp(min=0) * inside  # NaN of empty boxes
    metric = scores[:, objects.labels].T.pow(_SCORE_POWER) * overlaps.pow(_OVERLAP_POWER)

    best = metric.topk(min(_CANDIDATES, metric.shape[1])).indices
    picked = torch.zeros_like(inside).scatter_(1, best, True) & inside
    highest = torch.zeros_like(inside).scatter_(0, overlaps.argmax(0, keepdim=True), True)
    picked = torch.where(picked.sum(0) > 1, highest, picked)

    metric, overlaps = metric * picked, overlaps * picked
    scaled = metric * overlaps.amax(1, keepdim=True) / (metric.amax(1, keepdim=True) + _TINY)
    owner = picked.int().argmax(0)  # (a,)
    target_scores = torch.zeros_like(scores)
    target_scores.scatter_(1, objects.labels[owner, None], scaled.amax(0)[:, None])
    return Targets(objects.boxes[owner], target_scores)


def detection_losses(
    cells: CellPredictions, objects: Sequence[Objects], *, gains: Gains = PUBLISHED_GAINS
) -> dict[str, Tensor]:
    """Losses of a batch, each over the sum of all target scores and times its gain.

    Args:
        cells: What the head says.
        objects: Those of each image.
        gains: Weights of the losses.

    Returns:
        ``loss_box``, 1 − CIoU; ``loss_cls``, binary cross-entropy of all classes and cells; ``loss_dfl``, cross-entropy
        of the two bins around each side. The first and the last are weighted by the target scores.
    """
    boxes, scores = cells.boxes(), cells.classes.detach().sigmoid()
    per_image = [assign(*each, cells.centres) for each in zip(objects, boxes.detach(), scores, strict=True)]
    targets = Targets(*(torch.stack(parts) for parts in zip(*per_image, strict=True)))
    total = targets.scores.sum().clamp(min=1)
    classes = F.binary_cross_entropy_with_logits(cells.classes, targets.scores, reduction="sum")

    weights = targets.scores.sum(-1)  # (b, a)
    chosen = weights > 0
    weights, wanted = weights[chosen], targets.boxes[chosen]
    overlap = (complete_box_iou_loss(boxes[chosen], wanted) * weights).sum()
    places = chosen.nonzero()[:, 1]
    distances = _distances(wanted, cells.centres[places]) / cells.strides[places]
    sides = (distribution_loss(cells.sides[chosen], distances) * weights).sum()
    return {
        "loss_box": gains.box * overlap / total,
        "loss_cls": gains.classes * classes / total,
        "loss_dfl": gains.sides * sides / total,
    }


def distribution_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Cross-entropies with the bins below and above a distance, weighted by nearness; mean over the sides.

    Args:
        logits: (m, 4, bins).
        distances: (m, 4) in cells; beyond the last bin they count as almost there.

    Returns:
        (m,).

    Reference:
        Li et al., "Generalized Focal Loss", 2020, equation 6, https://arxiv.org/abs/2006.04388
    """
    bins = logits.shape[-1]
    distances = distances.clamp(0, bins - 1 - 0.01)
    below = distances.long()
    share = distances - below  # of the bin above
    log_probabilities = logits.log_softmax(-1)
    lower, upper = (-log_probabilities.gather(-1, bin_[..., None]).squeeze(-1) for bin_ in (below, below + 1))
    return (lower * (1 - share) + upper * share).mean(-1)


def _distances(boxes: Tensor, centres: Tensor) -> Tensor:
    """Distances (..., 4) from points (..., 2) to the left, top, right and bottom sides of boxes (..., 4)."""
    return torch.cat([centres - boxes[..., :2], boxes[..., 2:] - centres], dim=-1)
