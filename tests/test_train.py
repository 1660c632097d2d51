import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from image_folders import TINY, TINY_INPUT, StopAtLook, make_folder
from vssm.cli import main
from vssm.cli import train as train_command
from vssm.cli._options import Parser
from vssm.cli.config import parse_with_config
from vssm.data.images import ImageFiles
from vssm.engine import distillation, stopping
from vssm.engine import train as train_module
from vssm.engine.checkpoints import claimed, read_state, state_files
from vssm.engine.nonfinite import explain
from vssm.engine.recipe import DIGITS, Recipe
from vssm.engine.stopping import Stopped, stop_on_signals
from vssm.engine.train import train
from vssm.engine.training_setup import SaveEvery, Setting, initial_state, prepare
from vssm.engine.training_step import NonFiniteLoss, train_step

CONFIGS = Path(__file__).parents[1] / "configs"
CPU = torch.device("cpu")
TINY_RECIPE = Recipe(
    model="test_vim",
    model_kwargs={"embed_dim": 8, "depth": 1, "patch_size": 8, "d_state": 1},
    in_chans=1,
    img_size=(16, 16),
    batch_size=8,
    epochs=4,
    warmup_epochs=1,
    drop_path=0.1,
    model_ema=True,
    model_ema_decay=0.9,
)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final.safetensors")


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path / "data")


@pytest.fixture
def failure(capsys):
    """Runs a command that must fail; returns its exit status and the one line on standard error."""

    def run(*argv: object) -> tuple[int, str]:
        status = main([str(word) for word in argv])
        lines = capsys.readouterr().err.strip().splitlines()
        assert status in (1, 2)
        assert lines[-1].startswith(f"vssm {argv[0]}: ")
        assert not [line for line in lines if "Traceback" in line]
        return status, lines[-1]

    return run


def test_train_learns_and_writes_what_it_promises(folder, tmp_path, capsys):
    output = tmp_path / "run"
    options = ["--epochs", "8", "--lr", "1e-2", "--mixup", "0", "--cutmix", "0", "--reprob", "0", "--color-jitter", "0"]
    assert main(["train", str(folder), "--output", str(output), *TINY, *options]) == 0
    names = {path.name for path in output.iterdir()}
    expected = (
        "state-00000021.pth state-00000024.pth log.csv "
        "best.safetensors best.json final.safetensors final.json record.json curves.png"
    )
    assert names == set(expected.split())
    rows = list(csv.DictReader((output / "log.csv").open()))
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, 9)]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    (record,) = json.loads((output / "record.json").read_text())
    assert record["top1"] == float(rows[-1]["val_top1"]) == 100
    assert record["recipe"]["lr"] == 0.01
    assert (record["train_images"], record["held_out_images"]) == (24, 8)
    assert "held-out top-1 100.00 %" in capsys.readouterr().out


