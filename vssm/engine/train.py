"""Training of a classifier: one loop on timm's optimizers, schedules, augmentation and moving average."""

import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm import tqdm

from vssm.data import LabelledImages, open_dataset
from vssm.data.loaders import Augmentation, Batch, ReadingCheck, eval_loader, train_loader
from vssm.engine import classifier as classifiers
from vssm.engine.checkpoints import TrainingState, claimed, save_state
from vssm.engine.classifier import Classifier
from vssm.engine.curves import draw_curves
from vssm.engine.evaluate import autocast, evaluate
from vssm.engine.recipe import Recipe
from vssm.engine.records import environment, write_results

_logger = logging.getLogger(__name__)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_LOOK_EVERY = 20  # steps; looking at the loss of every step would keep a GPU waiting

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Setting:
    """Where a run reads, computes and writes; none of it changes the result but for rounding.

    Args:
        data_dir: Folder of the data set; the embedded digits when not given.
        output: Folder that receives checkpoints, log, curves and record.
        device: Where to compute.
        workers: Processes that read images; 0 to read in this one.
        initial_checkpoint: Weights to start from.
        new_head: Whether these may have another number of classes.
    """

    data_dir: Path | None
    output: Path
    device: torch.device
    workers: int = 0
    initial_checkpoint: Path | None = None
    new_head: bool = False


@dataclass(frozen=True)
class _Run:
    """What an epoch needs and does not change."""

    recipe: Recipe
    setting: Setting
    classifier: Classifier
    images: LabelledImages
    held_out: LabelledImages
    loader: DataLoader
    eval_loader: DataLoader
    mix: Mix
    amp_dtype: torch.dtype | None


def train(recipe: Recipe, setting: Setting, *, resume: dict[str, Any] | None = None) -> dict[str, Any]:
    """Trains a classifier and writes what there is to keep into the run's folder.

    After every epoch ``state.pth`` (to resume from) and ``log.csv``, and after the best so far ``best.safetensors``;
    at the end ``final.safetensors``, ``curves.png`` and ``record.json``. On a CPU, the same recipe gives the same
    weights, interrupted or not.

    Args:
        recipe: What to do.
        setting: Where.
        resume: State of an interrupted run of this recipe, from `vssm.engine.checkpoints.read_state`.

    Returns:
        The record: ``top1``, ``top5`` and ``loss`` of the final weights on held-out images, those of the best epoch,
        the settings, and the environment.

    Raises:
        FileNotFoundError: There is no such data.
        ValueError: Model, data and settings do not fit together, too many files cannot be read, or the loss has become
            infinite or not a number.
        OSError: The output folder cannot be written into, or another run is writing into it.
    """
    _check_precision(recipe, setting.device)
    start = time.perf_counter()
    run = _prepare(recipe, setting, fresh=resume is None)
    state = _initial_state(run)
    if resume is not None:
        state.load_state_dict(resume)
    with claimed(setting.output):
        while state.epoch < recipe.epochs:
            row = _run_epoch(run, state)
            _keep_epoch(run, state, row)
        return _finish(run, state, seconds=time.perf_counter() - start)


def _check_precision(recipe: Recipe, device: torch.device) -> None:
    if recipe.amp and recipe.amp_dtype == "float16" and device.type == "cpu":
        raise ValueError("train: float16 needs a GPU; on the CPU, expected --amp-dtype bfloat16")


def _prepare(recipe: Recipe, setting: Setting, *, fresh: bool) -> _Run:
    """Opens the data and builds the model, with the weights to start from unless those of a state will replace them."""
    images = open_dataset(setting.data_dir, "train")
    held_out = open_dataset(setting.data_dir, "val", classes=images.classes)
    random_seed(recipe.seed)
    classifier = classifiers.build(replace(recipe, pretrained=recipe.pretrained and fresh), classes=images.classes)
    if fresh and setting.initial_checkpoint is not None:
        classifiers.load_initial(classifier, setting.initial_checkpoint, new_head=setting.new_head)
    classifier.model.to(setting.device)
    loading: Any = {"workers": setting.workers, "pin_memory": setting.device.type == "cuda"}
    size = recipe.batch_size
    loader = train_loader(images, classifier.config, _augmentation(recipe), batch_size=size, **loading)
    return _Run(
        recipe=recipe,
        setting=setting,
        classifier=classifier,
        images=images,
        held_out=held_out,
        loader=loader,
        eval_loader=eval_loader(held_out, classifier.config, batch_size=size, **loading),
        mix=_mix(recipe, classifier.spec.num_classes or 0),
        amp_dtype=_DTYPES[recipe.amp_dtype] if recipe.amp else None,
    )


