"""What a training run is asked to do, as one record of plain values."""

from dataclasses import dataclass
from typing import Any

from vssm.engine.classifier import ModelSpec

DENSE = "dense"  # as a teacher: the model itself before training, on all tokens


@dataclass(frozen=True)
class Recipe(ModelSpec):
    """Settings of a training run, by the names of its options: those of `ModelSpec` and these.

    Args:
        grad_checkpointing: Recompute activations in the backward pass to save memory.
        batch_size: Images per step, of all processes together.
        accum: Parts into which every process cuts its images of a step, one after the other, to save memory.
        epochs: Passes over the training images, warm-up included.
        opt: Optimizer, by timm's name.
        lr: Learning rate after warm-up.
        min_lr: Learning rate at the end.
        warmup_lr: Learning rate at the start of warm-up.
        warmup_epochs: Length of warm-up.
        layer_decay: Factor on the learning rate per layer, from the last to the first; none when None.
        weight_decay: Of weights; what has one dimension, such as biases and norms, is never decayed.
        no_decay: Patterns of the names of other parameters that are not; those that the model names when None.
        clip_grad: Largest norm of the gradient; unlimited when None.
        scale: Smallest and largest part of the image's area that a random crop takes.
        hflip: Probability of a horizontal flip.
        color_jitter: Strength of changes of colour; unused with ``aa``.
        aa: Augmentation policy such as ``rand-m9-mstd0.5-inc1``; empty for none.
        reprob: Probability of erasing a random rectangle.
        train_interpolation: Of training images: bilinear, bicubic or random.
        aug_repeats: Copies of an image in an epoch, which then sees as many times fewer images.
        mixup: Mixup's alpha; 0 for none.
        cutmix: CutMix's alpha; 0 for none.
        smoothing: Label smoothing.
        model_ema: Keep a moving average of the weights, and evaluate that.
        model_ema_decay: Its decay per step.
        model_ema_warmup: Start it with a smaller decay.
        distill_teacher: Model whose predictions are learnt besides labels; ``dense`` is the model itself before
            training, on all tokens; none when None.
        distill_checkpoint: File of its weights; the published ones when None.
        distill: What of them is learnt: ``hard``, the most probable class, or ``soft``, all probabilities.
        distill_weight: Part of the loss that the teacher has; labels have the rest.
        distill_temperature: Divides logits before ``soft`` takes probabilities.
        distill_tokens: Weight of the squared differences to the last tokens of ``dense``, added to the loss.
        mesa: Weight of the cross-entropy to the moving average's predictions, which is added to the loss.
        mesa_start_epoch: Epochs before that.
        prune: Where to drop or merge tokens, and how, as `vssm.pruning.Schedule.as_dict` says it; nowhere when None.
        amp: Compute in half precision where that is safe.
        amp_dtype: bfloat16 or float16.
        seed: Of the initial weights, the order of images and their augmentation.
    """

    grad_checkpointing: bool = False
    batch_size: int = 128
    accum: int = 1
    epochs: int = 300
    opt: str = "adamw"
    lr: float = 5e-4
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup_epochs: int = 5
    layer_decay: float | None = None
    weight_decay: float = 0.05
    no_decay: tuple[str, ...] | None = None
    clip_grad: float | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = 0.5
    color_jitter: float = 0.3
    aa: str = "rand-m9-mstd0.5-inc1"
    reprob: float = 0.25
    train_interpolation: str = "bicubic"
    aug_repeats: int = 1
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    model_ema: bool = False
    model_ema_decay: float = 0.9999
    model_ema_warmup: bool = False
    distill_teacher: str | None = None
    distill_checkpoint: str | None = None
    distill: str = "hard"
    distill_weight: float = 0.5
    distill_temperature: float = 1.0
    distill_tokens: float = 0.0
    mesa: float = 0.0
    mesa_start_epoch: int = 0
    prune: dict[str, Any] | None = None
    amp: bool = False
    amp_dtype: str = "bfloat16"
    seed: int = 42

    def __post_init__(self) -> None:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"train: expected fewer warm-up epochs than epochs, got {self.warmup_epochs} of {self.epochs}"
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"train: expected 0 < scale[0] <= scale[1] <= 1, got {self.scale[0]} and {self.scale[1]}")
        if self.mesa > 0 and not self.model_ema:
            raise ValueError(f"train: expected --model-ema for --mesa {self.mesa:g}, which learns from it, got none")
        if self.distill_tokens > 0 and (self.distill_teacher != DENSE or self.prune is None):
            given = "no schedule" if self.prune is None else "a schedule"
            raise ValueError(
                f"train: expected --prune and --distill-teacher {DENSE} for --distill-tokens, which compares what is "
                f"left to the whole, got {given} and {self.distill_teacher}"
            )
        if self.distill_checkpoint is not None and self.distill_teacher is None:
            raise ValueError(
                f"train: expected --distill-teacher NAME for the weights in {self.distill_checkpoint}, got none"
            )

    @property
    def mixes_pairs(self) -> bool:
        """Whether images are mixed in pairs, of which a batch must then consist."""
        return self.mixup > 0 or self.cutmix > 0


# The embedded digits: small grey images that must not be mirrored, and too few for strong augmentation.
DIGITS = Recipe(
    model="test_vim",
    model_kwargs={"patch_size": 4, "d_state": 4},
    in_chans=1,
    img_size=(16, 16),
    mean=(0.305,),
    std=(0.376,),
    crop_pct=1.0,
    batch_size=32,
    epochs=15,
    lr=3e-3,
    warmup_epochs=2,
    scale=(0.75, 1.0),
    hflip=0.0,
    color_jitter=0.0,
    aa="",
    reprob=0.0,
    mixup=0.0,
    cutmix=0.0,
    model_ema=True,
    model_ema_decay=0.99,
    model_ema_warmup=True,
)