def test_same_seed_same_weights_other_seed_other_weights(folder, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(TINY_RECIPE.with_options({"seed": seed, "epochs": 2}), Setting(folder, tmp_path / name, CPU))
    assert _same(_weights(tmp_path / "a"), _weights(tmp_path / "b"))
    assert not _same(_weights(tmp_path / "a"), _weights(tmp_path / "c"))


def _train_stopping_every(looks: int, recipe: Recipe, setting: Setting) -> dict:
    """Trains by attempts, each of which is stopped after so many looks and the next of which resumes."""
    for _ in range(100):
        resume = read_state(setting.output) if setting.output.exists() else None
        try:
            return train(recipe, setting, resume=resume, stop=StopAtLook(looks))
        except Stopped as stopped:
            last = stopped
        assert last.state == state_files(setting.output)[0]
        assert read_state(last.state)["step"] == last.step
    pytest.fail("the run does not come forward")


def _assert_same_run(first: Path, second: Path) -> None:
    assert _same(_weights(first), _weights(second))
    states = read_state(first), read_state(second)
    for part in ("model", "model_ema"):
        assert _same(states[0][part], states[1][part])
    assert not _same(states[0]["model"], states[0]["model_ema"])
    for name in ("exp_avg", "exp_avg_sq", "step"):
        moments = [[each[name] for each in state["optimizer"]["state"].values()] for state in states]
        assert all(map(torch.equal, *moments))
    timeless = [
        [{name: row[name] for name in ("step", "lr", "train_loss", "val_loss", "val_top1")} for row in state["history"]]
        for state in states
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(("looks", "workers"), [(2, 0), (5, 0), (7, 2)])
def test_run_stopped_inside_of_epochs_equals_the_uninterrupted_one(folder, tmp_path, looks, workers):
    whole, parts = Setting(folder, tmp_path / "whole", CPU), Setting(folder, tmp_path / "parts", CPU, workers)
    record = train(TINY_RECIPE, whole)
    resumed = _train_stopping_every(looks, TINY_RECIPE, parts)
    _assert_same_run(whole.output, parts.output)
    assert record["loss"] == resumed["loss"]


@pytest.mark.parametrize(("changed", "same"), [("step", False), ("seconds", True)])
def test_the_stored_step_drives_what_follows(folder, tmp_path, changed, same):
    whole, parts = Setting(folder, tmp_path / "whole", CPU), Setting(folder, tmp_path / "parts", CPU)
    train(TINY_RECIPE, whole)
    with pytest.raises(Stopped):
        train(TINY_RECIPE, parts, stop=StopAtLook(2))
    stored = read_state(parts.output)
    if changed == "step":
        stored["step"] = 1
    else:
        stored["sums"]["seconds"] = 1e3
    train(TINY_RECIPE, parts, resume=stored)
    assert _same(_weights(whole.output), _weights(parts.output)) is same


def test_steps_passed_over_are_not_read(folder, tmp_path, monkeypatch):
    setting = Setting(folder, tmp_path / "run", CPU)
    with pytest.raises(Stopped):
        train(TINY_RECIPE, setting, stop=StopAtLook(2))
    read = []
    load = ImageFiles.load
    monkeypatch.setattr(
        ImageFiles, "load", lambda images, *args, **kwargs: read.append(images.source) or load(images, *args, **kwargs)
    )
    with pytest.raises(Stopped):
        train(TINY_RECIPE, setting, resume=read_state(setting.output), stop=StopAtLook(1))
    assert read == [f"{folder}/train"] * 8  # the third and last batch of the epoch


@pytest.mark.parametrize("change", [{"accum": 3}, {"workers": 2}, {"channels_last": True}])
def test_what_only_says_how_to_compute_does_not_change_the_result(folder, tmp_path, change):
    recipe = TINY_RECIPE.with_options({"epochs": 2, "drop_path": 0.0, "aa": "rand-m9-mstd0.5-inc1"})
    setting = Setting(folder, tmp_path / "plain", CPU)
    train(recipe, setting)
    train(recipe.with_options(change), replace(setting, output=tmp_path / "changed", **_only_setting(change)))
    plain, changed = _weights(tmp_path / "plain"), _weights(tmp_path / "changed")
    if "workers" in change:
        assert _same(plain, changed)
    for name, value in plain.items():
        torch.testing.assert_close(changed[name], value, rtol=1e-4, atol=1e-5)


def _only_setting(change: dict) -> dict:
    return {name: value for name, value in change.items() if name != "accum"}


def test_resume_on_the_command_line_takes_settings_and_data_from_the_run(folder, tmp_path, failure):
    output = tmp_path / "run"
    command = ["train", str(folder), "--output", str(output), *TINY]
    assert main([*command, "--epochs", "2", "--lr", "3e-4"]) == 0
    assert failure(*command)[1] == (
        f"vssm train: {output}: the folder is not empty; name another with --output, or go on with --resume {output}"
    )
    assert main(["train", "--resume", str(output), "--epochs", "3", "--device", "cpu"]) == 0
    (record,) = json.loads((output / "record.json").read_text())
    assert (record["recipe"]["lr"], record["recipe"]["epochs"], record["train_images"]) == (3e-4, 3, 24)
    assert len(list(csv.DictReader((output / "log.csv").open()))) == 3
    assert main([*command, "--resume", "auto", "--epochs", "3"]) == 0  # there is nothing left to do


def test_resume_auto_starts_anew_where_there_is_no_run(folder, tmp_path):
    output = tmp_path / "run"
    assert main(["train", str(folder), "--output", str(output), *TINY, "--epochs", "1", "--resume", "auto"]) == 0
    assert (output / "final.safetensors").is_file()


def test_resume_of_another_model_or_of_a_damaged_file(folder, tmp_path, failure):
    output = tmp_path / "run"
    assert main(["train", str(folder), "--output", str(output), *TINY, "--epochs", "1"]) == 0
    assert "another model or optimizer" in failure("train", "--resume", output, "--model-kwargs", "embed_dim=16")[1]
    (state,) = state_files(output)
    state.write_bytes(state.read_bytes()[:1000])
    for resume in (output, state):
        assert f"{state.name}: incomplete or not a training state" in failure("train", "--resume", resume)[1]
    assert "no such training state" in failure("train", "--resume", tmp_path / "nowhere")[1]
    assert failure("train", "--resume", "auto")[0] == 2


def test_state_that_would_run_code_is_refused(tmp_path, failure):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"version": 2, "run": Trap()}, tmp_path / "state-00000001.pth")
    line = failure("train", "--resume", tmp_path)[1]
    assert "incomplete or not a training state" in line
    assert "weights_only" not in line  # torch's advice would run the code
    assert not (tmp_path / "trapped").exists()


