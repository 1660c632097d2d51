"""What a run learns besides labels: what a teacher predicts, and what the moving average of its own weights does."""

from dataclasses import replace
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from vssm.data.loaders import InputConfig
from vssm.engine import classifier as classifiers
from vssm.engine.classifier import Classifier, ModelSpec
from vssm.engine.recipe import DENSE, Recipe


class TokenWatch:
    """Keeps the last tokens of a backbone of this package, as its last norm gives them out, for one to take them.

    Args:
        model: The backbone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tokens: Tensor | None = None
        model.get_submodule("norm").register_forward_hook(self._keep)

    def _keep(self, norm: nn.Module, args: tuple, tokens: Tensor) -> None:
        self._tokens = tokens

    def take(self) -> Tensor:
        """The tokens (b, l, c) of the last forward pass; they are not kept any longer."""
        tokens, self._tokens = self._tokens, None
        assert tokens is not None, "every forward pass calls the norm"
        return tokens.flatten(1, -2)


class Teacher:
    """A frozen model that is asked about the images of a run.

    Args:
        classifier: The model and its input.
        images: The run's input, whose normalisation is changed to the model's where they differ.
        device: Where to compute.
        memory_format: Layout of images.
        watch_tokens: Whether it is asked for its last tokens, too.
    """

    def __init__(
        self,
        classifier: Classifier,
        images: InputConfig,
        *,
        device: torch.device,
        memory_format: torch.memory_format,
        watch_tokens: bool = False,
    ) -> None:
        model = classifier.model.to(device)
        self.model = model.to(memory_format=memory_format).eval().requires_grad_(False)  # pyright: ignore[reportCallIssue]
        mean, std, own_mean, own_std = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (images.mean, images.std, classifier.config.mean, classifier.config.std)
        )
        self._scale, self._shift = std / own_std, (mean - own_mean) / own_std
        self._watch = TokenWatch(self.model) if watch_tokens else None

    @torch.no_grad()
    def ask(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (b, num_classes) of normalised images (b, c, h, w), and last tokens (b, l, c) if asked for."""
        logits = self.model(images * self._scale + self._shift).float()
        return logits, None if self._watch is None else self._watch.take().float()


class Guides(NamedTuple):
    """What other models say of the images of a batch, in tensors without gradients; None where they are not asked.

    Args:
        teacher: Logits (b, num_classes) of the teacher.
        tokens: Its last tokens, (b, l, c).
        average: Logits (b, num_classes) of the moving average of the weights.
    """

    teacher: Tensor | None = None
    tokens: Tensor | None = None
    average: Tensor | None = None


def open_teacher(
    recipe: Recipe, student: Classifier, *, device: torch.device, memory_format: torch.memory_format
) -> Teacher | None:
    """Builds the teacher that a recipe names, with published weights or those of a file; None if it names none.

    Args:
        recipe: Of the run.
        student: What is to learn.
        device: Where to compute.
        memory_format: Layout of images.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Teacher and student do not have the same classes, or the weights are those of another model.
    """
    if recipe.distill_teacher is None:
        return None
    teacher = _dense(recipe, student) if recipe.distill_teacher == DENSE else _another(recipe, student)
    _check_count(recipe, teacher.spec.num_classes, student)
    _check_names(recipe, teacher, student)
    watch = recipe.distill_tokens > 0
    return Teacher(teacher, student.config, device=device, memory_format=memory_format, watch_tokens=watch)


def _dense(recipe: Recipe, student: Classifier) -> Classifier:
    """The model itself, as it is before training."""
    path = recipe.distill_checkpoint
    if path is None and not recipe.pretrained:
        raise ValueError(
            f"train: expected weights for --distill-teacher {DENSE}, the model before training: "
            "--initial-checkpoint FILE or --pretrained, got neither"
        )
    teacher = classifiers.build(replace(student.spec, pretrained=path is None))
    if path is not None:
        try:
            classifiers.load_initial(teacher, path, new_head=False)
        except ValueError as error:
            raise _unsuited(recipe, error) from error
    return teacher


def _another(recipe: Recipe, student: Classifier) -> Classifier:
    """The model that the recipe names, with published weights or those of a file."""
    spec, path = student.spec, recipe.distill_checkpoint
    images = {"in_chans": spec.in_chans, "img_size": spec.img_size}
    assert recipe.distill_teacher is not None, "asked for a teacher"
    if path is None:
        published = timm.get_pretrained_cfg(recipe.distill_teacher)
        if published is not None:
            _check_count(recipe, published.num_classes, student)  # before hundreds of megabytes are downloaded
        return classifiers.build(ModelSpec(model=recipe.distill_teacher, pretrained=True).with_options(images))
    described = classifiers.read_description(path) is not None
    options = images if described else {"num_classes": spec.num_classes, **images}
    try:
        return classifiers.load(path, model=recipe.distill_teacher, options=options)
    except ValueError as error:
        raise _unsuited(recipe, error) from error


