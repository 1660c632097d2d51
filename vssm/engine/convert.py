"""Converts authors' checkpoints to safetensors under our keys, with a record of where every tensor went."""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import vssm
from vssm import checkpoint
from vssm.dense import DenseBackbone
from vssm.engine.records import environment
from vssm.yolo import MambaYoloDetector

Task = Literal["classify", "detect", "segment"]
_INSIDE = "backbone."  # where mmdetection and mmsegmentation keep it


def convert(
    path: str | Path,
    name: str,
    *,
    task: Task = "classify",
    output: str | Path | None = None,
    num_classes: int | None = None,
    img_size: tuple[int, int] | None = None,
    url: str | None = None,
    entry: str | None = None,
    trust_pickle: bool = False,
) -> dict[str, Any]:
    """Converts one checkpoint for one of this package's models.

    Args:
        path: The authors' file.
        name: The model.
        task: ``"detect"`` or ``"segment"`` for all of the detector or segmentor that its authors put around it:
            Mamba-YOLO, or a model of mmdetection or mmsegmentation, whose other weights keep their keys.
        output: File to write, ending in .safetensors; beside ``path`` when not given. The record lies beside it.
        num_classes: Classes of the checkpoint; the model's own number when not given.
        img_size: Height and width in pixels that the checkpoint's positions are for; the model's own when not given.
        url: Where the file came from, for the record.
        entry: Entry of the file to take the weights from; the first that `checkpoint.read` knows when not given.
        trust_pickle: Whether the file may run code.

    Returns:
        The record: ``model``, ``task``, ``source`` (file, url, sha256), ``keys`` (each key of the file and the keys it
        went to), ``dropped`` (entries of the file and why they were left out), ``environment``, ``file``, ``sha256``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, is not of this model, or would not keep all of its values.
    """
    path = Path(path)
    output = path.with_suffix(".safetensors") if output is None else Path(output)
    if output.resolve() == path.resolve():
        raise ValueError(f"convert: the output would overwrite the source {str(path)!r}, give another output")
    source, dropped = checkpoint.read_with_report(path, trust_pickle, entry=entry, whole=task != "classify")
    given = {"num_classes": num_classes, "img_size": img_size}
    arguments = {key: value for key, value in given.items() if value is not None}
    _check_known(name)
    if task == "classify" or name.partition(".")[0] in vssm.list_models(family="mambayolo"):
        model = _model(name, task, arguments)
        converted, origins = _filter(source, model)
        checkpoint.check(model, converted)
    else:
        converted, origins = _filter_surrounded(source, name, arguments)
    _check_values_kept(source, converted, origins)
    destinations = {key: [mine for mine, theirs in origins.items() if key in theirs] for key in source}
    unused = {key: f"not part of {name}" for key, mine in destinations.items() if not mine}
    record = {
        "model": name,
        "task": task,
        "source": {"file": path.name, "url": url, "sha256": checkpoint.sha256(path)},
        "keys": {key: mine for key, mine in destinations.items() if mine},
        "dropped": dropped | unused,
        "environment": environment("cpu"),
    }
    return checkpoint.write(output, converted, record)


def _model(name: str, task: Task, arguments: dict[str, Any]) -> nn.Module:
    if task == "segment":
        raise ValueError(
            f"convert: the authors of {name} put a detector around it, expected task 'detect', got {task!r}"
        )
    if task == "detect" and "img_size" in arguments:
        raise ValueError("convert: a detector has no weights that depend on an input size, leave img_size out")
    make = vssm.create_model if task == "classify" else MambaYoloDetector
    with torch.device("meta"):  # only its keys and shapes are needed
        return make(name, **arguments)


def _check_known(name: str) -> None:
    if name.partition(".")[0] not in (known := vssm.list_models()):
        raise ValueError(f"convert: {name!r} is no model of vssm, expected one of {', '.join(known)}")


def _filter_surrounded(
    source: Mapping[str, Tensor], name: str, arguments: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, set[str]]]:
    """As `_filter`, of a detector or segmentor of OpenMMLab, whose backbone is `DenseBackbone`."""
    if "num_classes" in arguments:
        raise ValueError("convert: heads of detectors and segmentors keep their classes, leave num_classes out")
    inside = {key.removeprefix(_INSIDE): value for key, value in source.items() if key.startswith(_INSIDE)}
    if not inside:
        raise ValueError(
            f"convert: expected weights whose names begin with {_INSIDE!r}, as in mmdetection and mmsegmentation, "
            f"got {', '.join(list(source)[:3])} ...; for a classifier leave the task out"
        )
    backbone = _dense_backbone(name, inside.keys(), arguments)
    converted, origins = _traced(inside, backbone.complete_keys)
    others = {key: value for key, value in source.items() if not key.startswith(_INSIDE)}
    whole = {_INSIDE + key: value for key, value in converted.items()} | others
    sources = {_INSIDE + key: {_INSIDE + each for each in theirs} for key, theirs in origins.items()}
    return whole, sources | {key: {key} for key in others}


def _dense_backbone(name: str, keys: Collection[str], arguments: dict[str, Any]) -> DenseBackbone:
    """One with the additions to a classifier that are among the official keys."""

    def has(pattern: str) -> bool:
        return any(re.match(pattern, key) for key in keys)

    with torch.device("meta"):  # only its keys and shapes are needed
        if "cls_token" in vssm.create_model(name).state_dict() and not has("cls_token"):
            arguments = {**arguments, "class_token": False}
        normed, last_is_own = has(r"outnorm|norm_layer"), has("norm_layer")
        return DenseBackbone(name, out_norm=normed, final_norm=last_is_own, pyramid=has(r"fpn[1-4]\."), **arguments)


def _filter(source: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], dict[str, set[str]]]:
    """Converted weights, and for each of them the keys of the source that it was made of."""
    return _traced(source, lambda weights: checkpoint.to_model_keys(weights, model))


def _traced(
    source: Mapping[str, Tensor], to_own_keys: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, set[str]]]:
    traced = {key: _Traced.wrap(value, key) for key, value in source.items()}
    converted = to_own_keys(traced)
    origins = {key: value.origins for key, value in converted.items() if isinstance(value, _Traced)}
    return {key: value.as_subclass(Tensor) for key, value in converted.items()}, origins


def _check_values_kept(
    source: Mapping[str, Tensor], converted: Mapping[str, Tensor], origins: Mapping[str, set[str]]
) -> None:
    """A conversion rearranges, joins or splits; one that resizes is for another model or input size."""
    made_of: dict[frozenset[str], list[str]] = {}
    for key, theirs in origins.items():
        made_of.setdefault(frozenset(theirs), []).append(key)
    for theirs, mine in made_of.items():
        before, after = sum(source[key].numel() for key in theirs), sum(converted[key].numel() for key in mine)
        if before != after:
            raise ValueError(
                f"convert: {', '.join(sorted(theirs))} with {before} values would become {', '.join(mine)} with "
                f"{after}: give the checkpoint's input size (--img-size)"
            )


class _Traced(Tensor):
    """A tensor that remembers which checkpoint entries it was computed from."""

    origins: set[str]

    @staticmethod
    def wrap(value: Tensor, key: str) -> "_Traced":
        traced = value.as_subclass(_Traced)
        traced.origins = {key}
        return traced

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        leaves = tree_leaves((args, kwargs))
        origins = set().union(*(leaf.origins for leaf in leaves if isinstance(leaf, _Traced)))
        for each in tree_leaves(result):
            if isinstance(each, _Traced):
                cast(_Traced, each).origins = origins
        return result
