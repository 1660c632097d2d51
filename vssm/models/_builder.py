"""Builds a registered model: timm's builder with our reader of checkpoints."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import Tensor, nn

from vssm import checkpoint

_logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
FilterFn = Callable[[dict[str, Tensor], Any], dict[str, Tensor]]
_ADAPTABLE_CHANNELS = 3  # of the images of a checkpoint, for timm to make another number of them


def build_backbone(
    model_cls: type[Model],
    variant: str,
    pretrained: bool,
    *,
    checkpoint_filter_fn: FilterFn,
    levels: Sequence[int],
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> Model:
    """Builds a model of the zoo, with pretrained weights or without, whole or as a feature extractor.

    Official training files hold more than tensors, which timm's loader refuses for a URL. So the file is downloaded,
    checked and read here, and timm gets the weights. They must fit the model but for a classifier of another size and
    an input layer of other channels.

    Args:
        model_cls: Class of the model; it takes ``kwargs``.
        variant: Registered name.
        pretrained: Whether to load weights.
        checkpoint_filter_fn: Brings an official state dict to the model's keys.
        levels: Default ``out_indices`` of ``features_only``.
        pretrained_cfg: As timm passes it: a tag, a configuration, or None for the default one.
        pretrained_cfg_overlay: Entries that override the configuration's, such as ``{"file": path}``.
        cache_dir: Folder for downloads; that of ``torch.hub`` when not given.
        **kwargs: Arguments of the model, and timm's ``features_only``, ``out_indices`` and ``feature_cls``.

    Returns:
        The model, or timm's feature extractor around it.

    Raises:
        ConnectionError: If the weights cannot be fetched.
        FileNotFoundError: If there is no such file.
        ValueError: If there are no weights to load, or they do not fit.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay).to_dict()
        overlay |= _weights(cfg, variant, cache_dir)
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=partial(_filter, checkpoint_filter_fn, bool(kwargs.get("features_only"))),
        feature_cfg={"out_indices": tuple(levels), "feature_cls": "getter"},
        cache_dir=cache_dir,
        **kwargs,
    )


def imagenet_cfg(url: str = "", **entries: Any) -> dict[str, Any]:
    """A configuration of weights trained on ImageNet-1k at 224×224 and evaluated in the usual way.

    Args:
        url: The file; empty where there is none.
        **entries: What is to be said besides or instead.
    """
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        **entries,
    }


def quarters(depth: int) -> list[int]:
    """The last block of each quarter of so many, counted from 0: features that official segmentations read."""
    return sorted({max(depth * quarter // 4, 1) - 1 for quarter in (1, 2, 3, 4)})


def _weights(cfg: dict[str, Any], variant: str, cache_dir: str | Path | None) -> dict[str, Any]:
    """The entry of a pretrained configuration that gives timm the weights themselves."""
    if cfg.get("state_dict") or cfg.get("source") in ("hf-hub", "local-dir"):
        return {}
    if cfg.get("file"):
        return {"state_dict": checkpoint.read(cfg["file"])}
    if cfg.get("hf_hub_id"):
        return {}
    if cfg.get("url"):
        _warn_of_licence(cfg.get("license"), variant)
        return {"state_dict": checkpoint.read(checkpoint.download(cfg["url"], folder=cache_dir))}
    if cfg.get("tag"):
        raise ValueError(
            f"{variant}: the authors' file is no plain download: get it at {cfg['origin_url']} and pass "
            f"checkpoint_path=PATH to vssm.create_model, or convert it with vssm convert PATH --model {variant}"
        )
    raise ValueError(
        f"{variant}: there are no published weights for pretrained=True; pass pretrained_cfg_overlay={{'file': PATH}} "
        "to load your own"
    )


def _warn_of_licence(licence: str | None, variant: str) -> None:
    if "-nc" in (licence or ""):
        _logger.warning("%s: the authors license these weights as %s, not for commercial use", variant, licence)


def _filter(
    filter_fn: FilterFn, features_only: bool, state_dict: dict[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """Weights under the model's keys, checked; the configuration then says what timm has to adapt in them."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]  an attribute that timm's builder sets
    cfg.pop("state_dict", None)  # timm has taken the weights from it, the model need not keep them twice
    converted = filter_fn(state_dict, model)
    own = model.state_dict()
    adapted: list[str] = []

    classifiers = [cfg["classifier"]] if isinstance(cfg["classifier"], str) else cfg["classifier"]
    classifier = f"{classifiers[0]}.weight"
    if classifier in converted:  # what the file has, which for one's own file is not what was published
        cfg["num_classes"] = converted[classifier].shape[0]
    if features_only or classifier not in own or cfg["num_classes"] != own[classifier].shape[0]:
        adapted += [f"{name}.{kind}" for name in classifiers for kind in ("weight", "bias")]

    first_conv = f"{cfg['first_conv']}.weight"
    if first_conv in converted and converted[first_conv].shape[2:] == own[first_conv].shape[2:]:
        in_chans = converted[first_conv].shape[1]
        cfg["input_size"] = (in_chans, *cfg["input_size"][1:])
        adapted += [first_conv] if in_chans == _ADAPTABLE_CHANNELS else []
    checkpoint.check(model, converted, adapted=adapted)
    return converted
