"""The study of token reduction: what it evaluates and trains, what it does not do twice, and what it says of it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from image_folders import make_folder
from vssm.cli import main
from vssm.engine import pruning_study
from vssm.engine.classifier import load
from vssm.engine.compare import difference_within_runs
from vssm.engine.evaluate import validate
from vssm.engine.jobs import Job
from vssm.engine.prune import grid_of
from vssm.engine.pruning_study import Evaluations, Study, records_of, train_on, variants_of, weights_of
from vssm.engine.pruning_study_plot import draw_study
from vssm.engine.recipe import Recipe
from vssm.engine.train import train
from vssm.engine.training_setup import Setting
from vssm.pruning import Schedule

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
RECIPE = Recipe(
    model="test_vim",
    model_kwargs={"embed_dim": 8, "depth": 3, "patch_size": 4, "d_state": 1},
    img_size=(16, 16),
    batch_size=8,
    epochs=1,
    warmup_epochs=0,
    lr=1e-2,
    mixup=0.0,
    cutmix=0.0,
    aa="",
)
FURTHER = "{batch-size: 8, warmup-epochs: 0, lr: 0.01, aa: none, mixup: 0, cutmix: 0, distill: soft}"
CONVOLVED = [("decay", None), ("decay", "compact"), ("none", None)]
BASE = Schedule("test_vim", after=(1, 2))


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> tuple[Path, list[Path]]:
    """A data set, and two runs."""
    folder = tmp_path_factory.mktemp("study")
    data = make_folder(folder / "data", train=8, val=10)
    runs = [folder / f"dense-{seed}" for seed in (1, 2)]
    for seed, run in enumerate(runs, start=1):
        train(replace(RECIPE, seed=seed), Setting(data, run, CPU))
    return data, runs


@pytest.fixture
def study(dense, tmp_path) -> Study:
    data, runs = dense
    recipe = tmp_path / "further.yaml"
    recipe.write_text(FURTHER)
    return Study(
        data_dir=data,
        dense=tuple(map(weights_of, runs)),
        folder=tmp_path / "study",
        recipe=recipe,
        epochs=1,
        schedules=tuple(grid_of(BASE, keeps=(0.5,), aligns=("decay", "none"))),
        device=CPU,
    )


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Names of runs, which this process does itself: to start another takes longer than the run."""
    names = []

    def run_jobs(jobs: list[Job], *, at_once, stop, ended) -> dict[str, str]:
        for job in jobs:
            assert job.done() == 0
            assert main(list(job.command[3:])) == 0
            assert job.done() == job.steps == 1
            names.append(job.name)
            ended(job)
        return {}

    monkeypatch.setattr(pruning_study, "run_jobs", run_jobs)
    return names


def test_records_are_those_of_the_runs(study, trained, tmp_path):
    variants, evaluations = variants_of(study), Evaluations(study)
    assert [each.name for each in variants] == ["dense", "top_decay_0.5", "top_none_0.5"]
    train_on(study, variants, at_once=1, workers=0)
    assert trained == [f"{each.name}-{number}" for number in (1, 2) for each in variants]
    records = records_of(study, variants, evaluations)
    assert [(each["policy"], each.get("align"), each["epochs"]) for each in records] == [
        *((None, None, 0), ("top", "decay", 0), ("top", "none", 0)),
        *((None, None, 1), ("top", "decay", 1), ("top", "none", 1)),
    ]
    for variant, as_it_is, further in zip(variants, records[:3], records[3:], strict=True):
        expected = []
        for weights in study.dense:
            classifier = load(weights)
            if variant.schedule is None:
                expected.append(validate(classifier, study.data_dir, device=CPU)["top1"])
            else:
                with variant.schedule.reducer(classifier.model):
                    expected.append(validate(classifier, study.data_dir, device=CPU)["top1"])
        assert as_it_is["top1_of_seeds"] == expected
        runs = [study.folder / "runs" / f"{variant.name}-{number}" for number in (1, 2)]
        said = [json.loads((run / "record.json").read_text())[0] for run in runs]
        assert further["top1_of_seeds"] == [each["top1"] for each in said]
        assert [each["recipe"]["seed"] for each in said] == further["seeds"] == [1, 2]
        assert {each["recipe"]["distill_teacher"] for each in said} == {"dense"}
        assert (said[0]["recipe"]["prune"] or {}).get("align") == further.get("align")
    assert records[1]["over_dense"] == records[4]["over_dense"] < 0.8
    draw_study(tmp_path / "study.png", records)
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_differences_are_paired_by_seed(study):
    variants, evaluations = variants_of(study), Evaluations(study)
    random = np.random.default_rng(0)
    hits = {each.name: random.random((2, 20)) < share for each, share in zip(variants, (0.9, 0.7, 0.5), strict=True)}
    (study.folder / "hits").mkdir(parents=True)
    for name, runs in hits.items():
        for number, run in enumerate(runs, start=1):
            np.save(study.folder / "hits" / f"{name}-{number}-as_is.npy", run)
    np.save(study.folder / "hits" / "top_decay_0.5-2-trained.npy", hits["dense"][0])
    dense, decay, none, further = records_of(study, variants, evaluations)
    assert "difference" not in dense
    for record, name, other in (
        (decay, "difference", hits["dense"]),
        (decay, "over_none", hits["top_none_0.5"]),
    ):
        expected = difference_within_runs(hits["top_decay_0.5"], other)
        assert (record[name], record[f"{name}_low"], record[f"{name}_high"]) == expected
    assert "over_none" not in none
    assert further["seeds"] == [2]  # the other is not there yet, and nothing of it is compared
    assert further["difference"] == pytest.approx(100 * (hits["dense"][0].mean() - hits["dense"][1].mean()))
    assert "over_none" not in further