def _augmentation(recipe: Recipe) -> Augmentation:
    return Augmentation(
        scale=recipe.scale,
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter,
        aa=recipe.aa,
        reprob=recipe.reprob,
        interpolation=recipe.train_interpolation,
        repeats=recipe.aug_repeats,
    )


def _mix(recipe: Recipe, num_classes: int) -> Mix:
    """Mixup and CutMix, or else smoothing alone: class indices (b,) to class probabilities (b, num_classes)."""
    if not _pairs(recipe):
        return lambda images, targets: (images, mixup_target(targets, num_classes, smoothing=recipe.smoothing))
    if recipe.batch_size < 2:
        raise ValueError("train: mixup and cutmix need a --batch-size of at least 2, got 1 (--mixup 0 --cutmix 0)")
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        label_smoothing=recipe.smoothing,
        num_classes=num_classes,
    )


def _pairs(recipe: Recipe) -> bool:
    """Whether images are mixed in pairs, of which a batch must then consist."""
    return recipe.mixup > 0 or recipe.cutmix > 0


def _initial_state(run: _Run) -> TrainingState:
    recipe, model = run.recipe, run.classifier.model
    if recipe.grad_checkpointing:
        enable: Any = model.set_grad_checkpointing
        enable()
    optimizer = create_optimizer_v2(model, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.warmup_lr,
        min_lr=recipe.min_lr,
        step_on_epochs=False,
        updates_per_epoch=len(run.loader),
    )
    assert scheduler is not None, "timm returns none only for sched='none'"
    device = run.setting.device.type
    scaler = torch.amp.GradScaler(device, enabled=run.amp_dtype == torch.float16)
    ema = ModelEmaV3(model, decay=recipe.model_ema_decay, use_warmup=recipe.model_ema_warmup)
    return TrainingState(model, optimizer, scheduler, scaler, ema if recipe.model_ema else None)


def _run_epoch(run: _Run, state: TrainingState) -> dict[str, float | int]:
    """Trains for one epoch and evaluates; returns the epoch's record."""
    seed = _epoch_seed(run.recipe.seed, state.epoch)
    random_seed(seed)
    run.loader.sampler.set_epoch(seed)  # type: ignore[attr-defined]  both of our samplers have it
    start = time.perf_counter()
    loss, images = _train_epoch(run, state)
    seconds = time.perf_counter() - start
    held_out = evaluate(
        state.evaluated,
        run.eval_loader,
        source=run.held_out.source,
        device=run.setting.device,
        amp_dtype=run.amp_dtype,
    )
    state.epoch += 1
    return {
        "epoch": state.epoch,
        "lr": state.optimizer.param_groups[0]["lr"],
        "train_loss": loss,
        **{f"val_{name}": held_out[name] for name in ("loss", "top1", "top5")},
        "train_images_per_s": images / seconds,
        "seconds": time.perf_counter() - start,
    }


def _train_epoch(run: _Run, state: TrainingState) -> tuple[float, int]:
    """Returns the mean loss and the number of images."""
    state.model.train()
    check = ReadingCheck(run.images.source, len(run.loader) * (run.loader.batch_size or 1))
    meter = _LossMeter(run.setting.device, state.epoch)
    bar = tqdm(
        run.loader, desc=f"epoch {state.epoch + 1}/{run.recipe.epochs}", leave=False, disable=not sys.stderr.isatty()
    )
    first = state.epoch * len(run.loader)
    for step, batch in enumerate(bar, start=1):
        check.update(batch)
        count = len(batch.targets) - (len(batch.targets) % 2 if _pairs(run.recipe) else 0)
        if count:
            meter.update(_step(run, state, batch, count), count)
        state.scheduler.step_update(first + step)
        if state.ema is not None:
            state.ema.update(state.model, step=first + step)
        if step % _LOOK_EVERY == 0:
            bar.set_postfix(loss=f"{meter.look():.4f}", lr=f"{state.optimizer.param_groups[0]['lr']:.2e}")
    check.warn()
    return meter.look(), meter.images


