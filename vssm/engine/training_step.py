"""One step of training: mix, forward, backward, update."""

import math
from dataclasses import dataclass

import torch
from timm.utils import distribute_bn, random_seed
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from vssm.data.loaders import Batch
from vssm.data.randomness import Purpose, seed_for
from vssm.engine import distributed
from vssm.engine.distillation import Guides, sum_of_losses
from vssm.engine.evaluate import autocast
from vssm.engine.training_setup import Run
from vssm.engine.training_state import TrainingState


@dataclass(frozen=True)
class Outcome:
    """What a step has brought, over all processes.

    Args:
        loss: Sum over the images, in nats.
        images: Number of images.
        grad_norm: Norm of the gradient before clipping; 0 without clipping, or where it is not finite.
    """

    loss: float = 0.0
    images: int = 0
    grad_norm: float | Tensor = 0.0


class NonFiniteLoss(Exception):
    """The loss of a step is infinite or not a number; the model is as it was before the step.

    Args:
        loss: The loss, summed over all processes.
        parts: What this process has computed it of.
    """

    def __init__(self, loss: float, parts: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__(f"the loss is {loss}")
        self.loss = loss
        self.parts = parts


def train_step(run: Run, state: TrainingState, network: nn.Module, batch: Batch) -> Outcome:
    """Updates the model by the mean loss of a batch that all processes share.

    Random numbers are seeded by the run's seed and the step; those of the network also by the process, those of mixup
    not: every process mixes with the same weights, within its own images.

    Args:
        run: What does not change.
        state: The model and its optimizer.
        network: What to call for the model.
        batch: This process's part, possibly of no images.

    Raises:
        NonFiniteLoss: The loss is infinite or not a number.
    """
    count = len(batch.targets) - (len(batch.targets) % 2 if run.recipe.mixes_pairs else 0)
    (total,) = distributed.summed(count)
    if total == 0:
        return Outcome()
    parts = _parts(run, state, batch, count)
    state.optimizer.zero_grad()
    seed_network(run, state)
    loss = _forward_and_backward(run, state, network, parts, scale=distributed.share().ranks / total)
    (loss,) = distributed.summed(loss)
    if not math.isfinite(loss):
        raise NonFiniteLoss(loss, parts)
    return Outcome(loss, int(total), _update(run, state))


def _parts(run: Run, state: TrainingState, batch: Batch, count: int) -> list[tuple[Tensor, Tensor]]:
    """The first ``count`` images, mixed, with the probabilities of their classes, in as many parts as are asked for.

    Where files could not be read, blanks without a class, which add nothing to the loss, give every part an image:
    processes that wait for each other must not do a different number of parts.
    """
    device, accum = run.setting.device, run.recipe.accum
    images = batch.images[:count].to(device, memory_format=run.setting.memory_format, non_blocking=True)
    targets = batch.targets[:count].to(device, non_blocking=True)
    random_seed(seed_for(Purpose.MIXING, run.recipe.seed, state.step))
    images, targets = run.mix(images, targets)
    missing = max(accum - count, 0)
    if missing:
        images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        targets = torch.cat([targets, targets.new_zeros(missing, *targets.shape[1:])])
    return list(zip(images.tensor_split(accum), targets.tensor_split(accum), strict=True))


def seed_network(run: Run, state: TrainingState) -> None:
    """Seeds the generators that dropout and stochastic depth of a step draw from."""
    random_seed(seed_for(Purpose.NETWORK, run.recipe.seed, state.step, distributed.share().rank))


def _forward_and_backward(
    run: Run, state: TrainingState, network: nn.Module, parts: list[tuple[Tensor, Tensor]], *, scale: float
) -> float:
    """Adds up the gradients of all parts; returns the sum of the losses of this process's images."""
    losses = []
    for number, (images, targets) in enumerate(parts, start=1):
        with distributed.gradients_kept_apart(network, number < len(parts)):
            guides = guides_of(run, state, images)
            with autocast(run.setting.device, run.amp_dtype):
                outputs = network(images)
                tokens = _tokens(state, guides)
                loss = sum_of_losses(run.recipe, outputs, targets=targets, guides=guides, tokens=tokens)
            losses.append(_OnItsWay(loss.detach()))
            state.scaler.scale(loss * scale).backward()
    return sum(each.value() for each in losses)


def guides_of(run: Run, state: TrainingState, images: Tensor) -> Guides:
    """What teacher and moving average say of images; the teacher computes in its own precision."""
    teacher, tokens = (None, None) if run.teacher is None else run.teacher.ask(images)
    if state.ema is None or run.recipe.mesa == 0 or state.epoch < run.recipe.mesa_start_epoch:
        return Guides(teacher, tokens)
    ranks = distributed.share().ranks
    if ranks > 1:  # a run that goes on has the statistics of batch norms of the main process alone
        distribute_bn(state.ema.module, ranks, reduce=False)
    with torch.no_grad(), autocast(run.setting.device, run.amp_dtype):
        return Guides(teacher, tokens, state.ema.module(images).float())


def _tokens(state: TrainingState, guides: Guides) -> tuple[Tensor, Tensor] | None:
    """The last tokens of the model and of its teacher, if they are compared: those that the model still computes on."""
    if state.watch is None or guides.tokens is None:
        return None
    ours, theirs = state.watch.take(), guides.tokens
    left = state.reducers[0].last_map
    return (ours, theirs) if left is None else (left.gather(ours), left.gather(theirs))


class _OnItsWay:
    """A number that is copied from its device; it is there when what it comes from is computed, not what follows."""

    def __init__(self, number: Tensor) -> None:
        self._event = torch.cuda.Event() if number.is_cuda else None
        self._copy = torch.empty((), dtype=number.dtype, pin_memory=number.is_cuda)
        self._copy.copy_(number, non_blocking=number.is_cuda)
        if self._event is not None:
            self._event.record()

    def value(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return float(self._copy)


def _update(run: Run, state: TrainingState) -> float | Tensor:
    norm: float | Tensor = 0.0
    if run.recipe.clip_grad is not None:
        state.scaler.unscale_(state.optimizer)
        total = clip_grad_norm_(state.model.parameters(), run.recipe.clip_grad)
        norm = distributed.full_tensor(total).nan_to_num(nan=0.0, posinf=0.0)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return norm
