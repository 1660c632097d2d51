"""A model with what is needed to use it: how images become its input, and what its outputs are called."""

import difflib
import inspect
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from timm.data import ImageNetInfo, resolve_model_data_config
from torch import Tensor, nn

import vssm
from vssm import checkpoint
from vssm.data.labels import imagenet_synsets
from vssm.data.loaders import InputConfig
from vssm.quantization import restore

_IMAGENET_CLASSES = 1000
_Spec = TypeVar("_Spec", bound="ModelSpec")


@dataclass(frozen=True)
class ModelSpec:
    """Which model to build, by the names of the options that say so; None stands for what the model itself says.

    Args:
        model: Registered name.
        model_kwargs: Further arguments of the model, such as ``{"depth": 4}``.
        pretrained: Load the model's published weights.
        num_classes: Classes of the classifier.
        in_chans: 1 for grey images, 3 for colour.
        img_size: Height and width in pixels.
        mean: Per channel, of values from 0 to 1.
        std: Per channel.
        interpolation: Of images in evaluation: bilinear, bicubic or nearest.
        crop_pct: Part of the resized image's side that evaluation sees.
        drop_path: Stochastic depth of the last block.
    """

    model: str = "vim_tiny_patch16_224"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    num_classes: int | None = None
    in_chans: int | None = None
    img_size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    drop_path: float | None = None

    def with_options(self: _Spec, options: dict[str, Any]) -> _Spec:
        """The same with other values for the options given; None, and what is no setting of it, is ignored."""
        names = {each.name for each in fields(self)}
        return replace(self, **{name: value for name, value in options.items() if value is not None and name in names})

    def as_dict(self) -> dict[str, Any]:
        """The settings as values that JSON has; `from_dict` reads them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls: type[_Spec], values: dict[str, Any]) -> _Spec:
        """The settings that `as_dict` has written, without those that this class does not have."""
        names = {each.name for each in fields(cls)}
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in names
        }
        return cls(**known)


@dataclass
class Classifier:
    """A model, its input and its classes.

    Args:
        model: Maps images (b, c, h, w) to logits (b, num_classes).
        spec: How it was built, with nothing left open.
        config: Its input.
        data_classes: Names of the classes of the data it is trained on, in the order of its logits, where known.
    """

    model: nn.Module
    spec: ModelSpec
    config: InputConfig
    data_classes: tuple[str, ...] | None

    @property
    def classes(self) -> tuple[str, ...]:
        """What to call the classes: as the data does, by ImageNet's descriptions, or else by their indices."""
        count = self.spec.num_classes or 0
        if self.data_classes is not None:
            return (*self.data_classes, *map(str, range(len(self.data_classes), count)))
        if count == _IMAGENET_CLASSES:
            return tuple(map(ImageNetInfo().index_to_description, range(count)))
        return tuple(map(str, range(count)))

    @property
    def usual_names(self) -> tuple[str, ...]:
        """What data may call the classes of a classifier without names from data: ImageNet's synsets, or indices."""
        count = self.spec.num_classes or 0
        return tuple(imagenet_synsets() if count == _IMAGENET_CLASSES else map(str, range(count)))


def build(spec: ModelSpec, *, classes: Sequence[str] | None = None) -> Classifier:
    """Builds a model of vssm or of timm.

    Args:
        spec: What to build.
        classes: Names of the classes of the data, which number the model's unless ``spec`` gives a number.

    Returns:
        The model in training mode, with what it needs to be used.

    Raises:
        ValueError: There is no such model, it does not take these arguments, or it has too few classes.
    """
    if classes is not None and spec.num_classes is None:
        spec = replace(spec, num_classes=len(classes))
    model = _create(spec)
    config = _input_config(model, spec)
    count = int(getattr(model, "num_classes", 0))
    if classes is not None and len(classes) > count:
        raise ValueError(f"{spec.model}: built with {count} classes, the data has {len(classes)}")
    resolved = replace(
        spec,
        num_classes=count,
        in_chans=config.channels,
        img_size=(config.height, config.width),
        mean=config.mean,
        std=config.std,
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
    )
    return Classifier(model, resolved, config, None if classes is None else tuple(classes))


