"""Options of training that say how to compute, what to decay, and what to show."""

import csv
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import vssm
from image_folders import TINY, make_folder
from vssm.cli import main
from vssm.cli import train as train_command
from vssm.cli._options import Parser
from vssm.cli.config import parse_with_config
from vssm.data.loaders import Batch
from vssm.engine.recipe import Recipe
from vssm.engine.train import train
from vssm.engine.training_setup import Setting, _optimizer, initial_state, network_of, prepare
from vssm.engine.training_step import train_step

CONFIGS = Path(__file__).parents[1] / "configs" / "imagenet"
CPU = torch.device("cpu")
RECIPE = Recipe(
    model="test_vim",
    model_kwargs={"embed_dim": 8, "depth": 2, "patch_size": 8, "d_state": 1},
    in_chans=1,
    img_size=(16, 16),
    batch_size=8,
    epochs=1,
    warmup_epochs=0,
    aa="",
    mixup=0.0,
    cutmix=0.0,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path / "data")


def _groups(folder: Path, **options) -> dict[str, dict]:
    """The group of every parameter, by its name."""
    recipe = RECIPE.with_options(options)
    state = initial_state(prepare(recipe, Setting(folder, folder, CPU), fresh=True))
    groups = {id(each): group for group in state.optimizer.param_groups for each in group["params"]}
    return {name: groups[id(each)] for name, each in state.model.named_parameters()}


def test_layer_decay_lowers_the_learning_rate_from_the_head_to_the_stem(folder):
    groups = _groups(folder, layer_decay=0.5, lr=0.1)
    names = ("head.weight", "blocks.1.norm1.weight", "blocks.0.norm1.weight", "pos_embed")
    rates = [groups[name]["lr"] for name in names]
    assert rates[0] == pytest.approx(0.1)
    for later, earlier in pairwise(rates):
        assert earlier < later
    assert rates[1] / rates[2] == pytest.approx(2)
    assert groups["pos_embed"]["weight_decay"] == 0


@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_decay_by_patterns_replaces_what_the_model_says(folder, layer_decay):
    groups = _groups(folder, no_decay=("*.D", "pos_embed"), layer_decay=layer_decay, weight_decay=0.3)
    spared = {name for name, group in groups.items() if group["weight_decay"] == 0}
    assert {"pos_embed", "blocks.0.mixer.ssm.D", "blocks.1.norm1.weight", "head.bias"} <= spared
    decayed = {name for name, group in groups.items() if group["weight_decay"] == 0.3}
    assert {"cls_token", "blocks.0.mixer.ssm.A_log", "blocks.0.mixer.ssm.dt_bias", "head.weight"} <= decayed
    assert spared | decayed == set(groups)


def test_pattern_that_names_nothing_is_an_error(folder):
    with pytest.raises(ValueError, match=r"--no-decay \*\.d: no parameter of test_vim has such a name"):
        _groups(folder, no_decay=("*.d",))


def _recipe_of(path: Path) -> Recipe:
    parser = Parser(prog="vssm train")
    train_command.add_arguments(parser)
    options = train_command.model_options(parse_with_config(parser, ["--config", str(path)]))
    return Recipe().with_options(options)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("[!_]*.yaml")), ids=lambda path: path.stem)
def test_published_recipes_decay_what_the_authors_decayed(path):
    """What has one dimension there, and biases, are spared; A_log is not, whatever marks it carries."""
    recipe = _recipe_of(path)
    with torch.device("meta"):
        model = vssm.create_model(recipe.model)
    groups = {id(each): group for group in _optimizer(model, recipe).param_groups for each in group["params"]}
    decays = {name: groups[id(each)]["weight_decay"] > 0 for name, each in model.named_parameters()}
    kinds = {name: name.rpartition(".")[2] for name in decays}
    assert any(decays.values())
    assert not any(decays[name] for name, kind in kinds.items() if kind in ("D", "bias", "pos_embed", "cls_token"))
    if recipe.no_decay is not None:
        assert all(decays[name] for name, kind in kinds.items() if kind == "A_log")


def test_dry_run_says_what_is_needed_and_writes_nothing(folder, tmp_path, capsys):
    output = tmp_path / "run"
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", str(folder), "--output", str(output), *TINY, "--epochs", "7", "--dry-run"]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith("two steps took ")
    assert " MiB at most; " in line
    assert line.endswith(" for 21 steps, without evaluation and waiting for data")
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_fails_where_the_run_would(folder, tmp_path, capsys):
    assert main(["train", str(folder), "--output", str(tmp_path / "x"), *TINY, "--lr", "nan", "--dry-run"]) == 2
    command = ["train", str(folder), "--output", str(tmp_path / "x"), *TINY, "--batch-size", "2", "--accum", "4"]
    assert main([*command, "--dry-run"]) == 1
    assert "expected --accum of at most 2, the images of a batch that a process gets, got 4" in capsys.readouterr().err