def test_interrupted_save_leaves_the_earlier_state(folder, tmp_path, monkeypatch):
    setting = Setting(folder, tmp_path / "run", CPU)
    save = torch.save

    def save_once(content, path):
        if content["step"] == 3:
            return save(content, path)
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_once)
    with pytest.raises(KeyboardInterrupt):
        train(TINY_RECIPE, setting)
    assert read_state(setting.output)["step"] == 3
    assert not [path.name for path in setting.output.iterdir() if path.name.startswith(".")]


def test_full_disk_is_one_line_and_leaves_nothing_half_written(folder, tmp_path, monkeypatch, failure):
    def full(content, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(torch, "save", full)
    line = failure("train", folder, "--output", tmp_path / "run", *TINY, "--epochs", "1")[1]
    assert line == f"vssm train: {tmp_path / 'run' / 'state-00000003.pth'}: could not be written; is the disk full?"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"best.safetensors", "best.json", "log.csv"}


def test_folder_that_cannot_be_written_into_fails_before_training(folder, tmp_path, monkeypatch, failure):
    monkeypatch.setattr(train_module, "train_step", lambda *_: pytest.fail("trained for nothing"))
    file = tmp_path / "file"
    file.write_text("in the way")
    for output, message in ((file, "a file, expected a folder"), (file / "run", "Not a directory")):
        assert message in failure("train", folder, "--output", output, *TINY)[1]
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "no permission to write into this folder" in failure("train", folder, "--output", tmp_path / "run", *TINY)[1]


def test_two_runs_never_write_into_one_folder(folder, tmp_path, failure):
    output = tmp_path / "run"
    with claimed(output):
        line = failure("train", folder, "--output", output, *TINY, "--epochs", "1")[1]
        assert f"{output}: another run is writing into this folder" in line
        assert not list(output.iterdir())
    assert not output.exists()
    assert main(["train", str(folder), "--output", str(output), *TINY, "--epochs", "1"]) == 0


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_signals_end_a_run_with_its_state_whole(folder, tmp_path, signals):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "vssm.cli", "train", folder, "--output", output, *TINY, "--epochs", "100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not state_files(output) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    for each in signals:  # the second follows at once, as torchrun repeats what a terminal has sent
        process.send_signal(each)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    step, file = re.fullmatch(
        rf"stopped after step (\d+), in (.+); go on with --resume {output}", printed.strip().splitlines()[-1]
    ).groups()
    assert file == str(state_files(output)[0])
    assert read_state(output)["step"] == int(step)
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]


