"""Post-training quantisation: linear layers of trained models in 8-bit integers, in the spirit of Quamba.

Weights have one scale for each output, inputs one for the layer, from the ranges seen in a pass over some images. The
input of a scan, as the projections to step, B and C read it, is clipped at a percentile. What ``out_proj`` reads of a
scan is first transformed by a Hadamard matrix, whose inverse is in the layer's weights. Scans compute in float.

Reference:
    Chiang et al., "Quamba: A Post-Training Quantization Recipe for Selective State Space Models", 2024,
    https://arxiv.org/abs/2410.13229
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vssm.layers.group_linear import DirectionLinear, GroupLinear
from vssm.layers.hadamard import RotatedLinear, block_size
from vssm.layers.int8 import Int8GroupLinear, Int8Linear
from vssm.layers.ssm import SelectiveSSM

__all__ = ["Quantized", "compact", "count_int8", "fold_hadamard", "quantize", "restore"]

_LINEAR = (nn.Linear, GroupLinear)
_INNER = ".linear"  # of a RotatedLinear
_MARK = ".input_scale"  # which every quantised layer has in a state dict, and nothing else
_SCALES = (_MARK, ".weight_scale")


class Quantized(NamedTuple):
    """What was done to a model, by the names of its layers.

    Args:
        int8: Linear layers that are in integers now.
        rotated: Those of them whose inputs are transformed.
        clipped: Those of them that read the input of a scan.
        kept: Linear layers that stay in float, since the model uses their weights without calling them.
    """

    int8: tuple[str, ...]
    rotated: tuple[str, ...]
    clipped: tuple[str, ...]
    kept: tuple[str, ...]


def quantize(
    model: nn.Module, batches: Iterable[Tensor], *, images: int, percentile: float = 99.999, hadamard: bool = True
) -> Quantized:
    """Quantises the linear layers of a model, in place; it then serves inference only.

    What is left in float is rounded to half precision, as `compact` writes it.

    Args:
        model: In evaluation mode.
        batches: Normalised images (b, c, h, w), where the model is.
        images: Number of images in all batches.
        percentile: Of the values of a scan's input, the range reaches from the one below which 100 − ``percentile``
            percent of them lie to the one above which as many lie; 100 for all. Ranges of other inputs hold all values.
        hadamard: Transform what ``out_proj`` of a scan's mixer reads.

    Returns:
        Which layers are quantised, and how.

    Raises:
        ValueError: The percentile is not from 50 to 100, the model is quantised already, there is nothing to quantise,
            or values are not finite.
    """
    if not 50 <= percentile <= 100:
        raise ValueError(f"quantize: expected a percentile from 50 to 100, got {percentile:g}")
    if before := count_int8(model):
        raise ValueError(f"quantize: expected a model in float, got one with {before} layers in integers")
    rotated = fold_hadamard(model) if hadamard else ()
    scans = {f"{name}.x_proj" for name in _scans(model)}
    ranges = {
        name: _Range(tail=(100 - percentile) / 100 if name in scans else 0.0, images=images)
        for name, module in model.named_modules()
        if isinstance(module, _LINEAR)
    }
    _watch(model, batches, ranges)
    seen = [name for name, each in ranges.items() if each.count]
    if not seen:
        raise ValueError("quantize: expected images and a model with linear layers, got none of either")
    for name in seen:
        _replace(model, name, ranges[name])
    model.requires_grad_(False)
    model.load_state_dict(compact(model.state_dict()))
    return Quantized(
        int8=tuple(name.removesuffix(_INNER) if name.removesuffix(_INNER) in rotated else name for name in seen),
        rotated=rotated,
        clipped=tuple(name for name in seen if name in scans),
        kept=tuple(name for name in ranges if name not in seen),
    )


def fold_hadamard(model: nn.Module) -> tuple[str, ...]:
    """Transforms what the layers ``out_proj`` beside state-space models read, and their weights with it.

    The model computes the same function as before.

    Returns:
        Names of these layers.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _LINEAR)}
    names = dict.fromkeys(f"{name.rpartition('.')[0]}.out_proj" for name in _scans(model))  # two scans may share one
    found = tuple(name for name in names if name in layers and block_size(layers[name].weight.shape[-1]) > 1)
    for name in found:
        model.set_submodule(name, RotatedLinear.fold(layers[name]))
    return found


def count_int8(model: nn.Module) -> int:
    """Number of the layers of a model that are in integers; it is 0 for one in float."""
    return sum(isinstance(module, Int8Linear) for module in model.modules())