def _unsuited(recipe: Recipe, error: ValueError) -> ValueError:
    return ValueError(f"train: {recipe.distill_checkpoint} does not suit the teacher {recipe.distill_teacher}: {error}")


def _check_count(recipe: Recipe, theirs: int | None, student: Classifier) -> None:
    ours = student.spec.num_classes
    if theirs != ours:
        raise ValueError(
            f"train: expected a teacher of {ours} classes, as many as {recipe.model} learns, got "
            f"{recipe.distill_teacher} with {theirs}"
        )


def _check_names(recipe: Recipe, teacher: Classifier, student: Classifier) -> None:
    names = teacher.data_classes
    if names is not None and student.data_classes is not None and names != student.data_classes:
        first = next(pair for pair in zip(names, student.data_classes, strict=False) if pair[0] != pair[1])
        raise ValueError(
            f"train: expected a teacher of the data's classes in their order, got {recipe.distill_teacher}, which "
            f"calls {first[0]!r} what the data call {first[1]!r}"
        )


def sum_of_losses(
    recipe: Recipe,
    outputs: Tensor | tuple[Tensor, Tensor],
    *,
    targets: Tensor,
    guides: Guides,
    tokens: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The loss of a batch, summed over its images: (1 − w)·CE(labels) + w·D(teacher) + m·CE(moving average) + v·MSE.

    w is the weight of the teacher and 0 without one, D is `hard_distillation` or `soft_distillation`, m the weight of
    the moving average, and v that of tokens.

    Args:
        recipe: Says which terms there are, and how much they weigh.
        outputs: Logits (b, num_classes) of the model; of one with two classifiers those of either, of which the first
            learns from labels, the second from the teacher, and their mean from the moving average.
        targets: Class probabilities (b, num_classes); an image all of whose are 0 adds nothing.
        guides: What the others say.
        tokens: Tokens (b, t, c) of the model and of the teacher, if they are compared.

    Returns:
        The sum, in nats.
    """
    for_labels, for_teacher = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    loss = cross_entropy(for_labels, targets, reduction="sum")
    counts = targets.sum(1) > 0
    if guides.teacher is not None:
        losses = (
            hard_distillation(for_teacher, guides.teacher)
            if recipe.distill == "hard"
            else soft_distillation(for_teacher, guides.teacher, temperature=recipe.distill_temperature)
        )
        loss = (1 - recipe.distill_weight) * loss + recipe.distill_weight * (losses * counts).sum()
    if guides.average is not None:
        answer = (for_labels + for_teacher) / 2
        loss = loss + recipe.mesa * (self_distillation(answer, guides.average) * counts).sum()
    if tokens is not None:
        loss = loss + recipe.distill_tokens * (token_distillation(*tokens) * counts).sum()
    return loss


def hard_distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy (b,) to the class that a teacher with these logits (b, num_classes) finds most probable.

    Reference:
        Touvron et al., "Training data-efficient image transformers", ICML 2021, equation 3,
        https://arxiv.org/abs/2012.12877
    """
    losses = cross_entropy(logits.to(teacher.dtype), teacher.argmax(1), reduction="none")
    return losses.masked_fill(~teacher.isfinite().all(1), float("nan"))  # argmax hides what is not a number


def soft_distillation(logits: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """T²·KL(softmax(teacher / T) ‖ softmax(logits / T)), (b,), of logits (b, num_classes) and a temperature T.

    Reference:
        Touvron et al., 2021, equation 2, https://arxiv.org/abs/2012.12877. Their code divides by the number of classes,
        too.
    """
    ours, theirs = (log_softmax(each / temperature, dim=1) for each in (logits.to(teacher.dtype), teacher))
    return temperature**2 * kl_div(ours, theirs, reduction="none", log_target=True).sum(1)


def self_distillation(logits: Tensor, average: Tensor) -> Tensor:
    """Cross-entropy (b,) to the softmax of the moving average's logits (b, num_classes).

    Reference:
        Du et al., "Sharpness-Aware Training for Free" (MESA), NeurIPS 2022, https://arxiv.org/abs/2205.14083; without
        its temperature, as A2Mamba is trained, https://arxiv.org/abs/2507.16624
    """
    return cross_entropy(logits.to(average.dtype), average.softmax(1), reduction="none")


def token_distillation(tokens: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference (b,) between tokens (b, t, c) and a teacher's.

    Reference:
        Rao et al., "DynamicViT", NeurIPS 2021, section 3.3, https://arxiv.org/abs/2106.02034
    """
    return (tokens.to(teacher.dtype) - teacher).square().mean((1, 2))


def learns_by_head(model: nn.Module) -> bool:
    """Whether a model has a classifier for a teacher beside that for labels, as timm's distilled models have."""
    return hasattr(model, "set_distilled_training")
