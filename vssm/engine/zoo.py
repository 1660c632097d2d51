"""Models by name for the commands: those of vssm, and timm's as peers to compare with."""

from collections.abc import Sequence
from typing import Any

import timm
from torch import nn

import vssm


def create_by_name(name: str, *, img_size: tuple[int, int] | None = None) -> nn.Module:
    """Creates a model of vssm or of timm with random weights.

    Args:
        name: Registered name, with or without the tag of its weights.
        img_size: Input height and width in pixels; the model's own when not given.

    Returns:
        The model, in training mode as timm creates it.

    Raises:
        ValueError: The name is unknown, or the model takes no other input size.
    """
    model = vssm.create_model(name)
    if img_size is None or img_size == input_size(model)[1:]:
        return model
    if hasattr(model, "set_input_size"):
        resize: Any = model.set_input_size
        resize(img_size=img_size)
    elif _configuration(model).get("fixed_input_size"):
        height, width = input_size(model)[1:]
        raise ValueError(f"{name} takes images of {height}x{width} only, got {img_size[0]}x{img_size[1]}")
    return model


def expand_names(names: Sequence[str]) -> list[str]:
    """Names with patterns such as ``vim_*`` replaced by the models of vssm and timm that match, each name once.

    Raises:
        ValueError: No model matches a pattern.
    """
    found: list[str] = []
    for name in names:
        matching = timm.list_models(name) if set(name) & set("*?[") else [name]
        if not matching:
            raise ValueError(f"no model matches {name!r}; those of vssm are {', '.join(vssm.list_models())}")
        found += matching
    return list(dict.fromkeys(found))


def package_of(name: str) -> str:
    """The package that a model belongs to: ``vssm`` or ``timm``."""
    return "vssm" if name.partition(".")[0] in vssm.list_models() else "timm"


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width that a model was configured for."""
    channels, height, width = _configuration(model)["input_size"]
    return channels, height, width


def _configuration(model: nn.Module) -> dict[str, Any]:
    """What timm keeps with a model about its weights and its input."""
    configuration: Any = model.pretrained_cfg
    return configuration


def family_of(name: str) -> str:
    """The family of a model: the name of the file that defines it."""
    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
