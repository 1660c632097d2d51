"""One measurement of many models: which ones are meant, and a results file that grows, is kept, and is gone on with."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
from timm.utils.misc import natural_key

import vssm
from vssm.engine.checkpoints import is_kept_by_training
from vssm.engine.memory import release
from vssm.engine.records import read_results, write_results

_logger = logging.getLogger(__name__)
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
_WILD = "*?["
# What a model may be measured without; the others go on.
_FAILURES = (ValueError, OSError)


@dataclass(frozen=True)
class Subject:
    """A model to be measured.

    Args:
        model: Its name; None where the description beside its checkpoint tells.
        checkpoint: Its weights; None for the published ones.
    """

    model: str | None
    checkpoint: Path | None = None

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return str(self.checkpoint or self.model)

    def facts(self) -> dict[str, Any]:
        """What tells it from others, also from its checkpoint as it was before or will be."""
        facts: dict[str, Any] = {name: None if value is None else str(value) for name, value in asdict(self).items()}
        if self.checkpoint is not None and self.checkpoint.is_file():
            status = self.checkpoint.stat()
            facts |= {"checkpoint": str(self.checkpoint.resolve()), "bytes": status.st_size, "mtime": status.st_mtime}
        return facts


def find_subjects(model: str | None, checkpoint: Path | None) -> list[Subject]:
    """The models that are meant.

    Args:
        model: A name; a pattern of names with ``*``, ``?`` or ``[ab]``, of vssm's models and timm's that have
            published weights; or a .txt file of names and patterns, one per line, in which # begins a remark.
        checkpoint: Weights, or a folder in which, at any depth, they lie.

    Returns:
        At least one. Of the files in a folder, those which a description lies beside, or with ``model`` all of them,
        in natural order; states to resume from are left out.

    Raises:
        FileNotFoundError: There is no such list.
        ValueError: No model or no checkpoint is meant.
    """
    if checkpoint is not None and checkpoint.is_dir():
        return [Subject(model, path) for path in _checkpoints_in(checkpoint, named=model is not None)]
    if checkpoint is not None or model is None:
        return [Subject(model, checkpoint)]
    lines = _lines(Path(model)) if model.endswith(".txt") else [model]
    names = [name for line in lines for name in (_matching(line) if set(line) & set(_WILD) else [line])]
    return [Subject(name) for name in dict.fromkeys(names)]


def sweep(
    subjects: Sequence[Subject],
    measure: Callable[[Subject], dict[str, Any]],
    *,
    results: Path | None = None,
    settings: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Measures one model after the other.

    A model that cannot be measured does not keep the others from it. The results file is written anew after each
    model; a model that it holds with the same settings is left out, so that an interrupted sweep can be gone on with.

    Args:
        subjects: The models.
        measure: Makes the record of one.
        results: The .json or .csv file of all records, which may exist.
        settings: What else a record depends on, to tell from it whether a model has been measured.

    Returns:
        The records that were made.

    Raises:
        ValueError: The results file holds something else, or models could not be measured.
    """
    old = read_results(results) if results is not None and results.is_file() else []
    done = {_spelled(record.get("settings")) for record in old}
    records: list[dict[str, Any]] = []
    failed: dict[str, Exception] = {}
    asked = [(subject, _plain({**subject.facts(), **(settings or {})})) for subject in subjects]
    wanted = [(subject, facts) for subject, facts in asked if _spelled(facts) not in done]
    if len(wanted) < len(asked):
        names = ", ".join(subject.name for subject, facts in asked if _spelled(facts) in done)
        _logger.info("skipped, since %s holds them for the same data and settings: %s", results, names)
    for subject, facts in wanted:
        try:
            records.append({**measure(subject), "settings": facts})
        except _FAILURES as error:
            if len(subjects) == 1:
                raise
            failed[subject.name] = error
            _logger.warning("%s: %s", subject.name, error)
            continue
        finally:
            release()
        if results is not None:
            write_results(results, [*old, *records])
    if failed:
        raise ValueError(f"{len(failed)} of {len(subjects)} models could not be measured: {', '.join(failed)}")
    return records


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON has them."""
    return json.loads(json.dumps(settings, default=str))


def _spelled(settings: object) -> str:
    """The settings of a record in one form, whether they come from JSON or from CSV."""
    try:
        plain = json.loads(settings) if isinstance(settings, str) else settings
    except ValueError:
        plain = settings
    return json.dumps(plain, sort_keys=True)


def _checkpoints_in(folder: Path, *, named: bool) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file()]
    weights = [path for path in files if not is_kept_by_training(path) and not path.name.startswith(".")]
    chosen = [path for path in weights if named or path.with_suffix(".json").is_file()]
    if not chosen:
        found = "checkpoints without a description beside them: name their model with --model" if weights else "none"
        raise ValueError(f"{folder}: expected checkpoints ({', '.join(_SUFFIXES)}) in this folder, got {found}")
    return sorted(chosen, key=lambda path: natural_key(str(path)))


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such list of models")
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise ValueError(f"{path}: expected names of models, one per line, got none")
    return [line for line in lines if line]


def _matching(pattern: str) -> list[str]:
    names = timm.list_models(pattern, pretrained=True)
    if not names:
        raise ValueError(
            f"no model with published weights matches {pattern!r}; those of vssm are "
            f"{', '.join(vssm.list_models(pretrained=True))}"
        )
    return names
