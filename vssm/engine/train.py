"""Training of a classifier: one loop on timm's optimizers, schedules, augmentation and moving average."""

import logging
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from timm.utils import distribute_bn

from vssm.data import data_id
from vssm.data.loaders import ReadingCheck
from vssm.engine import classifier as classifiers
from vssm.engine import distributed
from vssm.engine.checkpoints import claimed, save_state, state_file
from vssm.engine.curves import draw_curves
from vssm.engine.evaluate import evaluate
from vssm.engine.nonfinite import explain
from vssm.engine.progress import EpochProgress, TensorBoard, epoch_row
from vssm.engine.recipe import Recipe
from vssm.engine.records import environment, write_results
from vssm.engine.stopping import Stopped, StopRequest
from vssm.engine.training_setup import Run, Setting, initial_state, network_of, prepare
from vssm.engine.training_state import EpochSums, TrainingState
from vssm.engine.training_step import NonFiniteLoss, train_step

_logger = logging.getLogger(__name__)


def train(
    recipe: Recipe, setting: Setting, *, resume: dict[str, Any] | None = None, stop: StopRequest | None = None
) -> dict[str, Any]:
    """Trains a classifier and writes what there is to keep into the run's folder.

    Every so often and after every epoch a state to resume from, ``state-STEP.pth``; after every epoch ``log.csv``, and
    after the best so far ``best.safetensors``; at the end ``final.safetensors``, ``curves.png`` and ``record.json``. On
    a CPU, the same recipe gives the same weights, interrupted at any step or not, with any number of workers.

    Args:
        recipe: What to do.
        setting: Where.
        resume: State of an interrupted run of this recipe, from `vssm.engine.checkpoints.read_state`.
        stop: Is looked at after every step, and ends the run when it is true.

    Returns:
        The record: ``top1``, ``top5`` and ``loss`` of the final weights on held-out images, those of the best epoch,
        the settings, and the environment.

    Raises:
        Stopped: It was asked to; the state is written.
        FileNotFoundError: There is no such data.
        ValueError: Model, data and settings do not fit together, too many files cannot be read, or the loss has become
            infinite or not a number.
        OSError: The output folder cannot be written into, another run is writing into it, or the disk is full.
        ConnectionError: Another process of the run has ended before its time.
    """
    with distributed.joined(setting.device) as device:
        run = prepare(recipe, replace(setting, device=device), fresh=resume is None)
        training = _Training(run, initial_state(run), StopRequest() if stop is None else stop)
        if resume is not None:
            training.state.load_state_dict(resume)
        with claimed(setting.output) if distributed.is_main() else nullcontext(), training.state.reducing():
            return training.run_all()


