"""Checkpoint files: read them without running code from them, check that they fit, write them whole.

Nothing here knows a model. What a family's official keys are called is said by its ``checkpoint_filter_fn``.
"""

import argparse
import hashlib
import http.client
import json
import os
import pickle
import re
import shlex
import sys
import urllib.request
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from vssm.files import atomic_path

# Where official training files keep the weights. The plain ones come before their moving average: published figures
# are theirs in the repositories that store both.
_WEIGHT_ENTRIES = ("model", "state_dict", "model_ema", "state_dict_ema", "ema_model")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_BACKBONE_PREFIX = "backbone."
_CLASSIFIER_PREFIX = "head.fc."  # beside the backbone in files of mmpretrain; its detectors have no such part
# Classes that hold nothing but values and that training files of the field contain. yacs need not be installed.
_SAFE_CLASSES = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
_CHUNK = 1 << 20  # bytes


def read(path: str | os.PathLike, trust_pickle: bool = False, *, entry: str | None = None) -> dict[str, Tensor]:
    """Reads the model weights of a checkpoint file.

    Args:
        path: A safetensors file, or one written by ``torch.save``: a state dict, or a training checkpoint that holds
            one under ``model``, ``state_dict``, ``model_ema``, ``state_dict_ema`` or ``ema_model``, the first of these
            that it has.
        trust_pickle: Whether the file may run code. Say so only of files whose origin you trust.
        entry: Take the weights under this name instead, such as ``model_ema``.

    Returns:
        Weights on the CPU by their keys, without the prefixes of wrappers; of a detector, those of its backbone.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is incomplete, is no checkpoint, has no such entry, or needs ``trust_pickle``.
    """
    return read_with_report(path, trust_pickle, entry=entry)[0]