def test_second_request_interrupts_at_once(monkeypatch):
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: float("inf")))
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_damaged_newest_state_falls_back_to_the_one_before(folder, tmp_path, capsys, caplog):
    whole, output = tmp_path / "whole", tmp_path / "run"
    command = ["train", str(folder), *TINY, "--epochs", "3", "--resume", "auto", "--output"]
    for each in (whole, output):
        assert main([*command, str(each)]) == 0
    newest, older = state_files(output)
    newest.write_bytes(newest.read_bytes()[:1000])
    (output / f".{newest.stem}-0123456789abcdef.pth").write_bytes(b"half")  # as a killed process leaves it
    assert main([*command, str(output)]) == 0
    assert f"{newest}: incomplete or not a training state; going on from {older.name}" in caplog.text
    assert _same(_weights(whole), _weights(output))
    assert [read_state(each)["step"] for each in state_files(output)] == [9, 6]
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def test_states_are_written_as_often_and_kept_as_long_as_asked(folder, tmp_path, monkeypatch):
    written = []
    save = train_module.save_state

    def watch(folder, state, **options):
        written.append(state["step"])
        return save(folder, state, **options)

    monkeypatch.setattr(train_module, "save_state", watch)
    recipe = TINY_RECIPE.with_options({"epochs": 2})
    setting = Setting(folder, tmp_path / "run", CPU, save_every=SaveEvery(steps=2), keep=3)
    train(recipe, setting)
    assert written == [2, 3, 4, 6, 6]  # every second step, and the ends of epochs, after evaluation
    assert [read_state(file)["step"] for file in state_files(setting.output)] == [6, 4, 3]
    written.clear()
    train(recipe, replace(setting, output=tmp_path / "other", save_every=SaveEvery(minutes=1e-9)))
    assert written == [1, 2, 3, 3, 4, 5, 6, 6]


def test_going_back_to_an_earlier_state_gives_the_later_ones_up(folder, tmp_path):
    setting = Setting(folder, tmp_path / "run", CPU, keep=4)
    train(TINY_RECIPE, setting)
    early = state_files(setting.output)[-1]
    with pytest.raises(Stopped):
        train(TINY_RECIPE, setting, resume=read_state(early), stop=StopAtLook(2))
    assert [read_state(file)["step"] for file in state_files(setting.output)] == [5, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "--batch-size: expected a positive integer, got 0"),
        (["--epochs", "-1"], "--epochs: expected a positive integer, got -1"),
        (["--lr", "fast"], "--lr: expected a number of at least 0, got 'fast'"),
        (["--hflip", "2"], "--hflip: expected a number from 0 to 1, got 2"),
        (["--workers", "-2"], "--workers: expected an integer of at least 0, got '-2'"),
        (["--opt", "adamm"], "--opt: unknown optimizer 'adamm'; did you mean adam?"),
        (["--aa", "randaugment!"], "--aa: expected a policy such as rand-m9-mstd0.5-inc1, or none"),
        (["--model-kwargs", "depth"], "--model-kwargs: expected NAME=VALUE such as depth=4, got 'depth'"),
        (["--seed", "4294967296"], "--seed: expected an integer from 0 to 4294967295"),
        (["--batchsize", "8"], "unknown option --batchsize; did you mean --batch-size"),
    ],
)
def test_bad_usage_is_one_line(failure, options, message):
    status, line = failure("train", *options)
    assert status == 2
    assert message in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model", "vim_tinny_patch16"],
            "the nearest names are vim_tiny_patch16_224",
        ),
        (["--model-kwargs", "depht=1"], "unexpected keyword argument 'depht'; did you mean depth?"),
        (["--model-kwargs", "depth=-1"], "test_vim: cannot be built with num_classes=2, img_size=(16, 16), depth=-1: "),
        (["--aa", "rand-m9-inx1"], "--aa rand-m9-inx1: Unknown RandAugment config section; expected a policy such as"),
        (["--num-classes", "1"], "built with 1 classes, the data has 2"),
        (["--epochs", "2", "--warmup-epochs", "2"], "expected fewer warm-up epochs than epochs, got 2 of 2"),
        (["--scale", "0.9", "0.5"], "expected 0 < scale[0] <= scale[1] <= 1, got 0.9 and 0.5"),
        (["--mean", "0.1", "0.2"], "--mean: expected 1 or 3 values for 3 channels, got 2"),
        (["--amp", "--amp-dtype", "float16"], "float16 needs a GPU"),
        (["--batch-size", "1"], "mixup and cutmix need a --batch-size of at least 2, got 1"),
        (["--initial-checkpoint", "nowhere.pth"], "no file 'nowhere.pth'"),
    ],
)
def test_settings_that_do_not_fit_are_one_line_and_leave_no_folder(folder, tmp_path, failure, options, message):
    output = tmp_path / "run"
    base = ["--model", "test_vim", "--img-size", "16", "--workers", "0", "--device", "cpu"]
    status, line = failure("train", folder, "--output", output, *base, *options)
    assert status == 1
    assert message in line
    assert not output.exists()


