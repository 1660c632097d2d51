"""Schedules: where a model's tokens are reduced and how, as a YAML file says it."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from vssm.files import atomic_path
from vssm.pruning.reducer import TokenReducer

_Kind = type | tuple[type, ...]
# What the values are that are not text: their type, what to call it, and whether there may be a list of them.
_VALUES: dict[str, tuple[_Kind, str, bool]] = {
    "after": (int, "a list of numbers of blocks", True),
    "keep": ((int, float), "a share or a list of shares", True),
    "remove": (int, "a whole number", False),
}


@dataclass(frozen=True)
class Schedule:
    """The arguments of a `TokenReducer`, and the model that they are meant for.

    Args:
        model: Registered name.
        after: Blocks after which to cut, counted from 1.
        keep: Share of the patch tokens that each cut keeps; None if ``remove`` is given.
        remove: Number of tokens that each cut removes; None if ``keep`` is given.
        policy: Name of the policy.
        score: Name of the score; None for the policy's own.
        align: How scans treat dropped tokens.
        conv: What convolutions see; None for what suits ``align``.
        source: Where the schedule is published, or how it was found.
    """

    model: str
    after: tuple[int, ...]
    keep: float | tuple[float, ...] | None = None
    remove: int | None = None
    policy: str = "top"
    score: str | None = None
    align: str = "decay"
    conv: str | None = None
    source: str | None = None

    def reducer(self, model: nn.Module) -> TokenReducer:
        """The reducer of a model.

        Raises:
            ValueError: If the schedule does not suit the model.
        """
        arguments = {name: value for name, value in vars(self).items() if name not in ("model", "source")}
        return TokenReducer(model, **arguments)

    def with_options(self, **options: Any) -> "Schedule":
        """The same with other values; ``keep`` takes the place of ``remove`` and vice versa."""
        for given, other in (("keep", "remove"), ("remove", "keep")):
            if given in options:
                options.setdefault(other, None)
        return replace(self, **options)

    def as_dict(self) -> dict[str, Any]:
        """The schedule as values that JSON has."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Schedule":
        """The schedule that `as_dict` has written."""
        arguments: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**arguments)


def read_schedule(path: str | os.PathLike) -> Schedule:
    """Reads a schedule from a YAML file whose keys are the arguments of `Schedule`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no YAML mapping, a key is unknown or missing, or a value is of the wrong kind.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from None
    known = [field.name for field in fields(Schedule)]
    if not isinstance(content, Mapping) or not {"model", "after"} <= content.keys() <= set(known):
        found = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path}: expected the keys model and after, and of {', '.join(known[2:])}, got {found}")
    for name, value in content.items():
        kind, spelled, several = _VALUES.get(name, (str, "text", False))
        parts = value if isinstance(value, list) and several else [value]
        if not all(isinstance(part, kind) and not isinstance(part, bool) for part in parts):
            raise ValueError(f"{path}: {name} must be {spelled}, got {value!r}")
    after = content["after"]
    return Schedule.from_dict({**content, "after": [after] if isinstance(after, int) else after})


def write_schedule(path: str | os.PathLike, schedule: Schedule) -> None:
    """Writes a schedule as a YAML file that `read_schedule` reads."""
    values = {name: value for name, value in schedule.as_dict().items() if value is not None}
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