def read_with_report(
    path: str | os.PathLike, trust_pickle: bool = False, *, entry: str | None = None, whole: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `read`, or `read_whole`; also returns, for each entry of the file that is no weight, why it was left out."""
    found = _read(path, trust_pickle, entry)
    return found if whole else _take_backbone(*found)


def read_whole(path: str | os.PathLike, trust_pickle: bool = False) -> dict[str, Tensor]:
    """As `read`, but of a detector, all its weights."""
    return read_with_report(path, trust_pickle, whole=True)[0]


def _read(
    path: str | os.PathLike, trust_pickle: bool, entry: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint.read: no file {str(path)!r}")
    with path.open("rb") as file:
        head = file.read(9)
    is_safetensors = head[8:9] == b"{"  # 8 bytes of length, then a header in JSON
    content = _load_safetensors(path) if is_safetensors else _load_pickle(path, trust_pickle)
    weights, left_out = _unwrap(content, path, entry)
    return _strip_wrappers(weights), left_out


def check(model: nn.Module, state_dict: Mapping[str, Tensor], *, adapted: Collection[str] = ()) -> None:
    """Checks that a state dict has the keys and shapes of a model.

    Args:
        model: The model.
        state_dict: Weights under the model's keys.
        adapted: Keys that may have another shape or be absent, since the loader adapts them.

    Raises:
        ValueError: If it does not; a classifier of another size is named as the cause.
    """
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in adapted}
    given = {key: tuple(value.shape) for key, value in state_dict.items() if key not in adapted}
    missing, unexpected = expected.keys() - given.keys(), given.keys() - expected.keys()
    reshaped = {key: shape for key, shape in given.items() if expected.get(key, shape) != shape}
    if not missing and not unexpected and not reshaped:
        return
    name = type(model).__name__
    classifier = _classifier_keys(model)
    if not missing and not unexpected and reshaped.keys() <= classifier:
        theirs, ours = (next(iter(shapes.values()))[0] for shapes in (reshaped, {k: expected[k] for k in reshaped}))
        raise ValueError(
            f"checkpoint: the checkpoint has {theirs} classes and {name} has {ours}: build the model with "
            f"num_classes={theirs} (--num-classes {theirs})"
        )
    parts = [
        *_summary("missing", sorted(missing)),
        *_summary("unexpected", sorted(unexpected)),
        *_summary("of another shape", [f"{key}: got {got}, expected {expected[key]}" for key, got in reshaped.items()]),
    ]
    raise ValueError(f"checkpoint: the checkpoint does not fit {name}: {'; '.join(parts)}")


def load(model: nn.Module, source: Mapping[str, Tensor] | str | os.PathLike) -> None:
    """Loads weights into a model, strictly.

    Args:
        model: The model.
        source: State dict or checkpoint file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, or its weights are those of another model or another number of classes.
    """
    state_dict = to_model_keys(source if isinstance(source, Mapping) else read(source), model)
    check(model, state_dict)
    model.load_state_dict(state_dict)


def to_model_keys(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Brings official keys to a model's own.

    This is the work of ``checkpoint_filter_fn`` in the module that defines the model's class, which is where timm and
    vssm keep it; without one the keys stay as they are.

    Raises:
        ValueError: If the state dict has a key that the function does not know.
    """
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return dict(state_dict) if filter_fn is None else filter_fn(dict(state_dict), model)


def write(path: str | os.PathLike, state_dict: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Any]:
    """Writes weights as safetensors, and beside them, under the suffix .json, what is known of them: both or neither.

    Args:
        path: Target, ending in .safetensors.
        state_dict: Weights.
        record: Facts about them, of types that JSON has.

    Returns:
        The record as written: with the name and the SHA-256 of the weights' file.

    Raises:
        ValueError: If ``path`` ends in something else.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"checkpoint.write: expected a file name ending in .safetensors, got {str(path)!r}")
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state_dict.items()}
    with atomic_path(path) as temporary, atomic_path(path.with_suffix(".json")) as temporary_record:
        save_file(tensors, temporary, metadata={"format": "pt"})
        complete = {**record, "file": path.name, "sha256": sha256(temporary)}
        temporary_record.write_text(json.dumps(complete, indent=2) + "\n", encoding="utf-8")
    return complete


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def download(url: str, *, folder: str | os.PathLike | None = None) -> Path:
    """Downloads a file, unless it is there already, and verifies it.

    Its SHA-256 is checked if the URL gives it or its first digits, as a fragment (``...model.pth#sha256=0a1b...``) or
    in the file name (``model-0a1b2c3d.pth``, as torch and timm do). A file that ends early is never kept.

    Args:
        url: Address.
        folder: Where to keep the file; the folder of checkpoints of ``torch.hub`` when not given.

    Returns:
        Path of the file, which has the name it has in the URL.

    Raises:
        ConnectionError: If the file cannot be fetched, or ends early.
        ValueError: If it has another SHA-256.
    """
    address, fragment = urldefrag(url)
    name = Path(urlparse(address).path).name
    expected = _expected_sha256(name, fragment)
    target = Path(folder or Path(torch.hub.get_dir(), "checkpoints")) / name
    if target.is_file() and sha256(target).startswith(expected):
        return target
    with atomic_path(target) as temporary:
        _fetch(address, temporary, name=name)
        if not sha256(temporary).startswith(expected):
            raise ValueError(
                f"checkpoint.download: {address} has SHA-256 {sha256(temporary)}, expected {expected}; nothing was kept"
            )
    return target


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"checkpoint.read: {str(path)!r} is not a complete safetensors file ({error})") from error


def _load_pickle(path: Path, trust_pickle: bool) -> Any:
    mmap = zipfile.is_zipfile(path)  # then what is not used, such as the optimizer's state, is not read
    try:
        with torch.serialization.safe_globals(_SAFE_CLASSES):
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle, mmap=mmap)
    except pickle.UnpicklingError as error:
        if (needed := re.search(r"GLOBAL ([\w.]+)", str(error))) and not trust_pickle:
            raise ValueError(
                f"checkpoint.read: {str(path)!r} is a pickle that needs {needed[1]}, and loading it could run code; if "
                f"you trust its origin, convert it: vssm convert {shlex.quote(str(path))} --model NAME --trust-pickle"
            ) from error
        raise _unreadable(path, error) from error
    except ImportError as error:
        raise ValueError(f"checkpoint.read: {str(path)!r} needs a package that is not installed ({error})") from error
    except Exception as error:  # damaged bytes make torch raise almost anything
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    if "weights_only" in reason:  # torch's advice to load it all the same, which would run code from the file
        reason = "its content is not plain tensors"
    return ValueError(f"checkpoint.read: {str(path)!r} is incomplete or not a checkpoint ({reason})")


def _unwrap(content: Any, path: Path, entry: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict inside a file's content, under ``entry`` if one is given, and why the rest is left out."""
    left_out: dict[str, str] = {}
    names = _WEIGHT_ENTRIES if entry is None else (entry,)
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if isinstance(content, Mapping):
        taken = next((name for name in names if isinstance(content.get(name), Mapping | nn.Module)), None)
        if taken is not None:
            weights, inner = _unwrap(content[taken], path)
            outer = {
                str(key): f"not in the entry {taken!r}, which holds the weights" for key in content if key != taken
            }
            return weights, outer | inner
        weights = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if weights and entry is None:
            left_out = {str(key): "not a tensor" for key in content if str(key) not in weights}
            return weights, left_out
    found = (
        f"entries {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else type(content).__name__
    )
    expected = f"under {entry!r}" if entry else f"or such a mapping under one of {', '.join(_WEIGHT_ENTRIES)}"
    raise ValueError(
        f"checkpoint.read: {str(path)!r} holds no weights: expected tensors by name, {expected}; got {found}"
    )


def _strip_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    while True:
        prefix = next((each for each in _WRAPPER_PREFIXES if all(key.startswith(each) for key in weights)), None)
        if prefix is None:
            return weights
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}


def _take_backbone(weights: dict[str, Tensor], left_out: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not any(key.startswith(_BACKBONE_PREFIX) for key in weights):
        return weights, left_out
    taken = {key: value for key, value in weights.items() if key.startswith((_BACKBONE_PREFIX, _CLASSIFIER_PREFIX))}
    others = {key: "not part of the backbone" for key in weights if key not in taken}
    return {key.removeprefix(_BACKBONE_PREFIX): value for key, value in taken.items()}, left_out | others


def _classifier_keys(model: nn.Module) -> set[str]:
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is None:
        return set()
    found = get_classifier()
    classifiers = found if isinstance(found, tuple) else (found,)  # distilled models have two
    return {
        f"{name}.{kind}"
        for name, each in model.named_modules()
        if any(each is classifier for classifier in classifiers)
        for kind in ("weight", "bias")
    }


def _summary(kind: str, entries: Sequence[str]) -> list[str]:
    more = ", ..." if len(entries) > 3 else ""
    return [f"{len(entries)} {kind} ({', '.join(entries[:3])}{more})"] if entries else []


def _expected_sha256(name: str, fragment: str) -> str:
    """First digits of the hash that a URL promises, possibly none."""
    if found := re.fullmatch(r"sha256=([0-9a-f]{8,64})", fragment):
        return found[1]
    found = re.search(r"-([0-9a-f]{8,64})\.", name)
    return found[1] if found else ""


def _fetch(address: str, target: Path, *, name: str) -> None:
    request = urllib.request.Request(address, headers={"User-Agent": "vssm"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response, target.open("wb") as file:
            length = response.headers.get("Content-Length")
            total = None if length is None else int(length)
            with tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=not sys.stderr.isatty()) as bar:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
            received = file.tell()
    except (OSError, http.client.HTTPException) as error:  # urllib's and the socket's errors are OSErrors
        raise ConnectionError(
            f"checkpoint.download: {address} could not be fetched ({error}); if you have the file, pass "
            "pretrained_cfg_overlay={'file': PATH} to create_model"
        ) from error
    if total is not None and received != total:
        raise ConnectionError(
            f"checkpoint.download: {address} ended after {received} of {total} bytes; nothing was kept"
        )