def test_nothing_is_done_twice(study, trained, monkeypatch):
    variants = variants_of(study)
    first = Evaluations(study)
    first.all_as_they_are(variants)
    train_on(study, variants, at_once=1, workers=0, ended=lambda *which: first.hits(*which, trained=True))
    before, count = records_of(study, variants, first), len(trained)
    monkeypatch.setattr(pruning_study, "evaluate", None)
    train_on(study, variants, at_once=1, workers=0)
    assert len(trained) == count == 6
    assert records_of(study, variants, Evaluations(study)) == before


def test_schedules_that_do_not_suit_are_left_out(study, caplog):
    schedules = grid_of(BASE, keeps=(0.5, 0.3), policies=("top", "merge"), aligns=("none",))
    variants = variants_of(replace(study, schedules=tuple(schedules)))
    assert [each.name for each in variants] == ["dense", "top_none_0.5", "top_none_0.3", "merge_none_0.5"]
    assert "left out merge with none and 0.3: TokenReducer: " in caplog.text
    with pytest.raises(ValueError, match="none of 1 schedules suits test_vim"):
        variants_of(replace(study, schedules=(Schedule("test_vim", after=(9,), keep=0.5),)))


def test_convolutions_are_part_of_a_way_to_align(study):
    schedules = [replace(BASE, keep=0.5, align=align, conv=conv) for align, conv in CONVOLVED]
    variants = variants_of(replace(study, schedules=tuple(schedules)))
    assert [each.name for each in variants[1:]] == ["top_decay_0.5", "top_decay-compact_0.5", "top_none_0.5"]
    assert [each.unaligned for each in variants] == [None, "top_none_0.5", "top_none_0.5", None]
    evaluations = Evaluations(study)
    (study.folder / "hits").mkdir(parents=True)
    for name in ("dense", "top_decay_0.5", "top_decay-compact_0.5", "top_none_0.5"):
        for number in (1, 2):
            np.save(study.folder / "hits" / f"{name}-{number}-as_is.npy", np.arange(20) < 10 + len(name) % 7)
    records = records_of(replace(study, epochs=0), variants, evaluations)
    assert [(each.get("align"), each.get("conv"), each.get("over_none")) for each in records] == [
        (None, None, None),
        ("decay", None, pytest.approx(5)),
        ("decay", "compact", pytest.approx(-25)),
        ("none", None, None),
    ]


def test_folder_of_another_study_is_refused(study):
    study.claim()
    study.claim()
    with pytest.raises(ValueError, match="holds a study of another epochs; name a new folder"):
        replace(study, epochs=2).claim()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder with final\.safetensors"):
        weights_of(tmp_path)


def test_recipe_augments_as_the_first_training_does():
    first, further = (
        yaml.safe_load((ROOT / "configs/small" / f"images_64{end}.yaml").read_text()) for end in ("", "_fewer_tokens")
    )
    same = ("img-size", "crop-pct", "batch-size", "scale", "hflip", "color-jitter", "smoothing", "amp")
    assert [further[name] for name in same] == [first[name] for name in same]
    assert float(further["lr"]) < float(first["lr"])


@pytest.mark.slow
def test_tool_goes_on_where_its_limit_has_ended_it(dense, tmp_path):
    data, runs = dense
    (tmp_path / "further.yaml").write_text(FURTHER)
    command = [sys.executable, ROOT / "tools/pruning_study.py", data, "--dense", *runs, "--after", "1", "--keep", "0.5"]
    command += ["--policy", "top", "--align", "decay:compact", "none", "--epochs", "2", "--recipe", "further.yaml"]
    command += ["--jobs", "2", "--workers", "0", "--device", "cpu", "--output", "out", "--results", "r.json"]
    lengths, said = [], []
    for more in (["--limit-s", "0"], ["--plot", "study.png"]):
        done = subprocess.run([*map(str, command), *more], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        lengths.append(len(json.loads((tmp_path / "r.json").read_text())))
        said.append("6 of 6 runs are left; the same call goes on" in done.stderr)
    assert lengths == [3, 6]
    assert said == [True, False]
    assert (tmp_path / "study.png").is_file()
    assert "over_none_low" in done.stdout