class _Training:
    """A run under way.

    Args:
        run: What does not change.
        state: What does.
        stop: Is looked at after every step.
    """

    def __init__(self, run: Run, state: TrainingState, stop: StopRequest) -> None:
        self.run = run
        self.state = state
        self.stop = stop
        self.network = network_of(run, state)
        self.board = TensorBoard(run.setting.output) if run.setting.tensorboard else None
        self.saved = time.monotonic()

    def run_all(self) -> dict[str, Any]:
        """Trains and evaluates epoch after epoch; returns the record."""
        try:
            while self.state.epoch < self.run.recipe.epochs:
                self.train_epoch()
                self.keep_epoch(self.evaluate())
        except NonFiniteLoss as failure:
            raise ValueError(explain(self.run, self.state, failure)) from failure
        return self.finish()

    def train_epoch(self) -> None:
        """Does what is left of the steps of the epoch that is under way."""
        run, state = self.run, self.state
        state.model.train()
        run.batches.begin(state.epoch, state.step_in_epoch)
        check = ReadingCheck(run.images.source, len(run.batches) * run.batches.batch_size // run.batches.share.ranks)
        progress = EpochProgress(state, epochs=run.recipe.epochs, device=run.setting.device)
        for batch in progress.batches(run.loader):
            check.update(batch)
            outcome = train_step(run, state, self.network, batch)
            state.step += 1
            state.scheduler.step_update(state.step)
            if state.ema is not None:
                state.ema.update(state.model, step=state.step)
            progress.update(outcome)
            self.after_step()
        check.warn()

    def after_step(self) -> None:
        """Saves where it is time for it, and ends the run where it has been asked to."""
        every, step = self.run.setting.save_every, self.state.step
        overdue = every.minutes is not None and time.monotonic() - self.saved > 60 * every.minutes
        (due,) = distributed.summed(overdue and distributed.is_main())
        if due or (every.steps is not None and step % every.steps == 0):
            self.save()
        self.end_if_asked()

    def end_if_asked(self) -> None:
        """Saves and raises `Stopped` if any process has been asked to stop."""
        (asked,) = distributed.summed(bool(self.stop))
        if asked:
            self.save()
            raise Stopped(state_file(self.run.setting.output, self.state.step), self.state.step)

    def evaluate(self) -> dict[str, float | int]:
        """Evaluates the model, or its moving average."""
        evaluated = self.state.evaluated
        ranks = distributed.share().ranks
        if ranks > 1:  # the statistics of batch norms are those of the process that keeps them
            distribute_bn(evaluated, ranks, reduce=False)
        return evaluate(
            evaluated,
            self.run.eval_loader,
            source=self.run.held_out.source,
            device=self.run.setting.device,
            amp_dtype=self.run.amp_dtype,
            after_batch=self.end_if_asked,
        )

    def keep_epoch(self, held_out: dict[str, float | int]) -> None:
        """Ends the epoch, and writes what it has brought."""
        run, state, output = self.run, self.state, self.run.setting.output
        row = epoch_row(state, held_out, device=run.setting.device, clipped=run.recipe.clip_grad is not None)
        state.history.append(row)
        state.sums = EpochSums()
        score = (row["val_top1"], -row["val_loss"])
        if score > state.best:
            state.best = score
            self.save_weights("best.safetensors")
        if distributed.is_main():
            write_results(output / "log.csv", state.history)
            if self.board is not None:
                self.board.write(row)
        self.save()
        _logger.info(
            "epoch %d/%d  loss %.4f  held-out loss %.4f  top-1 %.2f %%  lr %.2e  %.0f images/s",
            state.epoch,
            run.recipe.epochs,
            row["train_loss"],
            row["val_loss"],
            row["val_top1"],
            row["lr"],
            row["train_images_per_s"],
        )

    def save(self) -> None:
        """Writes the state, unless it is not worth keeping; all processes must take part."""
        state, setting = self.state.state_dict(), self.run.setting
        if distributed.is_main():
            for name, weight in state["model"].items():
                if not weight.isfinite().all():
                    raise ValueError(
                        f"train: {name} is not finite after step {self.state.step}; the state before it is kept; "
                        "try a lower --lr or --clip-grad 1"
                    )
            save_state(setting.output, state, run=describe_run(self.run.recipe, setting), keep=setting.keep)
        self.saved = time.monotonic()

    def save_weights(self, name: str) -> None:
        """Writes the weights that are evaluated; all processes must take part."""
        weights = distributed.whole(dict(self.state.evaluated.state_dict()))
        facts = {"data": self.run.images.source, "epoch": self.state.epoch, "held_out": self.state.history[-1]}
        if distributed.is_main():
            classifiers.save(self.run.setting.output / name, self.run.classifier, weights, facts)

    def finish(self) -> dict[str, Any]:
        """Writes final weights, curves and record."""
        self.save_weights("final.safetensors")
        record = self.record()
        if distributed.is_main():
            output = self.run.setting.output
            try:
                draw_curves(output / "curves.png", self.state.history)
            except ValueError as error:  # matplotlib is an extra, and a run is no failure without it
                _logger.warning("no curves: %s", error)
            write_results(output / "record.json", [record])
        return record

    def record(self) -> dict[str, Any]:
        """What has come of the run."""
        run, state, final = self.run, self.state, self.state.history[-1]
        return {
            **{name: final[f"val_{name}"] for name in ("top1", "top5", "loss")},
            "best_top1": state.best[0],
            "train_loss": final["train_loss"],
            "params_m": sum(parameter.numel() for parameter in state.model.parameters()) / 1e6,
            "train_images": len(run.images),
            "held_out_images": len(run.held_out),
            "seconds": sum(row["seconds"] for row in state.history),
            "checkpoint": str(run.setting.output / "final.safetensors"),
            "processes": distributed.share().ranks,
            **describe_run(run.recipe, run.setting),
            **environment(run.setting.device),
        }


def describe_run(recipe: Recipe, setting: Setting) -> dict[str, Any]:
    """What a run does and on which data, in plain values."""
    return {
        "recipe": recipe.as_dict(),
        "data_dir": data_id(setting.data_dir),
        "data_options": setting.data_options.as_dict(),
    }
