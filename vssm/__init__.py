"""Vision state-space backbones in timm, on one selective-scan op."""

import difflib
import os
from importlib.metadata import version
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs
from torch import nn

from vssm import checkpoint
from vssm.models import FAMILIES
from vssm.scan_order import scan_order
from vssm_kernels import directional_scan, selective_scan

__version__ = version("vssm")
__all__ = ["checkpoint", "create_model", "directional_scan", "list_models", "scan_order", "selective_scan"]


def list_models(filter: str = "", pretrained: bool = False, *, family: str | None = None) -> list[str]:
    """Names of this package's models.

    Args:
        filter: Wildcard, such as ``"vim_*"``; all models when empty.
        pretrained: Only models with published weights, with the tag of the weights after a dot.
        family: Only models of this family.

    Returns:
        Sorted names, for `create_model` and for ``timm.create_model`` alike.

    Raises:
        ValueError: If there is no such family.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"list_models: unknown family {family!r}, expected one of {', '.join(FAMILIES)}")
    return timm.list_models(filter, module=FAMILIES if family is None else family, pretrained=pretrained)


def create_model(
    name: str, pretrained: bool = False, *, checkpoint_path: str | os.PathLike | None = None, **kwargs: Any
) -> nn.Module:
    """Creates a model: ``timm.create_model`` that names the nearest models and reads the authors' checkpoints.

    Args:
        name: Name of a registered model, with the tag of its weights or without; models of timm are welcome.
        pretrained: Load the published weights.
        checkpoint_path: Load this file instead; the authors' format or ours. With ``features_only``, its classifier is
            left out.
        **kwargs: Arguments of the model, such as ``num_classes``, ``img_size`` or ``features_only``.

    Returns:
        The model, in training mode.

    Raises:
        ConnectionError: If published weights cannot be fetched.
        FileNotFoundError: If there is no file ``checkpoint_path``.
        ValueError: If there is no such model or tag, or weights do not fit.
    """
    _check_name(name)
    if checkpoint_path is None:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    if kwargs.get("features_only"):  # parts of the model are cut off after loading, which is timm's to do
        overlay = {**(kwargs.pop("pretrained_cfg_overlay", None) or {}), "file": os.fspath(checkpoint_path)}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    model = timm.create_model(name, **kwargs)
    checkpoint.load(model, checkpoint_path)
    return model


def _check_name(name: str) -> None:
    if ":" in name:  # hf-hub:... and local-dir:... are timm's to resolve
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        nearest = difflib.get_close_matches(architecture, list_models(), n=3, cutoff=0.0)
        raise ValueError(f"create_model: unknown model {architecture!r}; the nearest names are {', '.join(nearest)}")
    tagged = get_arch_pretrained_cfgs(architecture)
    if tag and name not in tagged:
        raise ValueError(f"create_model: unknown weights {name!r}, expected one of {', '.join(tagged) or architecture}")
