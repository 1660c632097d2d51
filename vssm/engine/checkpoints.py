"""States of a training run on disk: written whole or not at all, read without running code, the newest few kept."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from vssm.files import atomic_path, remove_leftovers

BATCH_FILE = "nonfinite-batch.pth"
_VERSION = 2
_NAME = re.compile(r"state-(\d{8,})\.pth")

_logger = logging.getLogger(__name__)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps a folder for one run: makes it, lets no other run in, and removes it if it was made for nothing.

    What a run that was killed has left half-written is removed.

    Args:
        folder: Of the run.

    Raises:
        FileExistsError: Another run is writing into the folder, or it is a file.
        PermissionError: It cannot be written into.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: a file, expected a folder to write into")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: no permission to write into this folder; name another with --output")
    try:
        with _locked(folder):
            remove_leftovers(folder)
            yield
    finally:
        if is_new:
            with suppress(OSError):  # it is not empty: the usual case
                folder.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which ends with the process at the latest."""
    if sys.platform == "win32":  # has no such locks
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"{folder}: another run is writing into this folder; name another with --output"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing alone would leave it to processes that read images
        os.close(handle)


def state_file(folder: Path, step: int) -> Path:
    """Where the state after so many steps is kept."""
    return folder / f"state-{step:08d}.pth"


def state_files(folder: Path) -> list[Path]:
    """The states in the folder of a run, newest first."""
    found = {path: _NAME.fullmatch(path.name) for path in folder.glob("state-*.pth")}
    return sorted((path for path, match in found.items() if match), key=_step_of, reverse=True)


def is_kept_by_training(path: Path) -> bool:
    """Whether a file, by its name, is what training keeps for itself, not weights: a state, or a batch that failed."""
    return _NAME.fullmatch(path.name) is not None or path.name == BATCH_FILE


def save_state(folder: Path, state: dict[str, Any], *, run: dict[str, Any], keep: int) -> Path:
    """Writes the state of a run into its folder; only then removes those that are no longer needed.

    These are the older ones, and any of a later step: they are damaged, or the run has gone back behind them.

    Args:
        folder: Of the run.
        state: What changes: `vssm.engine.training_state.TrainingState.state_dict`.
        run: What does not: settings and data, in plain values.
        keep: Number of states to keep.

    Returns:
        The file.

    Raises:
        OSError: The disk is full; the earlier states are still there.
    """
    file = state_file(folder, state["step"])
    with atomic_path(file) as temporary:
        try:
            torch.save({"version": _VERSION, "run": run, **state}, temporary)
        except RuntimeError as error:  # torch's own for a write that failed
            raise OSError(f"{file}: could not be written; is the disk full?") from error
    kept = [each for each in state_files(folder) if _step_of(each) <= state["step"]][:keep]
    for other in set(state_files(folder)) - set(kept):
        other.unlink()
    return file


def read_state(path: str | os.PathLike) -> dict[str, Any]:
    """Reads what `save_state` has written.

    Args:
        path: The file, or the folder of the run, of which the newest state is taken that is not damaged.

    Returns:
        The entries of the state, and ``run``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is incomplete, or something else.
    """
    files = state_files(Path(path)) if Path(path).is_dir() else [Path(path)]
    for file, older in pairwise(files):
        try:
            return _read(file)
        except ValueError as error:
            _logger.warning("%s; going on from %s", error, older.name)
    if not files or not files[-1].is_file():
        raise FileNotFoundError(f"{path}: no such training state to resume from")
    return _read(files[-1])


def _read(file: Path) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch raise almost anything
        raise ValueError(f"{file}: incomplete or not a training state") from error
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        raise ValueError(f"{file}: not a training state of this version of vssm")
    return content


def _step_of(file: Path) -> int:
    match = _NAME.fullmatch(file.name)
    assert match is not None, "state_files lists nothing else"
    return int(match[1])
