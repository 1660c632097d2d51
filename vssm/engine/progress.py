"""What a run shows of itself: a bar while an epoch is under way, a row when it is done, and TensorBoard's log."""

import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from vssm.data.loaders import Batch
from vssm.engine import distributed
from vssm.engine.training_state import EpochSums, TrainingState
from vssm.engine.training_step import Outcome

_MIB = 2**20
_SHOW_EVERY = 20  # steps


class EpochProgress:
    """Adds up what the steps of an epoch bring, and shows it on a terminal.

    Args:
        state: Of the run, whose sums are added to.
        epochs: Number of epochs of the run.
        device: Where it computes.
    """

    def __init__(self, state: TrainingState, *, epochs: int, device: torch.device) -> None:
        self.state = state
        self.epochs = epochs
        self.device = device
        self._since = time.perf_counter()
        self._bar = tqdm(
            total=state.steps_per_epoch,
            initial=state.step_in_epoch,
            desc=f"epoch {state.epoch + 1}/{epochs}",
            leave=False,
            disable=not (sys.stderr.isatty() and distributed.is_main()),
        )
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def batches(self, loader: DataLoader) -> Iterator[Batch]:
        """Batches of a loader; the time until each is there counts as waiting."""
        before = time.perf_counter()
        for batch in loader:
            self.state.sums.waiting += time.perf_counter() - before
            yield batch
            before = time.perf_counter()
        self._bar.close()

    def update(self, outcome: Outcome) -> None:
        """Adds what a step has brought."""
        sums = self.state.sums
        sums.loss += outcome.loss
        sums.images += outcome.images
        sums.grad_norm += outcome.grad_norm
        sums.steps += 1
        now = time.perf_counter()
        sums.seconds += now - self._since
        self._since = now
        self._bar.update(1)
        if sums.steps % _SHOW_EVERY == 0:
            self._bar.set_postfix_str(self._line(sums))

    def _line(self, sums: EpochSums) -> str:
        left = self.epochs * self.state.steps_per_epoch - self.state.step
        return (
            f"loss {sums.loss / max(sums.images, 1):.4f}, lr {learning_rate(self.state):.2e}, "
            f"{sums.images / sums.seconds:.0f} images/s, waiting for data {sums.waiting / sums.seconds:.0%}, "
            f"{peak_memory_mib(self.device):.0f} MiB, {duration(left * sums.seconds / sums.steps)} to go"
        )


def epoch_row(
    state: TrainingState, held_out: dict[str, float | int], *, device: torch.device, clipped: bool
) -> dict[str, float | int]:
    """The record of the epoch that is under way, all of whose steps are done.

    Args:
        state: Of the run.
        held_out: From `vssm.engine.evaluate.evaluate`.
        device: Where the run computes.
        clipped: Whether gradients are clipped, and their norms known.
    """
    sums = state.sums
    norm = {"grad_norm": float(sums.grad_norm) / max(sums.steps, 1)} if clipped else {}
    return {
        "epoch": state.epoch + 1,
        "step": state.step,
        "lr": learning_rate(state),
        "train_loss": sums.loss / max(sums.images, 1),
        **{f"val_{name}": held_out[name] for name in ("loss", "top1", "top5")},
        **norm,
        "train_images_per_s": sums.images / sums.seconds,
        "data_wait": sums.waiting / sums.seconds,
        "peak_memory_mib": peak_memory_mib(device),
        "seconds": sums.seconds + held_out["images"] / held_out["images_per_s"],
    }


def learning_rate(state: TrainingState) -> float:
    """The learning rate of the next step, of layers that are not slowed down by layer decay."""
    return max(group["lr"] for group in state.optimizer.param_groups)


def peak_memory_mib(device: torch.device) -> float:
    """Most memory so far in MiB: torch's on a GPU, since the epoch began; elsewhere that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    if sys.platform == "win32":  # has no such count
        return float("nan")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MIB if sys.platform == "darwin" else peak / 1024


def duration(seconds: float) -> str:
    """Such as ``1 day, 2:03:04``."""
    return str(timedelta(seconds=round(seconds)))


class TensorBoard:
    """The rows of a run for TensorBoard, in a folder ``tensorboard`` beside its other files.

    Args:
        output: Folder of the run.

    Raises:
        ValueError: tensorboard is not installed.
    """

    def __init__(self, output: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "--tensorboard needs tensorboard, which is not installed: pip install tensorboard"
            ) from None
        self._make: Any = SummaryWriter
        self._folder = output / "tensorboard"

    def write(self, row: dict[str, float | int]) -> None:
        """Writes a row, over what an earlier attempt at this epoch has written."""
        epoch = int(row["epoch"])
        with self._make(self._folder, purge_step=epoch) as writer:
            for name, value in row.items():
                if name != "epoch":
                    writer.add_scalar(name, value, epoch)
