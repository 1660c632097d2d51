"""The registered models with what building them tells, which is kept in the cache folder until their sources change."""

import hashlib
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch.overrides import TorchFunctionMode

import vssm
from vssm.engine.zoo import count_parameters, create_by_name, family_of, input_size
from vssm.kept import keep, read_kept
from vssm_kernels.cache import cache_folder

_NOT_OF_NUMBERS = ("requires_grad_", "squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "resize_", "set_")
_SOURCES = ("layers", "models")  # of this package, by which models are what they are


class ModelFacts(NamedTuple):
    """What building a model tells of it.

    Args:
        parameters: How many, shared ones once.
        input_size: Channels, height and width.
    """

    parameters: int
    input_size: tuple[int, int, int]


def list_records(pattern: str = "", *, pretrained: bool = False, family: str | None = None) -> list[dict]:
    """Describes the registered models of vssm.

    Args:
        pattern: Part of a name, or a pattern with ``*``; all models when empty.
        pretrained: Only models with weights.
        family: Only models of this family.

    Returns:
        Per model: ``model``, ``family``, ``params_m`` (millions), ``input_size`` (channels, height, width) and
        ``tags`` of its weights.

    Raises:
        ValueError: There is no such family, or no model matches.
    """
    names = vssm.list_models()
    families = sorted({family_of(name) for name in names})
    if family is not None and family not in families:
        raise ValueError(f"no family {family!r}; there are {', '.join(families)}")
    chosen = [name for name in names if _matches(name, pattern) and family in (None, family_of(name))]
    chosen = [name for name in chosen if not pretrained or _tags(name)]
    if not chosen:
        kind = "model with weights" if pretrained else "model"
        raise ValueError(f"no {kind} matches {pattern!r}; there are {', '.join(names)}")
    return [
        {
            "model": name,
            "family": family_of(name),
            "params_m": facts.parameters / 1e6,
            "input_size": list(facts.input_size),
            "tags": _tags(name),
        }
        for name, facts in model_facts(chosen).items()
    ]


def model_facts(names: Sequence[str]) -> dict[str, ModelFacts]:
    """Facts of registered models of vssm, by name; those that are not known yet are built, without memory."""
    file, of = cache_folder() / "model_facts.json", {"sources": _digest(), "timm": timm.__version__}
    known = read_kept(file, of, _parsed) or {}
    found = {name: _built(name) for name in names if name not in known}
    if found:
        keep(file, of, {"models": known | found}, what="the number of parameters of models")
    return {name: (known | found)[name] for name in names}


class _Uninitialised(TorchFunctionMode):
    """Skips what would only change numbers, of which tensors without memory have none: most of the time they take."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if args and name.endswith("_") and not name.endswith("__") and name not in _NOT_OF_NUMBERS:
            return args[0]
        return func(*args, **(kwargs or {}))


def _built(name: str) -> ModelFacts:
    with torch.device("meta"), _Uninitialised():
        model = create_by_name(name)
    return ModelFacts(count_parameters(model), input_size(model))


def _parsed(models: dict[str, Any]) -> dict[str, ModelFacts]:
    facts = {}
    for name, (parameters, (channels, height, width)) in models.items():
        facts[name] = ModelFacts(int(parameters), (int(channels), int(height), int(width)))
    return facts


def _digest() -> str:
    """Of the version and the sources of the models, which may be edited in a checkout."""
    digest = hashlib.sha256(version("vssm").encode())
    folder = Path(vssm.__file__).parent
    for path in sorted(path for each in _SOURCES for path in (folder / each).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern if "*" in pattern else f"*{pattern}*")


def _tags(name: str) -> list[str]:
    """Tags of the weights that can be had."""
    return [full.partition(".")[2] for full in timm.list_pretrained(name)]
