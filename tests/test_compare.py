"""``vssm compare``: accuracy of groups of runs, their paired difference, and the picture of both."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from image_folders import make_folder
from vssm.cli import main
from vssm.engine.compare import curve_of, difference_within_runs, group_records, paired_difference
from vssm.engine.recipe import Recipe
from vssm.engine.train import train
from vssm.engine.training_setup import Setting

RECIPE = Recipe(
    model="test_vim",
    model_kwargs={"embed_dim": 8, "depth": 1, "patch_size": 8, "d_state": 1},
    in_chans=1,
    img_size=(16, 16),
    batch_size=4,
    warmup_epochs=0,
)


def hits(*shares: float, images: int = 400) -> np.ndarray:
    """Runs that are right on so many of the images, always the first ones."""
    return np.stack([np.arange(images) < share * images for share in shares])


def test_a_difference_of_runs_on_the_same_images_is_surer_than_of_others():
    better, worse = hits(0.75), hits(0.70)
    paired = paired_difference(better, worse)
    assert paired.points == pytest.approx(5)
    # Of 400 images 20 differ, all to one side: the deviation of their share is sqrt(0.05 * 0.95 / 400).
    assert (paired.high - paired.low) / 2 == pytest.approx(100 * 1.96 * (0.05 * 0.95 / 400) ** 0.5, rel=0.1)
    unpaired = paired_difference(better, worse[:, ::-1])
    assert unpaired.low < 0 < paired.low


def test_runs_that_differ_make_it_less_sure():
    same, other = hits(0.7, 0.7, 0.7), hits(0.6, 0.7, 0.8)
    assert paired_difference(same, same) == (0, 0, 0)
    spread = paired_difference(other, same)
    assert spread.points == pytest.approx(0, abs=1e-9)
    assert spread.low < -5
    assert spread.high > 5


def test_a_treatment_of_the_same_runs_is_surer_than_other_runs():
    before, after = hits(0.6, 0.7, 0.8), hits(0.65, 0.75, 0.85)
    within, apart = difference_within_runs(after, before), paired_difference(after, before)
    assert within.points == apart.points == pytest.approx(5)
    # Every run gains at 20 of 400 images, at others each: the deviation of the mean of three drawn with replacement,
    # by images that may be drawn for several of them, lies between that of one run and that of three apart.
    half, of_one = (within.high - within.low) / 2, 100 * 1.96 * (0.05 * 0.95 / 400) ** 0.5
    assert of_one / 3**0.5 < half < of_one < (apart.high - apart.low) / 2
    assert difference_within_runs(before, before) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"expected the same runs and images, got \(3, 400\) and \(2, 400\)"):
        difference_within_runs(before, hits(0.5, 0.6))


def test_groups_are_compared_with_the_first():
    first, second = group_records({"a": list(hits(0.5, 0.6)), "b": list(hits(0.9))})
    assert (first["top1"], first["runs"], first["images"]) == (pytest.approx(55), 2, 400)
    assert first["top1_of_runs"] == pytest.approx([50, 60])
    assert "difference" not in first
    assert second["difference"] == pytest.approx(35)
    assert second["difference_low"] < 35 < second["difference_high"]


def test_other_images_are_refused():
    with pytest.raises(ValueError, match="expected the same images, got 400 and 300"):
        paired_difference(hits(0.5), hits(0.5, images=300))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, list[Path]]:
    """A data set, and two runs of two epochs and one of one."""
    folder = tmp_path_factory.mktemp("compare")
    data = make_folder(folder / "data", train=4, val=6)
    outputs = [folder / name for name in ("a1", "a2", "b1")]
    for seed, (output, epochs) in enumerate(zip(outputs, (2, 2, 1), strict=True)):
        setting = Setting(output=output, data_dir=data, device=torch.device("cpu"))
        train(replace(RECIPE, seed=seed, epochs=epochs), setting)
    return data, outputs


def test_runs_are_evaluated_and_drawn(runs, tmp_path, capsys):
    data, (a1, a2, b1) = runs
    results, plot = tmp_path / "results.json", tmp_path / "curves.png"
    groups = [f"long={a1},{a2}", f"short={b1}"]
    command = ["compare", *groups, "--data", str(data), "--device", "cpu", "--results", str(results)]
    assert main([*command, "--plot", str(plot)]) == 0
    assert "difference_low" in capsys.readouterr().out
    long, short = json.loads(results.read_text())
    for record, folders in ((long, (a1, a2)), (short, (b1,))):
        accuracies = [json.loads((folder / "record.json").read_text()) for folder in folders]
        own = [each[0]["top1"] if isinstance(each, list) else each["top1"] for each in accuracies]
        assert record["top1_of_runs"] == pytest.approx(own)
    assert (long["epochs"], short["epochs"], long["model"], long["data"]) == (2, 1, "test_vim", "data")
    assert plot.stat().st_size > 10_000
    assert curve_of([a1, a2, b1]).epochs == [1]


def test_what_is_no_run_is_refused(runs, tmp_path, capsys):
    _, (a1, *_) = runs
    for groups, message in (
        ([str(a1)], "expected NAME=RUN,RUN"),
        ([f"a={tmp_path}"], "expected folders with final.safetensors"),
        ([f"a={a1}", f"a={a1}"], "expected a name for each group, got one twice"),
    ):
        assert main(["compare", *groups]) == 2
        assert message in capsys.readouterr().err