def test_bad_data_folders_fail_before_anything_is_written(tmp_path, failure):
    make_folder(tmp_path / "single", classes=("cat",))
    for data, message in ((tmp_path / "nowhere", "no such data folder"), (tmp_path / "single", "found 1 class (cat)")):
        status, line = failure("train", data, "--output", tmp_path / "run", *TINY)
        assert status == 1
        assert message in line
    assert not (tmp_path / "run").exists()


def test_too_many_damaged_files_end_the_run(folder, tmp_path, failure):
    broken = folder / "train" / "light" / "003.png"
    broken.write_bytes(broken.read_bytes()[:-60])
    status, line = failure("train", folder, "--output", tmp_path / "run", *TINY, "--epochs", "1")
    assert status == 1
    assert f"{folder / 'train'}: 1 of 24 files cannot be read, more than 1 % of them" in line
    assert "003.png" in line


def test_few_damaged_files_are_skipped_with_a_warning(tmp_path, caplog):
    folder = make_folder(tmp_path / "data", train=100)
    (folder / "train" / "light" / "003.png").write_text("not an image")
    train(TINY_RECIPE.with_options({"epochs": 2, "warmup_epochs": 0}), Setting(folder, tmp_path / "run", CPU))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2  # an epoch
    assert warnings[0].startswith(f"{folder}/train: skipped 1 of 200 files; the first: {folder}/train/light/003.png")


def test_loss_that_is_not_finite_ends_the_run_and_keeps_the_state(folder, tmp_path, monkeypatch):
    setting = Setting(folder, tmp_path / "run", CPU)
    cross_entropy = distillation.cross_entropy
    calls = iter(range(100))
    monkeypatch.setattr(
        distillation,
        "cross_entropy",
        lambda *args, **options: cross_entropy(*args, **options) * (1 if next(calls) < 4 else float("nan")),
    )
    with pytest.raises(ValueError, match=r"^train: the loss is nan at step 5, in epoch 2: first, the loss itself is"):
        train(TINY_RECIPE, setting)
    assert read_state(setting.output)["step"] == 3


def test_first_module_that_is_not_finite_is_named_and_its_batch_kept(folder, tmp_path, monkeypatch):
    recipe = TINY_RECIPE.with_options({"model_kwargs": TINY_RECIPE.model_kwargs | {"depth": 3}, "amp": True})
    setting = Setting(folder, tmp_path / "run", CPU)
    run = prepare(recipe, setting, fresh=True)
    state = initial_state(run)
    overflow = torch.finfo(torch.bfloat16).max  # finite in float32, infinite once it is doubled in bfloat16
    with torch.no_grad():
        run.classifier.model.blocks[1].mixer.in_proj.weight.fill_(overflow)
    batch = next(iter(run.loader))
    images = batch.images.clone()
    with pytest.raises(NonFiniteLoss) as failure:
        train_step(run, state, state.model, batch)
    line = explain(run, state, failure.value)
    assert "first, the output of blocks.1.mixer.in_proj (Linear) is not finite" in line
    kept = torch.load(setting.output / "nonfinite-batch.pth")
    assert (kept["step"], kept["epoch"]) == (1, 1)
    assert kept["images"].shape == images.shape
    assert not torch.equal(kept["images"], images)  # as the model got them, which is mixed
    assert kept["targets"].sum(1).tolist() == pytest.approx([1] * 8)


def test_weights_that_are_not_finite_are_named(folder, tmp_path):
    run = prepare(TINY_RECIPE, Setting(folder, tmp_path / "run", CPU), fresh=True)
    state = initial_state(run)
    with torch.no_grad():
        state.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteLoss) as failure:
        train_step(run, state, state.model, next(iter(run.loader)))
    assert "first, the parameter norm.weight is not finite" in explain(run, state, failure.value)


def test_weights_that_are_not_finite_are_not_kept(folder, tmp_path, monkeypatch):
    step = torch.optim.AdamW.step

    def spoil(optimizer, *args, **kwargs):
        step(optimizer, *args, **kwargs)
        optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))

    setting = Setting(folder, tmp_path / "run", CPU)
    with pytest.raises(Stopped):
        train(TINY_RECIPE, setting, stop=StopAtLook(2))
    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(
        ValueError, match=r"^train: \w+(\.\w+)* is not finite after step 3; the state before it is kept"
    ):
        train(TINY_RECIPE, setting, resume=read_state(setting.output), stop=StopAtLook(1))
    assert [file.name for file in state_files(setting.output)] == ["state-00000002.pth"]


