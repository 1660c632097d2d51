"""The demonstration: a small Vim learns the embedded digits and names digits that it has not seen."""

from pathlib import Path
from typing import Any

import torch

from vssm.data import LabelledImages, open_digits
from vssm.engine.checkpoints import state_files
from vssm.engine.classifier import load
from vssm.engine.contact_sheet import draw_contact_sheet
from vssm.engine.evaluate import validate
from vssm.engine.predict import predict
from vssm.engine.recipe import DIGITS
from vssm.engine.records import write_results
from vssm.engine.train import train
from vssm.engine.training_setup import Setting

_SHEET = 64  # images on the picture
_FILES_PER_DIGIT = 2
_WRITTEN = (
    "log.csv",
    "best.safetensors",
    "best.json",
    "final.safetensors",
    "final.json",
    "curves.png",
    "record.json",
    "predictions.png",
    "predictions.json",
)


def clear(output: Path) -> bool:
    """Removes what an earlier demonstration has left in a folder, and nothing else; returns whether there was any."""
    old = [output / name for name in _WRITTEN if (output / name).is_file()]
    for file in [*old, *state_files(output), *(output / "images").glob("*/digit-*.png")]:
        file.unlink()
    return bool(old)


def train_on_digits(output: Path) -> dict[str, Any]:
    """Trains with the default settings of the digits on the CPU; returns the record of training."""
    return train(DIGITS, Setting(None, output, torch.device("cpu")))


def evaluate_and_predict(output: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Reads the trained weights back, evaluates them and predicts every held-out image.

    Writes the picture ``predictions.png``, with the wrong ones first, ``predictions.json``, some held-out images as
    files in ``images``, and the completed ``record.json``.

    Args:
        output: Folder of the training run.
        record: Record of training.

    Returns:
        The record with ``held_out`` (from `validate`), ``examples`` (predictions of single images) and ``wrong``.
    """
    device = torch.device("cpu")
    classifier = load(output / "final.safetensors")
    held_out = validate(classifier, None, device=device)
    images = open_digits("val")
    predictions = predict(classifier, images, device=device)
    wrong = [each for each in predictions if not each["correct"]]
    right = [each for each in predictions if each["correct"]]
    shown = [*wrong, *right][:_SHEET]
    title = f"{len(images)} held-out digits, {held_out['top1']:.1f} % right; {len(wrong)} wrong ones in red"
    draw_contact_sheet(output / "predictions.png", images, shown, title=title)
    write_results(output / "predictions.json", predictions)
    _write_images(output / "images", images)
    complete = {**record, "held_out": held_out, "wrong": wrong, "examples": [right[0], right[-1], *wrong[:1]]}
    write_results(output / "record.json", [complete])
    return complete


def _write_images(folder: Path, images: LabelledImages) -> None:
    """Writes the first held-out images of every digit as files, in class folders."""
    for target, name in enumerate(images.classes):
        chosen = [index for index, each in enumerate(images.targets) if each == target][:_FILES_PER_DIGIT]
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in chosen:
            number = images.name(index).rpartition("/")[2]
            images.load(index, channels=1).save(folder / name / f"digit-{number}.png")
