"""All that changes in the course of training, and how it becomes plain values and comes back."""

import logging
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from vssm.engine.distillation import TokenWatch
from vssm.engine.distributed import cut_like, share, whole
from vssm.pruning import TokenReducer

_logger = logging.getLogger(__name__)


@dataclass
class EpochSums:
    """Sums over the steps of an epoch so far, over all processes.

    Args:
        loss: Of all images, in nats.
        images: Number of images.
        steps: Number of steps.
        grad_norm: Norms of the gradients before clipping, where they are clipped.
        seconds: Time taken.
        waiting: Part of that in which the next batch was not there yet.
    """

    loss: float = 0.0
    images: int = 0
    steps: int = 0
    grad_norm: float | Tensor = 0.0
    seconds: float = 0.0
    waiting: float = 0.0

    def as_dict(self) -> dict[str, float | int]:
        """The sums as plain numbers."""
        return asdict(self) | {"grad_norm": float(self.grad_norm)}


@dataclass
class TrainingState:
    """What `vssm.engine.checkpoints` keeps of a run.

    Random numbers are not among it: they are functions of the run's seed and the step. The learning rate is not
    either, a function of the step.

    Args:
        model: The model.
        optimizer: Its optimizer.
        scheduler: Sets the optimizer's learning rate.
        scaler: Scaler of the loss for float16; disabled for other types.
        steps_per_epoch: Steps that make up an epoch.
        ema: Moving average of the weights, if there is one.
        reducers: Of the tokens of the model and of its moving average, where they are reduced.
        watch: Keeps the model's last tokens, where they are compared to a teacher's.
        step: Steps done, since the first epoch.
        sums: Of the epoch that is under way.
        history: One record per epoch done.
        best: Accuracy and negated loss of the best epoch.
        seconds: Time that the epochs done have taken.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    steps_per_epoch: int
    ema: ModelEmaV3 | None = None
    reducers: tuple[TokenReducer, ...] = ()
    watch: TokenWatch | None = None
    step: int = 0
    sums: EpochSums = field(default_factory=EpochSums)
    history: list[dict[str, float | int]] = field(default_factory=list)
    best: tuple[float, float] = (-1.0, 0.0)

    @property
    def epoch(self) -> int:
        """Epochs done, evaluation included."""
        return len(self.history)

    @property
    def step_in_epoch(self) -> int:
        """Steps done of the epoch that is under way."""
        return self.step - self.epoch * self.steps_per_epoch

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and kept: the moving average, if there is one."""
        return self.model if self.ema is None else self.ema.module

    def reducing(self) -> ExitStack:
        """Context in which model and moving average compute on fewer tokens, where they are to."""
        with ExitStack() as stack:
            for reducer in self.reducers:
                stack.enter_context(reducer)
            return stack.pop_all()

    def state_dict(self) -> dict[str, Any]:
        """The state in values and whole tensors on the CPU; all processes must take part."""
        return {
            "model": whole(dict(self.model.state_dict())),
            "model_ema": None if self.ema is None else whole(dict(self.ema.module.state_dict())),
            "optimizer": whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "sums": self.sums.as_dict(),
            "history": self.history,
            "best": list(self.best),
            "ranks": share().ranks,
        }

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        """Takes over a state; raises ValueError if it belongs to another model or optimizer."""
        if (stored["model_ema"] is None) != (self.ema is None):
            have = "no" if stored["model_ema"] is None else "a"
            raise ValueError(
                f"resume: the stored run has {have} moving average of weights; --model-ema must stay the same"
            )
        try:
            _load_weights(self.model, stored["model"])
            if self.ema is not None:
                _load_weights(self.ema.module, stored["model_ema"])
            _load_optimizer(self.optimizer, stored["optimizer"])
            self.scaler.load_state_dict(stored["scaler"])
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"resume: the stored run is of another model or optimizer ({reason})") from error
        self.history, self.best = stored["history"], tuple(stored["best"])
        self.sums = EpochSums(**stored["sums"])
        self.step = self._place_of(stored)
        self.scheduler.step_update(self.step)
        if stored["ranks"] != share().ranks:
            _logger.warning(
                "resumed with %d processes after %d: order and augmentation of the images stay as they were; dropout, "
                "stochastic depth, the pairs of mixup and the rounding of sums differ from here on",
                share().ranks,
                stored["ranks"],
            )

    def _place_of(self, stored: dict[str, Any]) -> int:
        """The number of steps done, in steps of this run."""
        before, now = stored["steps_per_epoch"], self.steps_per_epoch
        if before == now:
            return stored["step"]
        _logger.warning(
            "an epoch had %d steps and now has %d: training goes on at the same part of its epoch", before, now
        )
        return round(stored["step"] / before * now)


def _load_weights(model: nn.Module, stored: dict[str, Tensor]) -> None:
    own = model.state_dict()
    model.load_state_dict(
        {name: cut_like(value, own[name]) if name in own else value for name, value in stored.items()}
    )


def _load_optimizer(optimizer: Optimizer, stored: dict[str, Any]) -> None:
    """Takes over the state of an optimizer, in which parameters are numbered through all groups."""
    parameters = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    state = {
        number: {name: cut_like(value, parameters[number]) for name, value in values.items()}
        for number, values in stored["state"].items()
        if number < len(parameters)
    }
    optimizer.load_state_dict({**stored, "state": state})
