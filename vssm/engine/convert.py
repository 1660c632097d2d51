"""Converts authors' checkpoints to safetensors under our keys, with a record of where every tensor went."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import vssm
from vssm import checkpoint
from vssm.engine.records import environment
from vssm.yolo import MambaYoloDetector

Task = Literal["classify", "detect"]


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
        task: ``"detect"`` for the detector that its authors put around it, if they did.
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
    source, dropped = checkpoint.read_with_report(path, trust_pickle, entry=entry, whole=task == "detect")
    given = {"num_classes": num_classes, "img_size": img_size}
    model = _model(name, task, {key: value for key, value in given.items() if value is not None})
    converted, origins = _filter(source, model)
    checkpoint.check(model, converted)
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
    known = vssm.list_models() if task == "classify" else vssm.list_models(family="mambayolo")
    if name.partition(".")[0] not in known:
        kind = "model of vssm" if task == "classify" else "model of vssm with a detector of its own"
        raise ValueError(f"convert: {name!r} is no {kind}, expected one of {', '.join(known)}")
    if task == "detect" and "img_size" in arguments:
        raise ValueError("convert: a detector has no weights that depend on an input size, leave img_size out")
    make = vssm.create_model if task == "classify" else MambaYoloDetector
    with torch.device("meta"):  # only its keys and shapes are needed
        return make(name, **arguments)


def _filter(source: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], dict[str, set[str]]]:
    """Converted weights, and for each of them the keys of the source that it was made of."""
    traced = {key: _Traced.wrap(value, key) for key, value in source.items()}
    converted = checkpoint.to_model_keys(traced, model)
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
