"""Class-activation maps: which places of an image a classifier's answer comes from."""

import os
import textwrap
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vssm.engine.plot import new_figure, save_figure
from vssm.engine.sight import Sight, backdrop, last_map
from vssm.models._base import TokenBackbone

_PANEL, _DPI = 2.1, 300  # inches, dots per inch
_OPACITY = 0.65
_LABEL = 24  # characters of a class that fit above its map
_ROUNDING = 1e-3  # of the largest logit, within which logits are the same


@dataclass(frozen=True)
class ClassActivation:
    """Where the logit of a class comes from.

    Args:
        method: ``"CAM"`` or ``"Grad-CAM"``.
        values: (h, w); of CAM in logits, their mean plus the classifier's bias being the logit, of Grad-CAM from 0 on.
        index: The class.
        probability: Its probability.
        layer: Module whose map was read.
    """

    method: str
    values: Tensor
    index: int
    probability: float
    layer: str


def class_activation(model: Any, image: Tensor, index: int | None = None) -> ClassActivation:
    """The class-activation map of an image.

    Where the classifier reads the mean of the last map, it is that map times the weights of the class, Σ_c w_c·x_c
    (CAM). Elsewhere it is gradient-weighted, max(0, Σ_c a_c·x_c) with a_c the mean over places of the logit's gradient
    (Grad-CAM), on the last map of `forward_intermediates` on which the logit depends: where a class token is read, what
    the last block gives for patches plays no part, and the map is that of the block before.

    Args:
        model: Classifier of vssm or timm, in evaluation mode.
        image: Normalised as the model expects it, (c, H, W).
        index: Class; the most probable one when not given.

    Raises:
        ValueError: The model has no classifier or makes no maps, or there is no such class.

    Reference:
        Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016,
        https://arxiv.org/abs/1512.04150; Selvaraju et al., "Grad-CAM", ICCV 2017, https://arxiv.org/abs/1610.02391
    """
    classes = int(getattr(model, "num_classes", 0))
    if classes == 0:
        raise ValueError(f"class_activation: expected a model with a classifier, {type(model).__name__} has no classes")
    with torch.no_grad():
        logits = model(image[None])[0]
        if index is None:
            index = int(logits.argmax())
        if not 0 <= index < classes:
            raise ValueError(f"class_activation: expected a class from 0 to {classes - 1}, got {index}")
        plain = _plain(model, image, logits, index)
    probability = float(logits.float().softmax(0)[index])
    if plain is not None:
        return ClassActivation("CAM", plain, index, probability, model.feature_info[-1]["module"])
    weighted, layer = _weighted(model, image, index)
    return ClassActivation("Grad-CAM", weighted, index, probability, layer)


def _plain(model: Any, image: Tensor, logits: Tensor, index: int) -> Tensor | None:
    """The map times the weights of the class, (h, w); None where the classifier does not read the map's mean."""
    classifier, last = model.get_classifier(), last_map(model, image[None], norm=True)[0]
    if not isinstance(classifier, nn.Linear) or classifier.in_features != last.shape[0]:
        return None
    error = (classifier(last.mean((1, 2))) - logits).abs().max()
    if error > _ROUNDING * logits.abs().max():
        return None
    return torch.einsum("c,chw->hw", classifier.weight[index], last)


def _weighted(model: Any, image: Tensor, index: int) -> tuple[Tensor, str]:
    """Grad-CAM (h, w) on the last map on which the logit depends, and the module that makes it."""
    layers = [each["module"] for each in model.feature_info]
    outputs: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(layer).register_forward_hook(
            lambda module, inputs, output, layer=layer: outputs.update({layer: output})
        )
        for layer in layers
    ]
    try:
        logit = model(image[None].detach().clone().requires_grad_())[0, index]
    finally:
        for hook in hooks:
            hook.remove()
    gradients = torch.autograd.grad(logit, [outputs[layer] for layer in layers], materialize_grads=True)
    with torch.no_grad():
        maps = model.forward_intermediates(image[None], intermediates_only=True)
        for layer, gradient, like in zip(reversed(layers), reversed(gradients), reversed(maps), strict=True):
            weights = _as_map(model, gradient, like)
            if weights.any():
                return F.relu(torch.einsum("c,chw->hw", weights.mean((1, 2)), like[0])), layer
    raise ValueError("class_activation: the logit depends on no map of the model")


def _as_map(model: Any, gradient: Tensor, like: Tensor) -> Tensor:
    """What belongs to the output of a module, maps or tokens, laid out as the map ``like``, (c, h, w)."""
    if gradient.ndim == 4:
        return gradient[0].permute(2, 0, 1) if getattr(model, "output_fmt", "NCHW") == "NHWC" else gradient[0]
    height, width = like.shape[-2:]
    tokens = gradient[0]
    place = model.class_token_index(len(tokens)) if isinstance(model, TokenBackbone) else None
    if place is None:
        place, others = 0, len(tokens) - height * width  # timm's models have theirs in front
    else:
        others = 1
    patches = torch.cat([tokens[:place], tokens[place + others :]])
    return patches.T.unflatten(1, (height, width))


def draw_class_activation(
    path: str | os.PathLike, sight: Sight, activation: ClassActivation, *, label: str
) -> dict[str, Any]:
    """Draws an image, and over it where the logit of a class comes from.

    Args:
        path: Target, ending in .png, .svg or .pdf.
        sight: The image.
        activation: Of the image.
        label: Name of the class.

    Returns:
        What was drawn: ``picture``, ``image``, ``true``, ``method``, ``layer``, ``class`` and ``probability``.

    Raises:
        ValueError: matplotlib is missing, or the format is unknown.
    """
    height, width = sight.colours.shape[:2]
    figure = new_figure(width=2 * _PANEL * width / height + 1.0, height=_PANEL + 0.35)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.set_axis_off()
    extent = (0, width, height, 0)
    left.imshow(sight.colours, extent=extent, interpolation="nearest")
    left.set_title(sight.name if sight.true is None else f"{sight.name}, true class {sight.true}", fontsize=8)
    right.imshow(backdrop(sight.colours), cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    values = activation.values.float().numpy()
    plain = activation.method == "CAM"
    drawn = right.imshow(
        values, cmap="viridis", vmin=None if plain else 0, extent=extent, alpha=_OPACITY, interpolation="bilinear"
    )
    short = textwrap.shorten(label, _LABEL, placeholder=" …")
    right.set_title(f"{activation.method}: {short} ({activation.probability:.1%})", fontsize=8)
    bar = figure.colorbar(drawn, ax=right, shrink=0.85, pad=0.03)
    bar.set_label("part of the logit (mean: logit − bias)" if plain else "gradient-weighted activation", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    save_figure(figure, path, dpi=_DPI)
    return {
        "picture": os.fspath(path),
        "image": sight.name,
        "true": sight.true,
        "method": activation.method,
        "layer": activation.layer,
        "class": label,
        "probability": activation.probability,
    }
