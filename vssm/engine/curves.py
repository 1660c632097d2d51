"""Curves of a training run: loss and accuracy over the epochs."""

import os
from collections.abc import Sequence

from vssm.engine.plot import new_figure
from vssm.files import atomic_path

_TRAINING, _HELD_OUT = "#0072B2", "#D55E00"


def draw_curves(path: str | os.PathLike, history: Sequence[dict[str, float | int]]) -> None:
    """Draws the losses and the held-out accuracy of every epoch, side by side.

    Args:
        path: Target; its suffix chooses the format.
        history: Per epoch: ``epoch``, ``train_loss``, ``val_loss``, ``val_top1``.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = new_figure(width=9.0, height=3.6)
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    style = {"marker": "o", "markersize": 3, "linewidth": 1.5}
    loss.plot(epochs, [row["train_loss"] for row in history], label="training (augmented)", color=_TRAINING, **style)
    loss.plot(epochs, [row["val_loss"] for row in history], label="held-out", color=_HELD_OUT, **style)
    loss.set(title="Loss", xlabel="epoch", ylabel="cross-entropy (nats)")
    loss.legend(frameon=False)
    accuracy.plot(epochs, [row["val_top1"] for row in history], color=_HELD_OUT, **style)
    accuracy.set(
        title=f"Held-out accuracy: {history[-1]['val_top1']:.1f} % at the end", xlabel="epoch", ylabel="top-1 (%)"
    )
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
