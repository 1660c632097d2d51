"""Training by processes of their own: one killed at any moment, and several that torchrun starts."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from image_folders import TINY, TINY_INPUT, make_folder
from vssm.engine import classifier as classifiers
from vssm.engine.checkpoints import read_state, state_files
from vssm.engine.classifier import ModelSpec

ALONE = [sys.executable, "-m", "vssm.cli"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vssm.cli"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
KEPT = ["--model-ema", "--model-ema-decay", "0.9", "--clip-grad", "1"]


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path / "data", train=21, val=7)


def _start(program: list[str], *options: object) -> subprocess.Popen:
    return subprocess.Popen(
        [*program, "train", *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def _run(program: list[str], *options: object) -> str:
    process = _start(program, *options)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return printed


def _wait_for_step(process: subprocess.Popen, output: Path, step: int) -> bool:
    """Waits until a state of at least so many steps is there; returns whether the process still runs."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        files = state_files(output)
        if process.poll() is not None or (files and _step_of(files[0]) >= step):
            return process.poll() is None
        time.sleep(0.01)
    pytest.fail(f"no state of step {step} after five minutes")


def _step_of(file: Path) -> int:
    return int(file.stem.rpartition("-")[2])


def _assert_same_weights(first: Path, second: Path) -> None:
    weights = [load_file(folder / "final.safetensors") for folder in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def _rows(output: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((output / "log.csv").open()))


def test_two_processes_equal_one_replicated_or_sharded(folder, tmp_path):
    options = [folder, *TINY, *KEPT, "--mixup", "0", "--cutmix", "0", "--accum", "2", "--reprob", "0.5", "--keep", "1"]
    # 20 epochs of one step, each of which is a row of the log.
    options += ["--batch-size", "40", "--epochs", "20", "--lr", "3e-3", "--save-every", "10", "--output"]
    one, replicated, sharded = (tmp_path / name for name in ("one", "replicated", "sharded"))
    _run(ALONE, *options, one)
    _run(TWO, *options, replicated)
    _run(TWO, *options, sharded, "--fsdp")
    expected = _rows(one)
    losses = [float(row["train_loss"]) for row in expected]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.1
    for output in (replicated, sharded):
        rows = _rows(output)
        for name, tolerance in (("train_loss", 1e-5), ("val_loss", 1e-5), ("grad_norm", 1e-4)):
            assert [float(row[name]) for row in rows] == pytest.approx(
                [float(row[name]) for row in expected], abs=tolerance
            )
        assert [row["val_top1"] for row in rows] == [row["val_top1"] for row in expected]  # of 14 images, none twice
        assert {path.name for path in output.iterdir()} == {path.name for path in one.iterdir()}
        _assert_same_files(one, output)


def _assert_same_files(one: Path, other: Path) -> None:
    """States and weights of two runs are the same in all but rounding."""
    first, second = read_state(one), read_state(other)
    assert (first["ranks"], second["ranks"]) == (1, 2)
    for part in ("model", "model_ema"):
        torch.testing.assert_close(second[part], first[part], rtol=1e-3, atol=1e-4)
    assert second["optimizer"]["param_groups"] == first["optimizer"]["param_groups"]
    for number, moments in first["optimizer"]["state"].items():
        torch.testing.assert_close(second["optimizer"]["state"][number], moments, rtol=1e-2, atol=1e-4)
    weights = [load_file(folder / "final.safetensors") for folder in (one, other)]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("program", [ALONE, TWO], ids=["alone", "two"])
def test_run_killed_at_ten_moments_equals_the_uninterrupted_one(folder, tmp_path, program):
    options = [folder, *TINY, *KEPT, "--aa", "rand-m9-mstd0.5-inc1", "--drop-path", "0.2", "--epochs", "150"]
    options += ["--save-every", "3", "--output"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _run(program, *options, whole)
    moments = random.Random(0)
    for _ in range(10):
        done = _step_of(state_files(killed)[0]) if killed.exists() else 0
        process = _start(program, *options, killed, "--resume", "auto")
        assert _wait_for_step(process, killed, done + 1), process.communicate()[1]
        time.sleep(moments.uniform(0, 0.5))
        assert process.poll() is None, "the run was over before it could be killed"
        for each in (*_children(process.pid), process.pid):
            os.kill(each, signal.SIGKILL)
        process.communicate(timeout=60)
        assert not (killed / "final.safetensors").exists()
    _run(program, *options, killed, "--resume", "auto")
    _assert_same_weights(whole, killed)
    assert not [path for path in killed.iterdir() if path.name.startswith(".")]
    assert [row["train_loss"] for row in _rows(killed)] == [row["train_loss"] for row in _rows(whole)]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [[], ["--fsdp"]], ids=["replicated", "sharded"])
def test_one_process_killed_ends_the_others_and_the_run_resumes(folder, tmp_path, sharded):
    options = [folder, *TINY, *KEPT, *sharded, "--drop-path", "0.2", "--epochs", "60", "--save-every", "2", "--output"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _run(TWO, *options, whole)
    process = _start(TWO, *options, killed)
    assert _wait_for_step(process, killed, 12)
    first, second = _children(process.pid)
    start = time.monotonic()
    os.kill(second, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 60
    assert process.returncode != 0
    assert "vssm train: another process has ended, its own message says why; --resume auto goes on" in errors
    assert not Path(f"/proc/{first}").exists()

    process = _start(TWO, *options, killed, "--resume", "auto")
    assert _wait_for_step(process, killed, _step_of(state_files(killed)[0]) + 9)
    os.kill(process.pid, signal.SIGTERM)  # torchrun passes it on
    printed, errors = process.communicate(timeout=60)
    assert f"go on with --resume {killed}" in printed, errors
    assert not [path for path in killed.iterdir() if path.name.startswith(".")]
    _run(TWO, *options, killed, "--resume", "auto")
    _assert_same_weights(whole, killed)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_run_goes_on_with_another_number_of_processes(folder, tmp_path):
    output = tmp_path / "run"
    options = [folder, *TINY, *KEPT, "--mixup", "0", "--cutmix", "0", "--epochs", "4", "--output"]
    _run(ALONE, *options, tmp_path / "alone")
    process = _start(TWO, *options, output, "--fsdp", "--save-every", "1")
    assert _wait_for_step(process, output, 3)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    process = _start(ALONE, *options, output, "--resume", "auto")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "resumed with 1 processes after 2: order and augmentation of the images stay as they were" in errors
    weights = [load_file(folder / "final.safetensors") for folder in (tmp_path / "alone", output)]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)


def _guided(path: Path) -> list[object]:
    """Options to learn from a teacher, of random weights, and from the moving average."""
    teacher = classifiers.build(ModelSpec(model="test_resnet", in_chans=1), classes=("dark", "light"))
    classifiers.save(path, teacher, teacher.model.state_dict(), {})
    return ["--distill-teacher", "test_resnet", "--distill-checkpoint", path, "--mesa", "1", "--mesa-start-epoch", "2"]


@pytest.mark.slow
def test_two_processes_that_learn_from_other_models_equal_one(folder, tmp_path):
    options = [folder, *TINY, *KEPT, *_guided(tmp_path / "teacher.safetensors"), "--mixup", "0", "--cutmix", "0"]
    options += ["--batch-size", "40", "--epochs", "8", "--lr", "3e-3", "--accum", "2", "--output"]
    one, replicated, sharded = (tmp_path / name for name in ("one", "replicated", "sharded"))
    _run(ALONE, *options, one)
    _run(TWO, *options, replicated)
    _run(TWO, *options, sharded, "--fsdp")
    for output in (replicated, sharded):
        for name in ("train_loss", "val_loss"):
            expected = [float(row[name]) for row in _rows(one)]
            assert [float(row[name]) for row in _rows(output)] == pytest.approx(expected, abs=1e-5)
        _assert_same_files(one, output)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [[], ["--fsdp"]], ids=["replicated", "sharded"])
def test_two_processes_that_learn_from_other_models_resume_bit_for_bit(folder, tmp_path, sharded):
    """Batch norms differ between processes; those of the moving average must not depend on when a run was stopped."""
    options = [folder, "--model", "test_resnet", *TINY_INPUT, *KEPT, *_guided(tmp_path / "teacher.safetensors")]
    options += [*sharded, "--batch-size", "8", "--workers", "0", "--aa", "none", "--device", "cpu", "--epochs", "24"]
    options += ["--save-every", "5", "--output"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    _run(TWO, *options, whole)
    process = _start(TWO, *options, stopped)
    assert _wait_for_step(process, stopped, 20)
    os.kill(process.pid, signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert f"go on with --resume {stopped}" in printed, errors
    _run(TWO, *options, stopped, "--resume", "auto")
    _assert_same_weights(whole, stopped)


@pytest.mark.slow
def test_two_processes_on_fewer_tokens_equal_one(folder, tmp_path):
    schedule, dense = tmp_path / "schedule.yaml", tmp_path / "dense"
    schedule.write_text("{model: test_vim, after: [1, 2], keep: 0.6}\n")
    model = ["--model", "test_vim", "--model-kwargs", "embed_dim=8", "depth=3", "patch_size=4", *TINY_INPUT]
    options = [folder, *model, *KEPT, "--workers", "0", "--aa", "none", "--mixup", "0", "--cutmix", "0"]
    options += ["--device", "cpu", "--batch-size", "40", "--lr", "3e-3", "--epochs"]
    _run(ALONE, *options, "2", "--output", dense)
    options += ["6", "--initial-checkpoint", dense / "final.safetensors", "--prune", schedule, "--accum", "2"]
    options += ["--distill-teacher", "dense", "--distill", "soft", "--distill-tokens", "0.5", "--grad-checkpointing"]
    one, replicated, sharded = (tmp_path / name for name in ("one", "replicated", "sharded"))
    _run(ALONE, *options, "--output", one)
    _run(TWO, *options, "--output", replicated)
    _run(TWO, *options, "--fsdp", "--output", sharded)
    for output in (replicated, sharded):
        for name in ("train_loss", "val_loss"):
            expected = [float(row[name]) for row in _rows(one)]
            assert [float(row[name]) for row in _rows(output)] == pytest.approx(expected, abs=1e-5)
        _assert_same_files(one, output)
