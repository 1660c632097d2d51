"""The state of a training run on disk: written whole or not at all, read without running code, resumed exactly."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from vssm.files import atomic_path

STATE_FILE = "state.pth"
_VERSION = 1


@dataclass
class TrainingState:
    """All that changes in the course of training.

    Random numbers are not among it: every epoch seeds the generators anew from the run's seed and its own number. The
    learning rate is not either, a function of the number of steps.

    Args:
        model: The model.
        optimizer: Its optimizer.
        scheduler: Sets the optimizer's learning rate.
        scaler: Scaler of the loss for float16; disabled for other types.
        ema: Moving average of the weights, if there is one.
        epoch: Epochs done.
        history: One record per epoch done.
        best: Accuracy and negated loss of the best epoch.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    epoch: int = 0
    history: list[dict[str, float | int]] = field(default_factory=list)
    best: tuple[float, float] = (-1.0, 0.0)

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and kept: the moving average, if there is one."""
        return self.model if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Any]:
        """The state in values and tensors."""
        return {
            "model": self.model.state_dict(),
            "model_ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "history": self.history,
            "best": list(self.best),
        }

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        """Takes over a state; raises ValueError if it belongs to another model or optimizer."""
        if (stored["model_ema"] is None) != (self.ema is None):
            have = "no" if stored["model_ema"] is None else "a"
            raise ValueError(
                f"resume: the stored run has {have} moving average of weights; --model-ema must stay the same"
            )
        try:
            self.model.load_state_dict(stored["model"])
            if self.ema is not None:
                self.ema.module.load_state_dict(stored["model_ema"])
            self.optimizer.load_state_dict(stored["optimizer"])
            self.scaler.load_state_dict(stored["scaler"])
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"resume: the stored run is of another model or optimizer ({reason})") from error
        self.epoch, self.history, self.best = stored["epoch"], stored["history"], tuple(stored["best"])


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps a folder for one run: makes it, lets no other run in, and removes it if it was made for nothing.

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


def save_state(folder: Path, state: TrainingState, run: dict[str, Any]) -> None:
    """Writes the state of a run into its folder.

    Args:
        folder: Of the run.
        state: What changes.
        run: What does not: settings and data, in plain values.

    Raises:
        OSError: The disk is full.
    """
    with atomic_path(folder / STATE_FILE) as temporary:
        try:
            torch.save({"version": _VERSION, "run": run, **state.state_dict()}, temporary)
        except RuntimeError as error:  # torch's own for a write that failed
            raise OSError(f"{folder / STATE_FILE}: could not be written; is the disk full?") from error


def read_state(path: str | os.PathLike) -> dict[str, Any]:
    """Reads what `save_state` has written.

    Args:
        path: The file, or the folder of the run.

    Returns:
        The entries of `TrainingState.state_dict`, and ``run``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is incomplete, or something else.
    """
    file = Path(path, STATE_FILE) if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such training state to resume from")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch raise almost anything
        raise ValueError(f"{file}: incomplete or not a training state; expected {STATE_FILE} of a run") from error
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        raise ValueError(f"{file}: not a training state of this version of vssm; expected {STATE_FILE} of a run")
    return content
