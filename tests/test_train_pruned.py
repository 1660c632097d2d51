"""Training on fewer tokens: what it reaches, what it compares, and that evaluation reduces tokens as well."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from image_folders import TINY_INPUT, StopAtLook, make_folder
from vssm.cli import main
from vssm.cli import train as train_command
from vssm.cli._options import Parser
from vssm.cli.config import parse_with_config
from vssm.engine import classifier as classifiers
from vssm.engine.checkpoints import read_state
from vssm.engine.distillation import token_distillation
from vssm.engine.evaluate import validate
from vssm.engine.recipe import Recipe
from vssm.engine.stopping import Stopped
from vssm.engine.train import train
from vssm.engine.training_setup import Setting, initial_state, prepare
from vssm.engine.training_step import train_step
from vssm.pruning import Schedule, read_schedule

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
VIM = {"embed_dim": 8, "depth": 4, "patch_size": 4, "d_state": 2}
SCHEDULE = Schedule("test_vim", after=(1, 3), keep=0.6)
RECIPE = Recipe(
    model="test_vim",
    model_kwargs=VIM,
    in_chans=1,
    img_size=(16, 16),
    batch_size=8,
    epochs=3,
    warmup_epochs=0,
    lr=3e-3,
    aa="",
    drop_path=0.1,
    model_ema=True,
    model_ema_decay=0.9,
    prune=SCHEDULE.as_dict(),
)


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path / "data")


@pytest.fixture
def guided(tmp_path) -> Recipe:
    """The recipe with the dense model as a teacher, of random weights."""
    path = tmp_path / "dense.safetensors"
    dense = classifiers.build(replace(RECIPE, seed=1), classes=("dark", "light"))
    torch.nn.init.normal_(dense.model.head.weight)
    classifiers.save(path, dense, dense.model.state_dict(), {})
    return replace(
        RECIPE, distill_teacher="dense", distill_checkpoint=str(path), distill="soft", distill_tokens=0.5, mesa=1.0
    )


def test_token_loss_is_its_formula():
    ours, theirs = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    expected = [
        sum((a - b) ** 2 for p, q in zip(x, y, strict=True) for a, b in zip(p, q, strict=True)) / 12
        for x, y in zip(ours.tolist(), theirs.tolist(), strict=True)
    ]
    assert token_distillation(ours, theirs).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_is_reached(folder, tmp_path, checkpointing):
    recipe = replace(RECIPE, grad_checkpointing=checkpointing, drop_path=0.0)
    run = prepare(recipe, Setting(folder, tmp_path / "run", CPU), fresh=True)
    state = initial_state(run)
    with state.reducing():
        train_step(run, state, state.model, next(iter(run.loader)))
    assert state.reducers[0].last_map.count == 7
    unreached = [name for name, each in state.model.named_parameters() if each.grad is None or not each.grad.any()]
    assert not unreached


def test_tokens_that_are_left_are_compared_to_those_of_the_dense_model(folder, tmp_path, guided):
    """The loss of tokens, computed once more from the features of both models."""
    losses = []
    for weight in (0.0, 2.0):
        recipe = replace(guided, distill_tokens=weight, mesa=0.0, drop_path=0.0, mixup=0.0, cutmix=0.0)
        run = prepare(recipe, Setting(folder, tmp_path / "run", CPU), fresh=True)
        state = initial_state(run)
        batch = next(iter(run.loader))
        with state.reducing():
            with torch.no_grad():
                tokens = state.model.forward_features(batch.images)
            losses.append(train_step(run, state, state.model, batch).loss)
    with torch.no_grad():
        theirs = run.teacher.model.forward_features(batch.images)
    kept = state.reducers[0].last_map.kept
    assert kept.shape == (8, 7)
    expected = 0.0
    for sample in range(8):
        difference = tokens[sample, kept[sample]] - theirs[sample, kept[sample]]
        expected += 2 * difference.square().mean().item()
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-4)


def test_the_dense_model_is_the_one_at_the_start(folder, tmp_path, guided):
    setting = Setting(folder, tmp_path / "run", CPU, initial_checkpoint=Path(guided.distill_checkpoint))
    run = prepare(guided, setting, fresh=True)
    own, theirs = run.classifier.model.state_dict(), run.teacher.model.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    images = torch.randn(2, 1, 16, 16)
    state = initial_state(run)
    whole = run.teacher.ask(images)[0]
    with torch.no_grad(), state.reducing():
        assert torch.equal(run.teacher.ask(images)[0], whole)
        assert not torch.allclose(state.model.eval()(images), whole)
    with torch.no_grad():
        torch.testing.assert_close(state.model(images), whole)


def test_evaluation_is_on_fewer_tokens_and_of_the_moving_average(folder, tmp_path):
    record = train(RECIPE, Setting(folder, tmp_path / "run", CPU))
    trained = classifiers.load(tmp_path / "run" / "final.safetensors")
    dense = validate(trained, folder, device=CPU)
    with SCHEDULE.reducer(trained.model):
        pruned = validate(trained, folder, device=CPU)
    assert record["loss"] == pytest.approx(pruned["loss"], rel=1e-6)
    assert record["loss"] != pytest.approx(dense["loss"], rel=1e-6)
    described = json.loads((tmp_path / "run" / "final.json").read_text())
    assert Schedule.from_dict(described["spec"]["prune"]) == SCHEDULE


def test_resumed_run_equals_the_uninterrupted_one(folder, tmp_path, guided):
    whole, parts = (Setting(folder, tmp_path / name, CPU) for name in ("whole", "parts"))
    record = train(guided, whole)
    with pytest.raises(Stopped):
        train(guided, parts, stop=StopAtLook(6))
    stored = read_state(parts.output)
    again = train(Recipe.from_dict(stored["run"]["recipe"]), parts, resume=stored)
    assert (record["loss"], record["train_loss"]) == (again["loss"], again["train_loss"])
    states = read_state(whole.output), read_state(parts.output)
    for part in ("model", "model_ema"):
        assert all(torch.equal(states[0][part][name], states[1][part][name]) for name in states[0][part])


def test_command_takes_schedule_model_and_weights_from_files(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("schedule.yaml").write_text("{model: test_vim, after: [1, 2], keep: 0.5}\n")
    size = [*TINY_INPUT, "--batch-size", "8", "--workers", "0", "--aa", "none", "--device", "cpu"]
    size += ["--model-kwargs", "embed_dim=8", "patch_size=4", "--epochs", "1"]
    assert main(["train", str(folder), "--output", "dense", "--model", "test_vim", *size]) == 0
    pruned = [*size, "--prune", "schedule.yaml", "--initial-checkpoint", "dense/final.safetensors"]
    pruned += ["--distill-teacher", "dense", "--distill-tokens", "0.5"]
    assert main(["train", str(folder), "--output", "run", *pruned]) == 0
    (record,) = json.loads(Path("run/record.json").read_text())
    recipe = record["recipe"]
    assert (recipe["model"], recipe["prune"]["after"], recipe["prune"]["keep"]) == ("test_vim", [1, 2], 0.5)
    assert recipe["distill_checkpoint"] == str(tmp_path / "dense/final.safetensors")
    assert math.isfinite(record["train_loss"])
    Path("schedule.yaml").unlink()  # the run keeps what it says
    assert main(["train", "--resume", "run", "--epochs", "2", "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "test_groupmamba"], "TokenReducer: stages."),
        (["--distill-teacher", "dense"], "expected weights for --distill-teacher dense, the model before training: "),
        (
            ["--distill-teacher", "test_vim", "--distill-tokens", "1"],
            "expected --prune and --distill-teacher dense for --distill-tokens, which compares what is left to the "
            "whole, got a schedule and test_vim",
        ),
        (["--distill-teacher", "dense", "--initial-checkpoint", "nowhere.pth"], "no file"),
    ],
)
def test_what_does_not_fit_is_one_line(folder, tmp_path, capsys, options, message):
    schedule = tmp_path / "schedule.yaml"
    schedule.write_text("{model: test_vim, after: [3], keep: 0.5}\n")
    output = tmp_path / "run"
    command = ["train", str(folder), "--output", str(output), "--img-size", "32", "--prune", str(schedule), *options]
    assert main([*command, "--workers", "0", "--device", "cpu"]) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not output.exists()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/pruning/training").glob("[!_]*.yaml")), ids=lambda path: path.stem
)
def test_published_fine_tuning_follows_the_schedule_of_its_name(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parser = Parser(prog="vssm train")
    train_command.add_arguments(parser)
    args = parse_with_config(parser, ["imagenet", "--config", str(path), "--output", "nowhere", "--device", "cpu"])
    recipe, _ = train_command._what_and_where(args, None)
    schedule = read_schedule(ROOT / f"configs/pruning/{path.stem}.yaml")
    assert Schedule.from_dict(recipe.prune) == schedule
    assert recipe.model == schedule.model
    assert recipe.pretrained
    if path.stem.startswith("top"):
        assert (recipe.lr, recipe.min_lr, recipe.weight_decay, recipe.epochs) == (5e-6, 1e-5, 1e-8, 30)
        assert (recipe.batch_size, recipe.model_ema_decay, recipe.distill_teacher) == (512, 0.99996, None)
    else:
        assert (recipe.lr, recipe.min_lr, recipe.weight_decay, recipe.warmup_epochs) == (2e-5, 1e-6, 0.05, 0)
        assert (recipe.distill_teacher, recipe.distill, recipe.batch_size) == ("dense", "soft", 1024)
