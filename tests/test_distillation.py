"""Learning from a teacher and from the moving average: losses against formulas, frozen teachers, resumed runs."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from image_folders import TINY, StopAtLook, make_folder
from vssm.cli import main
from vssm.cli import train as train_command
from vssm.cli._options import Parser
from vssm.cli.config import parse_with_config
from vssm.data.loaders import Batch
from vssm.engine import classifier as classifiers
from vssm.engine.checkpoints import read_state
from vssm.engine.classifier import ModelSpec
from vssm.engine.distillation import (
    Guides,
    hard_distillation,
    self_distillation,
    soft_distillation,
    sum_of_losses,
)
from vssm.engine.nonfinite import explain
from vssm.engine.recipe import Recipe
from vssm.engine.stopping import Stopped
from vssm.engine.train import train
from vssm.engine.training_setup import Setting, initial_state, prepare
from vssm.engine.training_step import NonFiniteLoss, train_step

CONFIGS = Path(__file__).parents[1] / "configs"
CPU = torch.device("cpu")
VIM = {"embed_dim": 8, "depth": 1, "patch_size": 8, "d_state": 1}
RECIPE = Recipe(
    model="test_vim",
    model_kwargs=VIM,
    in_chans=1,
    img_size=(16, 16),
    batch_size=8,
    epochs=3,
    warmup_epochs=0,
    aa="",
    drop_path=0.1,
    model_ema=True,
    model_ema_decay=0.9,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path / "data")


def _teacher_file(path: Path, *, model: str = "test_resnet", classes: tuple[str, ...] = ("dark", "light")) -> str:
    """Random weights of a model of grey images, with the description that training writes."""
    classifier = classifiers.build(ModelSpec(model=model, in_chans=1), classes=classes)
    classifiers.save(path, classifier, classifier.model.state_dict(), {})
    return str(path)


@pytest.fixture
def distilled(tmp_path) -> Recipe:
    return replace(
        RECIPE, distill_teacher="test_resnet", distill_checkpoint=_teacher_file(tmp_path / "teacher.safetensors")
    )


def _log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(map(math.exp, row)))
    return [each - total for each in row]


def _random_logits(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_losses_are_their_formulas():
    logits, guide = _random_logits(0, 4, 5), _random_logits(1, 4, 5)
    for row, ours, theirs in zip(range(4), logits.tolist(), guide.tolist(), strict=True):
        best = theirs.index(max(theirs))
        assert hard_distillation(logits, guide)[row].item() == pytest.approx(-_log_softmax(ours)[best], rel=1e-12)
        p, q = (_log_softmax([each / 2.5 for each in values]) for values in (theirs, ours))
        divergence = 2.5**2 * sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
        found = soft_distillation(logits, guide, temperature=2.5)[row].item()
        assert found == pytest.approx(divergence, rel=1e-12)
        p, q = _log_softmax(theirs), _log_softmax(ours)
        entropy = -sum(math.exp(a) * b for a, b in zip(p, q, strict=True))
        assert self_distillation(logits, guide)[row].item() == pytest.approx(entropy, rel=1e-12)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("two_heads", [False, True])
def test_terms_are_weighed_and_heads_learn_their_own(kind, two_heads):
    recipe = replace(RECIPE, distill=kind, distill_weight=0.3, distill_temperature=2.0, mesa=1.5)
    first, second, teacher, average = (_random_logits(seed, 3, 5).requires_grad_(seed < 2) for seed in range(4))
    targets = _random_logits(5, 3, 5).softmax(1)
    targets[2] = 0  # a blank
    outputs = (first, second) if two_heads else first
    for_teacher = second if two_heads else first
    found = sum_of_losses(recipe, outputs, targets=targets, guides=Guides(teacher, average=average))
    expected = 0.0
    for row in range(2):
        answer = (first[row] + for_teacher[row]) / 2
        labels = -sum(a * b for a, b in zip(targets[row].tolist(), _log_softmax(first[row].tolist()), strict=True))
        one = slice(row, row + 1)
        distill = (
            hard_distillation(for_teacher[one], teacher[one])
            if kind == "hard"
            else soft_distillation(for_teacher[one], teacher[one], temperature=2.0)
        )
        expected += 0.7 * labels + 0.3 * distill.item() + 1.5 * self_distillation(answer[None], average[one]).item()
    assert found.item() == pytest.approx(expected, rel=1e-12)
    without = sum_of_losses(recipe, outputs, targets=targets, guides=Guides(teacher))
    (gradient,) = torch.autograd.grad(without, first)
    assert torch.equal(gradient[2], torch.zeros(5))
    if two_heads:  # labels alone teach the first classifier
        expected_gradient = 0.7 * (first.softmax(1) - targets)[:2]
        torch.testing.assert_close(gradient[:2], expected_gradient)


def test_without_guides_the_loss_is_the_cross_entropy():
    logits, targets = _random_logits(0, 3, 5), _random_logits(1, 3, 5).softmax(1)
    found = sum_of_losses(RECIPE, logits, targets=targets, guides=Guides())
    assert torch.equal(found, nn.functional.cross_entropy(logits, targets, reduction="sum"))


def test_teacher_is_frozen_and_sees_what_the_model_sees(folder, tmp_path, distilled):
    run = prepare(distilled, Setting(folder, tmp_path / "run", CPU), fresh=True)
    state, teacher = initial_state(run), run.teacher.model
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    seen: list[Tensor] = []
    for model in (teacher, state.model):
        model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    for batch in run.loader:
        assert math.isfinite(train_step(run, state, state.model, batch).loss)
    mean, std = run.classifier.config.mean[0], run.classifier.config.std[0]
    assert mean != 0.5  # which is the teacher's, as its deviation is
    assert len(seen) == 6
    for theirs, ours in zip(seen[::2], seen[1::2], strict=True):
        torch.testing.assert_close(theirs * 0.5 + 0.5, ours * std + mean)
    after = teacher.state_dict()
    assert any("running_mean" in name for name in after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module.training for module in teacher.modules())
    assert not any(each.requires_grad or each.grad is not None for each in teacher.parameters())
    assert all(each.grad is not None for each in state.model.parameters())


def test_teacher_changes_what_is_learnt_but_not_where_it_starts(folder, tmp_path, distilled):
    weights = []
    for recipe in (RECIPE, distilled, replace(distilled, distill="soft", distill_temperature=3.0)):
        run = prepare(recipe, Setting(folder, tmp_path / "run", CPU), fresh=True)
        state = initial_state(run)
        start = state.model.head.weight.detach().clone()
        train_step(run, state, state.model, next(iter(run.loader)))
        weights.append((start, state.model.head.weight.detach()))
    assert torch.equal(weights[0][0], weights[1][0])
    assert not any(torch.equal(weights[0][1], other) for _, other in weights[1:])
    assert not torch.equal(weights[1][1], weights[2][1])


def test_two_classifiers_learn_one_from_labels_one_from_the_teacher(folder, tmp_path, distilled):
    recipe = replace(distilled, model="test_groupmamba", model_kwargs={}, img_size=(32, 32), distill_weight=1.0)
    run = prepare(recipe, Setting(folder, tmp_path / "run", CPU), fresh=True)
    state = initial_state(run)
    train_step(run, state, state.model, next(iter(run.loader)))
    head = state.model.head
    assert not head.fc.weight.grad.any()
    assert head.fc_dist.weight.grad.any()
    images = torch.zeros(1, 1, 32, 32)
    assert isinstance(state.model(images), tuple)
    assert state.ema.module(images).shape == (1, 2)  # what is evaluated gives the mean
    plain = prepare(replace(recipe, distill_teacher=None, distill_checkpoint=None), run.setting, fresh=True)
    assert plain.classifier.model.train()(images).shape == (1, 2)


def test_blanks_add_nothing_to_any_term(folder, tmp_path, distilled):
    steps = []
    for accum in (1, 4):
        recipe = replace(distilled, accum=accum, drop_path=0.0, mesa=1.0, mixup=0.0, cutmix=0.0)
        run = prepare(recipe, Setting(folder, tmp_path / "run", CPU), fresh=True)
        state = initial_state(run)
        batch = next(iter(run.loader))
        few = Batch(batch.images[:2], batch.targets[:2], batch.indices[:2], ["x.png: not a readable image"] * 6)
        outcome = train_step(run, state, state.model, few)
        steps.append((outcome.loss, [each.grad.clone() for each in state.model.parameters()]))
    assert steps[0][0] == pytest.approx(steps[1][0], rel=1e-5)
    torch.testing.assert_close(steps[0][1], steps[1][1], rtol=1e-4, atol=1e-5)


def test_moving_average_is_followed_from_its_epoch_on(folder, tmp_path):
    """With a moving average that equals the model, the cross-entropy to it is the entropy of what they predict."""
    recipe = replace(RECIPE, mesa=2.0, mesa_start_epoch=1, drop_path=0.0, mixup=0.0, cutmix=0.0)
    losses = []
    for epoch in range(2):
        run = prepare(recipe, Setting(folder, tmp_path / "run", CPU), fresh=True)
        state = initial_state(run)
        state.history = [{}] * epoch
        batch = next(iter(run.loader))
        with torch.no_grad():
            logits = state.model(batch.images).log_softmax(1)
        losses.append(train_step(run, state, state.model, batch).loss)
    entropy = -(logits.exp() * logits).sum().item()
    assert losses[1] - losses[0] == pytest.approx(2 * entropy, rel=1e-4)


@pytest.mark.parametrize("model", ["test_vim", "test_groupmamba"])
def test_resumed_run_equals_the_uninterrupted_one(folder, tmp_path, distilled, model):
    recipe = replace(distilled, mesa=1.5, mesa_start_epoch=1)
    if model != "test_vim":
        recipe = replace(recipe, model=model, model_kwargs={}, img_size=(32, 32), epochs=2)
    whole, parts = (Setting(folder, tmp_path / name, CPU) for name in ("whole", "parts"))
    record = train(recipe, whole)
    with pytest.raises(Stopped):
        train(recipe, parts, stop=StopAtLook(7))  # in the second epoch, which evaluation has preceded
    stored = read_state(parts.output)
    again = train(Recipe.from_dict(stored["run"]["recipe"]), parts, resume=stored)
    assert (record["loss"], record["train_loss"]) == (again["loss"], again["train_loss"])
    states = read_state(whole.output), read_state(parts.output)
    for part in ("model", "model_ema"):
        assert all(torch.equal(states[0][part][name], states[1][part][name]) for name in states[0][part])
    without = train(replace(recipe, mesa=0.0), replace(whole, output=tmp_path / "without"))
    assert without["loss"] != record["loss"]


def test_other_numbers_of_classes_are_one_line_with_both(folder, tmp_path, capsys):
    three = _teacher_file(tmp_path / "three.safetensors", classes=("a", "b", "c"))
    bare = tmp_path / "bare.safetensors"
    Path(three).rename(bare)
    three = _teacher_file(tmp_path / "three.safetensors", classes=("a", "b", "c"))
    names = _teacher_file(tmp_path / "names.safetensors", classes=("light", "dark"))
    cases = [
        (["test_resnet"], "expected a teacher of 2 classes, as many as test_vim learns, got test_resnet with 1000"),
        (
            ["test_resnet", "--distill-checkpoint", three],
            "a teacher of 2 classes, as many as test_vim learns, got test_",
        ),
        (
            ["test_resnet", "--distill-checkpoint", bare],
            f"{bare} does not suit the teacher test_resnet: checkpoint: the checkpoint has 3 classes and ResNet has 2",
        ),
        (["test_resnet", "--distill-checkpoint", names], "which calls 'light' what the data call 'dark'"),
        (["test_resnet", "--distill-checkpoint", "nowhere.pth"], "no file"),
        (["test_resmet"], "create_model: unknown model 'test_resmet'; the nearest names are "),
        (["test_resnet", "--mesa", "1"], "expected --model-ema for --mesa 1, which learns from it, got none"),
    ]
    for options, message in cases:
        output = tmp_path / "run"
        command = ["train", folder, "--output", output, *TINY, "--distill-teacher", *options]
        assert main(list(map(str, command))) == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith("vssm train: ")
        assert message in error.splitlines()[-1]
        assert not output.exists()


def test_options_reach_the_run_and_its_record(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _teacher_file(tmp_path / "teacher.safetensors")
    options = (
        "--distill-teacher test_resnet --distill-checkpoint teacher.safetensors --distill soft --distill-weight 0.4"
    )
    options += " --distill-temperature 2 --model-ema --mesa 1 --mesa-start-epoch 1 --epochs 2 --warmup-epochs 0"
    assert main(["train", str(folder), "--output", "run", *TINY, *options.split()]) == 0
    (record,) = json.loads(Path("run/record.json").read_text())
    found = {name: value for name, value in record["recipe"].items() if name.startswith(("distill", "mesa"))}
    assert found == {
        "distill_teacher": "test_resnet",
        "distill_checkpoint": str(tmp_path / "teacher.safetensors"),
        "distill": "soft",
        "distill_weight": 0.4,
        "distill_temperature": 2.0,
        "distill_tokens": 0.0,
        "mesa": 1.0,
        "mesa_start_epoch": 1,
    }


def test_published_recipes_learn_from_whom_the_authors_say():
    found = {}
    for path in (CONFIGS / "imagenet").glob("[!_]*.yaml"):
        parser = Parser(prog="vssm train")
        train_command.add_arguments(parser)
        options = train_command.model_options(parse_with_config(parser, ["--config", str(path)]))
        recipe = Recipe().with_options(options)
        if recipe.distill_teacher is not None:
            found[path.stem] = (recipe.distill_teacher, recipe.distill, recipe.distill_weight)
        if recipe.mesa:
            found[path.stem] = (recipe.mesa, recipe.mesa_start_epoch)
    teacher = ("regnety_160.deit_in1k", "hard", 0.5)
    assert found == {
        **{f"groupmamba_{size}": teacher for size in ("tiny", "small", "base")},
        **{f"a2mamba_{size}": (w, 75) for size, w in (("tiny", 1), ("small", 1), ("base", 1.5), ("large", 2))},
    }
    assert timm.get_pretrained_cfg(teacher[0]).url.endswith("/regnety_160-a5fe301d.pth")  # the file of DeiT's authors


@pytest.mark.parametrize("guide", ["teacher", "moving average"])
def test_guide_that_is_not_finite_is_named(folder, tmp_path, distilled, guide):
    run = prepare(replace(distilled, mesa=1.0), Setting(folder, tmp_path / "run", CPU), fresh=True)
    state = initial_state(run)
    model = run.teacher.model if guide == "teacher" else state.ema.module
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteLoss) as failure:
        train_step(run, state, state.model, next(iter(run.loader)))
    assert f"first, the output of the {guide} is not finite" in explain(run, state, failure.value)


def test_both_classifiers_get_a_new_head(folder, tmp_path):
    path = _teacher_file(tmp_path / "three.safetensors", model="test_groupmamba", classes=("a", "b", "c"))
    recipe = replace(RECIPE, model="test_groupmamba", model_kwargs={}, img_size=(32, 32), num_classes=2)
    setting = Setting(folder, tmp_path / "run", CPU, initial_checkpoint=Path(path), new_head=True)
    own, stored = prepare(recipe, setting, fresh=True).classifier.model.state_dict(), load_file(path)
    heads = {name for name in own if not torch.equal(own[name], stored[name])}
    assert heads == {f"head.{layer}.{kind}" for layer in ("fc", "fc_dist") for kind in ("weight", "bias")}