def test_log_has_what_the_run_has_cost(folder, tmp_path):
    recipe = RECIPE.with_options({"clip_grad": 1e-3, "epochs": 2})
    train(recipe, Setting(folder, tmp_path / "run", CPU))
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == [3, 6]
    for row in rows:
        assert 0 < float(row["data_wait"]) < 1
        assert float(row["peak_memory_mib"]) > 50
        assert float(row["grad_norm"]) > 1e-3  # before it is clipped
        assert float(row["train_images_per_s"]) > 0
    assert "grad_norm" not in train(RECIPE, Setting(folder, tmp_path / "plain", CPU))
    assert "grad_norm" not in (tmp_path / "plain" / "log.csv").read_text()


def test_tensorboard_gets_the_rows(folder, tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, path, *, purge_step):
            self.path, self.purge_step = path, purge_step

        def __enter__(self):
            return self

        def __exit__(self, *_):
            written.append("closed")

        def add_scalar(self, name, value, step):
            written.append((self.path, self.purge_step, name, value, step))

    module = ModuleType("torch.utils.tensorboard")
    monkeypatch.setattr(module, "SummaryWriter", Writer, raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    output = tmp_path / "run"
    train(RECIPE.with_options({"epochs": 2}), Setting(folder, output, CPU, tensorboard=True))
    rows = list(csv.DictReader((output / "log.csv").open()))
    losses = [each for each in written if each != "closed" and each[2] == "val_loss"]
    assert losses == [
        (output / "tensorboard", epoch, "val_loss", float(row["val_loss"]), epoch) for epoch, row in enumerate(rows, 1)
    ]
    assert written.count("closed") == 2


def test_tensorboard_that_is_not_installed_is_said_before_training(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    output = tmp_path / "run"
    assert main(["train", str(folder), "--output", str(output), *TINY, "--tensorboard"]) == 1
    assert "--tensorboard needs tensorboard, which is not installed: pip install tensorboard" in capsys.readouterr().err
    assert not output.exists()


def test_sharding_needs_processes(folder, tmp_path, capsys):
    assert main(["train", str(folder), "--output", str(tmp_path / "run"), *TINY, "--fsdp"]) == 1
    assert "--fsdp cuts the model into parts for several processes; start them with torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "0m", "m", "ten", "-3", "5h"])
def test_times_of_saving_are_steps_or_minutes(value, capsys):
    assert main(["train", f"--save-every={value}"]) == 2
    assert "expected a number of steps such as 500, or of minutes such as 10m" in capsys.readouterr().err


def test_blanks_in_place_of_unreadable_images_change_nothing(folder, tmp_path):
    """Two images that could be read, in four parts, make the step that they make in one."""
    steps = []
    for accum in (1, 4):
        run = prepare(RECIPE.with_options({"accum": accum}), Setting(folder, tmp_path / "run", CPU), fresh=True)
        state = initial_state(run)
        batch = next(iter(run.loader))
        few = Batch(batch.images[:2], batch.targets[:2], batch.indices[:2], ["x.png: not a readable image"] * 6)
        outcome = train_step(run, state, state.model, few)
        assert outcome.images == 2
        steps.append((outcome.loss, [each.detach().clone() for each in state.model.parameters()]))
    assert steps[0][0] == pytest.approx(steps[1][0], rel=1e-5)
    torch.testing.assert_close(steps[0][1], steps[1][1], rtol=1e-4, atol=1e-5)


def test_a_batch_without_images_is_no_step(folder, tmp_path):
    run = prepare(RECIPE, Setting(folder, tmp_path / "run", CPU), fresh=True)
    state = initial_state(run)
    before = [each.detach().clone() for each in state.model.parameters()]
    empty = Batch(torch.empty(0, 1, 16, 16), torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), [])
    assert train_step(run, state, state.model, empty).images == 0
    assert all(map(torch.equal, before, state.model.parameters()))


def test_compile_compiles_the_model_in_place(folder, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, *_, **__: compiled.append(module))
    for wanted in (None, "default"):
        run = prepare(RECIPE, Setting(folder, tmp_path / "run", CPU, compile=wanted), fresh=True)
        state = initial_state(run)
        assert network_of(run, state) is state.model
        assert compiled == ([state.model] if wanted else [])


@pytest.mark.slow
def test_compiled_training_equals_eager(folder, tmp_path):
    losses = []
    for wanted in (None, "default"):
        setting = Setting(folder, tmp_path / str(wanted), CPU, compile=wanted)
        losses.append(train(RECIPE.with_options({"epochs": 3}), setting)["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
