"""What a training run consists of, built from its recipe: data, model, optimizer, schedule, moving average."""

import fnmatch
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from vssm.data import DataOptions, LabelledImages, open_dataset
from vssm.data.loaders import Augmentation, eval_loader, train_loader
from vssm.data.sampling import TrainingBatches
from vssm.engine import classifier as classifiers
from vssm.engine import distributed
from vssm.engine.classifier import Classifier
from vssm.engine.distillation import Teacher, TokenWatch, learns_by_head, open_teacher
from vssm.engine.recipe import Recipe
from vssm.engine.training_state import TrainingState
from vssm.pruning import Schedule, TokenReducer

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SaveEvery:
    """How often the state is written inside of an epoch: after so many steps, or minutes.

    Args:
        steps: Number of steps, or None.
        minutes: Number of minutes, or None.
    """

    steps: int | None = None
    minutes: float | None = None


@dataclass(frozen=True)
class Setting:
    """Where a run reads, computes and writes; none of it changes the result but for rounding.

    Args:
        data_dir: The data set, as `vssm.data.open_dataset` takes it; the embedded digits when not given.
        output: Folder that receives checkpoints, log, curves and record.
        device: Where to compute.
        workers: Processes that read images, for each process that computes; 0 to read in that one.
        initial_checkpoint: Weights to start from.
        new_head: Whether these may have another number of classes.
        save_every: How often the state is written; at the end of every epoch in any case.
        keep: Number of states that are kept.
        fsdp: Cut parameters and the optimizer's state into parts, one for each process.
        compile: Mode of torch.compile, such as ``default``; eager when None.
        channels_last: Lay images and maps out with the channels last.
        tensorboard: Write the log for TensorBoard, too.
        data_options: How to read the data set.
    """

    data_dir: str | os.PathLike | None
    output: Path
    device: torch.device
    workers: int = 0
    initial_checkpoint: Path | None = None
    new_head: bool = False
    save_every: SaveEvery = SaveEvery(minutes=15)
    keep: int = 2
    fsdp: bool = False
    compile: str | None = None
    channels_last: bool = False
    tensorboard: bool = False
    data_options: DataOptions = field(default_factory=DataOptions)

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


@dataclass(frozen=True)
class Run:
    """What training needs and does not change.

    Args:
        recipe: What to do.
        setting: Where.
        classifier: The model and what belongs to it.
        images: To train on.
        held_out: To evaluate on.
        loader: Of batches of ``images``.
        eval_loader: Of batches of ``held_out``.
        mix: Class indices (b,) to class probabilities (b, num_classes), and images to mixed ones.
        amp_dtype: Half precision for autocast; float32 when None.
        teacher: A model that is learnt from; none when None.
    """

    recipe: Recipe
    setting: Setting
    classifier: Classifier
    images: LabelledImages
    held_out: LabelledImages
    loader: DataLoader
    eval_loader: DataLoader
    mix: Mix
    amp_dtype: torch.dtype | None
    teacher: Teacher | None = None

    @property
    def batches(self) -> TrainingBatches:
        """Which images form which batch."""
        batches = self.loader.batch_sampler
        assert isinstance(batches, TrainingBatches), "train_loader has made it"
        return batches