def load(path: str | os.PathLike, *, model: str | None = None, options: dict[str, Any] | None = None) -> Classifier:
    """Loads a checkpoint into the model it was made with.

    Args:
        path: Weights; when ``vssm train`` or ``vssm quantize`` wrote them, the file of the same name ending in .json
            describes the model.
        model: Name of the model, for weights without such a file.
        options: Settings of `ModelSpec` that differ from the description's or the model's own.

    Returns:
        The model with these weights, in evaluation mode.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The weights are those of another model or of another number of classes, or cannot be read.
    """
    weights = checkpoint.read(path)
    described = read_description(path)
    if model is None and described is None:
        raise ValueError(
            f"{path}: {Path(path).with_suffix('.json').name}, which would describe its model, is not beside it; "
            "name the model with --model"
        )
    known = described if described is not None and model in (None, described["spec"]["model"]) else {}
    base = ModelSpec.from_dict(known.get("spec", {"model": model}))
    spec = replace(base.with_options(options or {}), pretrained=False)
    names = known.get("classes")
    classifier = build(spec, classes=names if names and spec.num_classes in (None, base.num_classes) else None)
    restore(classifier.model, weights)
    checkpoint.load(classifier.model, weights)
    classifier.model.eval()
    return classifier


def load_initial(classifier: Classifier, path: str | os.PathLike, *, new_head: bool) -> None:
    """Loads weights to start training from.

    Args:
        classifier: Receives them.
        path: Checkpoint of the same model.
        new_head: Leave the classifier's layer as it is where the checkpoint's has another number of classes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The weights do not fit, or cannot be read.
    """
    model: Any = classifier.model
    weights, own = checkpoint.to_model_keys(checkpoint.read(path), model), model.state_dict()
    layers = model.pretrained_cfg["classifier"]
    names = (layers,) if isinstance(layers, str) else layers  # distilled models have two
    for key in (f"{name}.{kind}" for name in names for kind in ("weight", "bias")):
        if new_head and key in weights and weights[key].shape != own[key].shape:
            weights[key] = own[key]
    checkpoint.check(model, weights)
    model.load_state_dict(weights)


def save(path: str | os.PathLike, classifier: Classifier, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Writes weights and, beside them, the description that `load` reads.

    Args:
        path: Target, ending in .safetensors.
        classifier: What the weights belong to.
        weights: State dict of its model.
        facts: What else to say of them, such as their accuracy.
    """
    record = {"spec": classifier.spec.as_dict(), "classes": classifier.data_classes, **facts}
    checkpoint.write(path, weights, record)


def read_description(path: str | os.PathLike) -> dict[str, Any] | None:
    """The description beside a checkpoint; None where there is none, or where something else has that name."""
    file = Path(path).with_suffix(".json")
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not a description of a checkpoint ({error})") from error
    return content if isinstance(content, dict) and "spec" in content else None


def _create(spec: ModelSpec) -> nn.Module:
    arguments = {
        "num_classes": spec.num_classes,
        "in_chans": spec.in_chans,
        "drop_path_rate": spec.drop_path,
        **({"img_size": spec.img_size} if _has_fixed_size(spec.model) else {}),
        **spec.model_kwargs,
    }
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        return vssm.create_model(spec.model, pretrained=spec.pretrained, **given)
    except ConnectionError as error:
        raise ConnectionError(
            f"{error}; commands take it with --checkpoint, train with --initial-checkpoint"
        ) from error
    except (TypeError, RuntimeError, AssertionError, ArithmeticError) as error:  # arguments that the model cannot take
        values = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(
            f"{spec.model}: cannot be built with {values}: {error}{_suggestion(spec.model, str(error))}"
        ) from error


def _suggestion(name: str, message: str) -> str:
    """What an argument that a model does not have may have been meant to be; nothing for other failures."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", message)
    if unknown is None:
        return ""
    with torch.device("meta"):
        known = inspect.signature(type(vssm.create_model(name))).parameters
    close = difflib.get_close_matches(unknown[1], known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def _has_fixed_size(name: str) -> bool:
    """Whether a model is built for one size of images, and so has an argument for it."""
    architecture = name.partition(".")[0]
    configuration = timm.get_pretrained_cfg(architecture) if timm.is_model(architecture) else None
    return configuration is not None and configuration.fixed_input_size


def _input_config(model: nn.Module, spec: ModelSpec) -> InputConfig:
    own = resolve_model_data_config(model)
    channels = spec.in_chans or own["input_size"][0]
    height, width = spec.img_size or own["input_size"][1:]
    return InputConfig(
        channels=channels,
        height=height,
        width=width,
        mean=_per_channel("mean", spec.mean or own["mean"], channels),
        std=_per_channel("std", spec.std or own["std"], channels),
        interpolation=spec.interpolation or own["interpolation"],
        crop_pct=spec.crop_pct or own["crop_pct"],
    )


def _per_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """As many values as channels; one for all is repeated, and those of colours are averaged for grey."""
    if len(values) == channels:
        return tuple(values)
    if len(values) == 1:
        return tuple(values) * channels
    if channels == 1:
        return (sum(values) / len(values),)
    raise ValueError(f"--{name}: expected 1 or {channels} values for {channels} channels, got {len(values)}")