def test_fine_tuning_starts_from_a_checkpoint_with_a_new_head(folder, tmp_path, failure):
    assert main(["train", str(folder), "--output", str(tmp_path / "two"), *TINY, "--epochs", "1"]) == 0
    three = make_folder(tmp_path / "three", classes=("a", "b", "c"))
    tuned = tmp_path / "tuned"
    command = [
        "train",
        three,
        "--output",
        tuned,
        *TINY,
        "--epochs",
        "1",
        "--lr",
        "0",
        "--warmup-lr",
        "0",
        "--min-lr",
        "0",
    ]
    command += ["--initial-checkpoint", tmp_path / "two" / "final.safetensors"]
    assert "the checkpoint has 2 classes and Vim has 3" in failure(*command)[1]
    assert main([str(word) for word in (*command, "--num-classes", "3")]) == 0
    before, after = _weights(tmp_path / "two"), _weights(tuned)
    assert after.pop("head.weight").shape == (3, 8)
    assert after.pop("head.bias").shape == (3,)
    assert _same({key: before[key] for key in after}, after)  # nothing moves at a learning rate of 0


def test_half_precision_and_clipping_train_on_the_cpu(folder, tmp_path):
    options = {"amp": True, "clip_grad": 1.0, "epochs": 1, "warmup_epochs": 0, "grad_checkpointing": True}
    record = train(TINY_RECIPE.with_options(options), Setting(folder, tmp_path / "run", CPU))
    assert record["loss"] < 10


def test_clipping_bounds_the_gradient(folder, tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def watch(optimizer, *args, **kwargs):
        gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.stack(gradients).norm()))
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    recipe = TINY_RECIPE.with_options({"clip_grad": 1e-3, "epochs": 1, "warmup_epochs": 0})
    train(recipe, Setting(folder, tmp_path / "run", CPU))
    assert len(norms) == 3
    assert max(norms) <= 1.001e-3


def test_learning_rate_warms_up_and_falls_to_its_end(folder, tmp_path):
    recipe = TINY_RECIPE.with_options({"lr": 0.1, "warmup_lr": 0.0, "min_lr": 0.01, "epochs": 4, "warmup_epochs": 2})
    train(recipe, Setting(folder, tmp_path / "run", CPU))
    rates = [row["lr"] for row in read_state(tmp_path / "run")["history"]]
    assert rates == pytest.approx([0.05, 0.055, 0.0232, 0.01], abs=1e-3)


def test_no_weight_decay_where_the_model_says_so(folder, tmp_path):
    recipe = TINY_RECIPE.with_options({"epochs": 1, "warmup_epochs": 0, "weight_decay": 0.5})
    run = prepare(recipe, Setting(folder, tmp_path / "run", CPU), fresh=True)
    groups = initial_state(run).optimizer.param_groups
    names = {id(parameter): name for name, parameter in run.classifier.model.named_parameters()}
    decayed = {names[id(each)] for group in groups if group["weight_decay"] == 0.5 for each in group["params"]}
    spared = {names[id(each)] for group in groups if group["weight_decay"] == 0 for each in group["params"]}
    assert decayed | spared == set(names.values())
    assert {"stem.proj.weight", "head.weight", "blocks.0.mixer.in_proj.weight"} <= decayed
    assert {"pos_embed", "cls_token", "blocks.0.mixer.ssm.A_log", "norm.weight"} <= spared


