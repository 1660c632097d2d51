"""Train a small Vim on real digits, and show what it sees (some minutes)."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from vssm.data import open_digits
from vssm.engine.demo import clear, evaluate_and_predict, train_on_digits
from vssm.engine.recipe import DIGITS

_REQUIRED = 97.0  # percent of the held-out images
_BAR = 30  # characters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument("--output", type=Path, default=Path("output/demo"), metavar="DIR", help="folder to write into")


def run(args: argparse.Namespace) -> int:
    """Trains, evaluates, predicts, and says what it does; fails if the model has not learnt."""
    logging.basicConfig(level=logging.INFO, format="   %(message)s")
    output = args.output
    train, held_out = open_digits("train"), open_digits("val")
    print(f"1. The data: {len(train)} scanned handwritten digits to learn from, {len(held_out)} others held out.")
    if clear(output):
        print(f"   {output} holds an earlier demonstration: its files are replaced.")
    print(f"2. Training {DIGITS.model}, a small Vim, for {DIGITS.epochs} epochs; this takes a minute or two.")
    record = train_on_digits(output)
    print(f"   It took {record['seconds']:.0f} s.")
    print("3. Reading the weights back, and asking for every digit that was held out.")
    record = evaluate_and_predict(output, record)
    metrics = record["held_out"]
    print(f"   {metrics['correct_top1']} of {metrics['images']} are right: {metrics['top1']:.2f} %.")
    print("4. Single digits, the five most probable classes of each:")
    for example in record["examples"]:
        _show(example)
    _show_files(output)
    if metrics["top1"] < _REQUIRED:
        raise ValueError(
            f"expected at least {_REQUIRED:.0f} % of the held-out digits right, got {metrics['top1']:.2f} %"
        )
    return 0


def _show(example: dict[str, Any]) -> None:
    verdict = "right" if example["correct"] else "wrong"
    print(f"   {example['image']}, in truth a {example['true']} ({verdict}):")
    for each in example["predictions"]:
        bar = "#" * round(_BAR * each["probability"])
        print(f"     {each['class']}  {each['probability']:7.2%}  {bar}".rstrip())


def _show_files(output: Path) -> None:
    weights = output / "final.safetensors"
    print(f"5. To look at: {output / 'predictions.png'} (digits with their predictions, wrong ones first, in red),")
    print(f"   {output / 'curves.png'} (loss and accuracy), {output / 'record.json'} (settings, versions, results).")
    command = _command()
    print(f"   To try: {command} predict {output / 'images'} --checkpoint {weights}")
    print(f"           {command} validate --checkpoint {weights}")


def _command() -> str:
    """What to type for vssm from here, where the environment may not be activated: .venv/bin/vssm after make demo."""
    script = Path(sys.executable).with_name("vssm")
    return str(script.relative_to(Path.cwd())) if script.is_relative_to(Path.cwd()) and script.is_file() else "vssm"
