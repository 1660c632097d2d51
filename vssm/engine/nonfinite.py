"""Why a loss is not finite: which module was the first to give out what is not a finite number, on which batch."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vssm.engine import distributed
from vssm.engine.checkpoints import BATCH_FILE
from vssm.engine.evaluate import autocast
from vssm.engine.training_setup import Run
from vssm.engine.training_state import TrainingState
from vssm.engine.training_step import NonFiniteLoss, guides_of, seed_network
from vssm.files import atomic_path

# What guides say, by their names.
_SAID_BY = {
    "teacher": "the output of the teacher",
    "tokens": "the last tokens of the teacher",
    "average": "the output of the moving average",
}


def explain(run: Run, state: TrainingState, failure: NonFiniteLoss) -> str:
    """Keeps the batch of a failed step in the run's folder, and says what has failed first; all processes take part.

    The file holds ``images`` as the model got them, mixed and normalised, class probabilities ``targets``, ``step``
    and ``epoch``; ``torch.load`` reads it.

    Args:
        run: What does not change.
        state: The model as it was before the step.
        failure: Of the step.

    Returns:
        One line, with advice.
    """
    mine = _cause(run, state, failure.parts)
    causes = distributed.gathered((mine, _batch(state, failure.parts) if mine else None))
    cause, batch = next(((cause, batch) for cause, batch in causes if cause), (None, _batch(state, failure.parts)))
    path = run.setting.output / BATCH_FILE
    if distributed.is_main():
        with atomic_path(path) as temporary:
            torch.save(batch, temporary)
    return (
        f"train: the loss is {failure.loss} at step {state.step + 1}, in epoch {state.epoch + 1}: first, "
        f"{cause or 'the loss itself'} is not finite; the batch is kept in {path}; try a lower --lr, --clip-grad 1, "
        "or a longer --warmup-epochs (--resume starts from the last state)"
    )


def _batch(state: TrainingState, parts: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    images, targets = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
    return {"images": images, "targets": targets, "step": state.step + 1, "epoch": state.epoch + 1}


def _cause(run: Run, state: TrainingState, parts: list[tuple[Tensor, Tensor]]) -> str | None:
    """Repeats the forward pass of a step as it was, but for compilation, and looks at what every module gives out."""
    for name, parameter in state.model.named_parameters():
        if not distributed.full_tensor(parameter).isfinite().all():
            return f"the parameter {name}"
    seed_network(run, state)
    with _first_non_finite(state.model) as found, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for images, _ in parts:
            for name, said in guides_of(run, state, images)._asdict().items():
                if said is not None and not said.isfinite().all():
                    return _SAID_BY[name]
            with autocast(run.setting.device, run.amp_dtype):
                state.model(images)
    return found[0] if found else None


@contextmanager
def _first_non_finite(model: nn.Module) -> Iterator[list[str]]:
    """Watches the modules of a model inside of the block; the list gets those whose output is not finite, in order."""
    found: list[str] = []

    def hook(name: str) -> Callable:
        def look(module: nn.Module, _: object, output: object) -> None:
            if not all(each.isfinite().all() for each in _tensors(output)):
                found.append(f"the output of {name or 'the model'} ({type(module).__name__})")

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: object) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, list | tuple):
        for each in output:
            yield from _tensors(each)