def test_missing_matplotlib_costs_the_curves_only(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train(TINY_RECIPE.with_options({"epochs": 1, "warmup_epochs": 0}), Setting(folder, tmp_path / "run", CPU))
    assert not (tmp_path / "run" / "curves.png").exists()
    assert (tmp_path / "run" / "record.json").exists()
    assert 'no curves: plots need matplotlib, which is not installed: pip install "vssm[plot]"' in caplog.text


def _recipe_of(base: Recipe, *argv: str) -> Recipe:
    parser = Parser(prog="vssm train")
    train_command.add_arguments(parser)
    options = train_command.model_options(parse_with_config(parser, list(argv)))
    return base.with_options(train_command._options_for(base, options))


def test_no_option_is_the_recipe_of_the_data():
    assert _recipe_of(DIGITS) == DIGITS
    assert _recipe_of(Recipe()) == Recipe()


def test_options_win_over_the_file_and_the_file_over_the_recipe(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("lr: 1e-2\nbatch_size: 7\nmodel-ema: false\nmodel-kwargs: [depth=2]\nimg-size: 24\n")
    recipe = _recipe_of(DIGITS, "--config", str(file), "--batch-size", "9")
    assert (recipe.lr, recipe.batch_size, recipe.model_ema) == (0.01, 9, False)
    assert (recipe.model_kwargs, recipe.img_size, recipe.epochs) == ({"depth": 2}, (24, 24), DIGITS.epochs)


def test_misspelt_key_of_a_file_names_the_nearest(tmp_path, failure):
    file = tmp_path / "settings.yaml"
    file.write_text("batch-sise: 8\n")
    status, line = failure("train", "--config", file)
    assert status == 2
    assert "unknown key 'batch-sise'; did you mean batch-size" in line


def test_config_of_the_digits_is_the_built_in_recipe():
    assert _recipe_of(Recipe(), "--config", str(CONFIGS / "digits.yaml")) == DIGITS


def test_configs_of_imagenet_are_the_published_recipes():
    tiny = _recipe_of(Recipe(), "--config", str(CONFIGS / "imagenet" / "vim_tiny_patch16_224.yaml"))
    assert (tiny.batch_size, tiny.lr, tiny.weight_decay, tiny.drop_path, tiny.epochs) == (1024, 1e-3, 0.1, 0.0, 300)
    assert (tiny.aug_repeats, tiny.model_ema_decay, tiny.aa) == (3, 0.99996, "rand-m9-mstd0.5-inc1")
    small = _recipe_of(Recipe(), "--config", str(CONFIGS / "imagenet" / "vim_small_patch16_224.yaml"))
    assert (small.batch_size, small.lr, small.weight_decay, small.drop_path) == (512, 1e-3, 0.05, 0.05)
    base = _recipe_of(Recipe(), "--config", str(CONFIGS / "imagenet" / "vmamba_base_s2l15.yaml"))
    assert (base.batch_size, base.lr, base.weight_decay, base.drop_path, base.clip_grad) == (1024, 1e-3, 0.05, 0.6, 5.0)
    assert (base.aug_repeats, base.model_ema_decay, base.warmup_epochs, base.amp) == (1, 0.9999, 20, True)
    light = _recipe_of(Recipe(), "--config", str(CONFIGS / "imagenet" / "efficientvmamba_tiny.yaml"))
    assert (light.batch_size, light.lr, light.weight_decay, light.drop_path, light.clip_grad) == (
        2048,
        2e-3,
        0.04,
        0.1,
        1,
    )
    assert (light.warmup_lr, light.min_lr, light.aa, light.model_ema_decay) == (1e-7, 1e-6, "rand-m9-mstd0.5", 0.9999)
    for path in (CONFIGS / "imagenet").glob("[!_]*.yaml"):
        recipe = _recipe_of(Recipe(), "--config", str(path))
        assert recipe.model == path.stem
        mild = (
            0.1 if path.stem == "a2mamba_nano" else 0.2 if path.stem.startswith(("efficientvmamba", "local")) else 0.8
        )
        assert recipe.mixup == mild


def test_another_model_does_not_get_the_arguments_of_the_digits_model():
    assert _recipe_of(DIGITS, "--model", "resnet18").model_kwargs == {}
    assert _recipe_of(DIGITS, "--model", "test_vim").model_kwargs == DIGITS.model_kwargs


def test_recipe_survives_being_written():
    recipe = DIGITS.with_options({"clip_grad": 1.0, "scale": (0.5, 0.9)})
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_models_of_timm_train_too(folder, tmp_path, model):
    size = [] if model == "test_vit" else TINY_INPUT
    command = ["train", str(folder), "--output", str(tmp_path / "run"), "--model", model, *size, "--epochs", "1"]
    assert main([*command, "--batch-size", "8", "--workers", "0", "--device", "cpu"]) == 0
    assert main(["validate", str(folder), "--checkpoint", str(tmp_path / "run" / "final.safetensors")]) == 0