def prepare(recipe: Recipe, setting: Setting, *, fresh: bool) -> Run:
    """Opens the data and builds the model, with the weights to start from unless those of a state will replace them.

    Args:
        recipe: What to do.
        setting: Where.
        fresh: Whether the run starts, rather than goes on.

    Raises:
        FileNotFoundError: There is no such data.
        ValueError: Model, data and settings do not fit together.
    """
    _check(recipe, setting)
    images = open_dataset(setting.data_dir, "train", options=setting.data_options)
    held_out = open_dataset(setting.data_dir, "val", classes=images.classes, options=setting.data_options)
    classifier = _student(recipe, setting, images.classes, fresh=fresh)
    share = distributed.share()
    if recipe.accum > recipe.batch_size // share.ranks:
        raise ValueError(
            f"train: expected --accum of at most {recipe.batch_size // share.ranks}, the images of a batch that a "
            f"process gets, got {recipe.accum}"
        )
    device = setting.device
    loading: Any = {"share": share, "workers": setting.workers, "device": device}
    size, config = recipe.batch_size, classifier.config
    return Run(
        recipe=recipe,
        setting=setting,
        classifier=classifier,
        images=images,
        held_out=held_out,
        loader=train_loader(images, config, _augmentation(recipe), batch_size=size, seed=recipe.seed, **loading),
        eval_loader=eval_loader(held_out, config, batch_size=-(-size // share.ranks), **loading),
        mix=_mix(recipe, classifier.spec.num_classes or 0),
        amp_dtype=_DTYPES[recipe.amp_dtype] if recipe.amp else None,
        teacher=_teacher(recipe, setting, classifier),
    )


def _student(recipe: Recipe, setting: Setting, classes: Sequence[str], *, fresh: bool) -> Classifier:
    """The model that is trained, as `prepare` says."""
    random_seed(recipe.seed)
    classifier = classifiers.build(replace(recipe, pretrained=recipe.pretrained and fresh), classes=classes)
    if fresh and setting.initial_checkpoint is not None:
        classifiers.load_initial(classifier, setting.initial_checkpoint, new_head=setting.new_head)
    return classifier


def _teacher(recipe: Recipe, setting: Setting, student: Classifier) -> Teacher | None:
    """The teacher, for whom a student with two classifiers gives out what either says."""
    teacher = open_teacher(recipe, student, device=setting.device, memory_format=setting.memory_format)
    if teacher is not None and learns_by_head(student.model):
        enable: Any = student.model.set_distilled_training
        enable(True)
    return teacher


def _check(recipe: Recipe, setting: Setting) -> None:
    if recipe.amp and recipe.amp_dtype == "float16" and setting.device.type == "cpu":
        raise ValueError("train: float16 needs a GPU; on the CPU, expected --amp-dtype bfloat16")
    if setting.fsdp and not distributed.launched():
        raise ValueError("train: --fsdp cuts the model into parts for several processes; start them with torchrun")


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
    """Mixup and CutMix, or else smoothing alone."""
    if not recipe.mixes_pairs:
        return lambda images, targets: (images, mixup_target(targets, num_classes, smoothing=recipe.smoothing))
    if recipe.batch_size < 2:
        raise ValueError("train: mixup and cutmix need a --batch-size of at least 2, got 1 (--mixup 0 --cutmix 0)")
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        label_smoothing=recipe.smoothing,
        num_classes=num_classes,
    )


def initial_state(run: Run) -> TrainingState:
    """The state before the first step, on the run's device; with ``fsdp``, the part of it that this process holds."""
    recipe, setting, model = run.recipe, run.setting, run.classifier.model
    model.to(setting.device).to(memory_format=setting.memory_format)
    if recipe.grad_checkpointing:
        enable: Any = model.set_grad_checkpointing
        enable()
    ema = None
    if recipe.model_ema:
        options: Any = {"decay": recipe.model_ema_decay, "use_warmup": recipe.model_ema_warmup}
        ema = ModelEmaV3(model, foreach=not setting.fsdp, **options)  # parameters that are cut, buffers that are not
    reducers = _reducers(recipe, (model,) if ema is None else (model, ema.module))  # they know no sharded blocks
    if setting.fsdp:
        distributed.shard(model)
        if ema is not None:
            distributed.shard(ema.module)
    optimizer = _optimizer(model, recipe)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.warmup_lr,
        min_lr=recipe.min_lr,
        step_on_epochs=False,
        updates_per_epoch=len(run.batches),
    )
    assert scheduler is not None, "timm returns none only for sched='none'"
    scaler = torch.amp.GradScaler(setting.device.type, enabled=run.amp_dtype == torch.float16)
    return TrainingState(
        model,
        optimizer,
        scheduler,
        scaler,
        steps_per_epoch=len(run.batches),
        ema=ema,
        reducers=reducers,
        watch=TokenWatch(model) if recipe.distill_tokens > 0 else None,
    )


def _reducers(recipe: Recipe, models: Sequence[nn.Module]) -> tuple[TokenReducer, ...]:
    """A reducer of each model, not open yet; none without a schedule."""
    if recipe.prune is None:
        return ()
    schedule = Schedule.from_dict(recipe.prune)
    return tuple(schedule.reducer(model) for model in models)


def network_of(run: Run, state: TrainingState) -> nn.Module:
    """What to call in training for the model: the model, within what averages gradients over processes."""
    network = distributed.replicated(state.model, run.setting.device)
    if run.setting.compile:
        network.compile(mode=run.setting.compile)
    return network


def _optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    options: Any = {"opt": recipe.opt, "lr": recipe.lr, "weight_decay": recipe.weight_decay}
    if recipe.no_decay is None:
        return create_optimizer_v2(model, layer_decay=recipe.layer_decay, **options)
    groups = _groups(model, recipe, recipe.no_decay)
    return create_optimizer_v2(model, param_group_fn=lambda _: groups, **options)


def _groups(model: nn.Module, recipe: Recipe, no_decay: tuple[str, ...]) -> Any:
    """Groups of parameters by the recipe's own patterns of names, instead of those that the model gives."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in no_decay:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"--no-decay {pattern}: no parameter of {recipe.model} has such a name")
    if recipe.layer_decay is None:
        return param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=no_decay)
    return param_groups_layer_decay(
        model, recipe.weight_decay, no_weight_decay_list=no_decay, layer_decay=recipe.layer_decay
    )