def _step(run: _Run, state: TrainingState, batch: Batch, count: int) -> Tensor:
    """One step on the first ``count`` images of a batch; returns its mean loss."""
    device = run.setting.device
    images = batch.images[:count].to(device, non_blocking=True)
    targets = batch.targets[:count].to(device, non_blocking=True)
    images, targets = run.mix(images, targets)
    with autocast(device, run.amp_dtype):
        loss = cross_entropy(state.model(images), targets)
    state.optimizer.zero_grad()
    state.scaler.scale(loss).backward()
    if run.recipe.clip_grad is not None:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), run.recipe.clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return loss.detach()


class _LossMeter:
    """The mean loss of an epoch, summed up on the device."""

    def __init__(self, device: torch.device, epoch: int) -> None:
        self.total = torch.zeros((), device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
        self.images = 0
        self.epoch = epoch

    def update(self, loss: Tensor, images: int) -> None:
        self.total += loss * images
        self.images += images

    def look(self) -> float:
        """The mean so far; raises ValueError if it is not finite."""
        mean = float(self.total) / max(self.images, 1)
        if not math.isfinite(mean):
            raise ValueError(
                f"train: the loss is {mean} in epoch {self.epoch + 1}, within its first {self.images} images; try a "
                "lower --lr, --clip-grad 1, or a longer --warmup-epochs (--resume starts from the epoch before)"
            )
        return mean


def _epoch_seed(seed: int, epoch: int) -> int:
    """A seed for every epoch of every run, so that an epoch can be repeated without those before it."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def _keep_epoch(run: _Run, state: TrainingState, row: dict[str, float | int]) -> None:
    """Writes what an epoch has brought."""
    output = run.setting.output
    state.history.append(row)
    score = (row["val_top1"], -row["val_loss"])
    if score > state.best:
        state.best = score
        _save_weights(run, state, "best.safetensors")
    write_results(output / "log.csv", state.history)
    save_state(output, state, describe_run(run.recipe, run.setting))
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


def describe_run(recipe: Recipe, setting: Setting) -> dict[str, Any]:
    """What a run does and on which data, in plain values."""
    data = None if setting.data_dir is None else str(setting.data_dir.resolve())
    return {"recipe": recipe.as_dict(), "data_dir": data}


def _save_weights(run: _Run, state: TrainingState, name: str) -> None:
    facts = {"data": run.images.source, "epoch": state.epoch, "held_out": state.history[-1]}
    classifiers.save(run.setting.output / name, run.classifier, state.evaluated.state_dict(), facts)


def _finish(run: _Run, state: TrainingState, *, seconds: float) -> dict[str, Any]:
    """Writes final weights, curves and record."""
    output, final = run.setting.output, state.history[-1]
    _save_weights(run, state, "final.safetensors")
    try:
        draw_curves(output / "curves.png", state.history)
    except ValueError as error:  # matplotlib is an extra, and a run is no failure without it
        _logger.warning("no curves: %s", error)
    record = {
        **{name: final[f"val_{name}"] for name in ("top1", "top5", "loss")},
        "best_top1": state.best[0],
        "train_loss": final["train_loss"],
        "params_m": sum(parameter.numel() for parameter in state.model.parameters()) / 1e6,
        "train_images": len(run.images),
        "held_out_images": len(run.held_out),
        "seconds": seconds,
        "checkpoint": str(output / "final.safetensors"),
        **describe_run(run.recipe, run.setting),
        **environment(run.setting.device),
    }
    write_results(output / "record.json", [record])
    return record