def compact(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A quantised model's weights for a file: what is left in float goes to half precision, but for scales.

    A tensor with values beyond half precision stays as it is.
    """
    scales = {key.removesuffix(_MARK) + kind for key in state_dict if key.endswith(_MARK) for kind in _SCALES}
    return {key: value if key in scales else _halved(value) for key, value in state_dict.items()}


def restore(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Makes those layers of a model integer ones that are so in a state dict, which can be loaded then.

    Args:
        model: As it was before it was quantised; left as it is if the state dict is in float.
        state_dict: Weights, such as `compact` returns them.

    Raises:
        ValueError: A layer that is quantised there is no linear layer of the model.
    """
    layers = {name for name, module in model.named_modules() if isinstance(module, _LINEAR)}
    names = [key.removesuffix(_MARK) for key in state_dict if key.endswith(_MARK)]
    for name in names:
        outer = name.removesuffix(_INNER)
        if not {name, outer} & layers or f"{name}.weight" not in state_dict:
            raise ValueError(f"quantize: {name} is quantised in the checkpoint, but no linear layer of the model")
        shape = state_dict[f"{name}.weight"].shape
        integer = _integer_layer(shape, bias=f"{name}.bias" in state_dict)
        rotated = name not in layers
        model.set_submodule(outer if rotated else name, RotatedLinear(integer, shape[-1]) if rotated else integer)
    if names:
        model.requires_grad_(False)


class _Range:
    """Collects the extremes of the values that a layer reads.

    Args:
        tail: Share of the values that lie beyond each end of the range.
        images: Number of images that there will be.
    """

    def __init__(self, *, tail: float, images: int) -> None:
        self.tail = tail
        self.images = images
        self.count = 0
        self._found: dict[bool, Tensor] = {}  # the smallest values, and under True the largest, from the ends

    def update(self, values: Tensor) -> None:
        """Takes in the values (b, ...) of some images."""
        flat = values.detach().float().flatten()
        self.count += len(flat)
        number = math.ceil(self.tail * len(flat) / len(values) * self.images) + 1
        for largest in (False, True):
            before = [self._found[largest]] if largest in self._found else []
            new = _extremes(flat, number, largest=largest)
            self._found[largest] = _extremes(torch.cat([*before, new]), number, largest=largest)

    def ends(self) -> tuple[float, float]:
        """The lower and the upper end of the range."""
        beyond = int(self.tail * self.count)
        low, high = (self._found[each][min(beyond, len(self._found[each]) - 1)].item() for each in (False, True))
        return low, high


def _extremes(values: Tensor, number: int, *, largest: bool) -> Tensor:
    """The so many largest values, or smallest ones, from the end."""
    if number == 1:
        return (values.amax() if largest else values.amin())[None]  # in much less time than by topk
    return values.topk(min(number, len(values)), largest=largest).values


def _scans(model: nn.Module) -> list[str]:
    """Names of the state-space models in a model."""
    return [name for name, module in model.named_modules() if isinstance(module, SelectiveSSM)]


def _watch(model: nn.Module, batches: Iterable[Tensor], ranges: Mapping[str, _Range]) -> None:
    """Runs a model on images, while ranges take in what the layers of their names read."""

    def watch(name: str) -> Any:
        return lambda module, arguments: ranges[name].update(arguments[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in ranges]
    try:
        with torch.no_grad():
            for images in batches:
                model(images)
    finally:
        for handle in handles:
            handle.remove()


def _replace(model: nn.Module, name: str, values: _Range) -> None:
    """Puts an integer layer into the place of one in float."""
    low, high = values.ends()
    if not math.isfinite(high - low):
        raise ValueError(f"quantize: {name} reads values that are not finite; the model cannot be quantised")
    layer = model.get_submodule(name)
    weight = layer.grouped_weight if isinstance(layer, DirectionLinear) else layer.get_parameter("weight")
    bias = getattr(layer, "bias", None)
    integer = _integer_layer(weight.shape, bias=bias is not None).to(weight.device)
    integer.quantize(weight, bias, low=low, high=high)
    model.set_submodule(name, integer)


def _integer_layer(weight_shape: torch.Size, *, bias: bool) -> Int8Linear:
    return (Int8Linear if len(weight_shape) == 2 else Int8GroupLinear)(weight_shape, bias=bias)


def _halved(value: Tensor) -> Tensor:
    """A tensor in half precision, if it is one in float that half precision can hold."""
    if not value.is_floating_point():
        return value
    half = value.half()
    return half if half.isfinite().all() else value
