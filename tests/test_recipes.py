"""The published recipes for classifiers: there is one for every model that has any, and each of them trains."""

import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.layers import DropPath

import vssm
from image_folders import make_folder
from vssm.cli import main
from vssm.cli import train as train_command
from vssm.cli._options import Parser
from vssm.cli.config import parse_with_config
from vssm.engine import classifier as classifiers
from vssm.engine.classifier import ModelSpec
from vssm.engine.published import PUBLISHED, PUBLISHED_DETECTORS
from vssm.engine.recipe import Recipe
from vssm.engine.training_setup import Setting, initial_state, prepare
from vssm.engine.zoo import family_of

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted((CONFIGS / "imagenet").glob("[!_]*.yaml"))
NAMES = [name for name in vssm.list_models() if not name.startswith("test_")]
WITHOUT_RECIPE = {"vim_base_patch16_224"}  # its authors released scripts of the tiny and the small model only
TRAINING_IMAGES = 1_281_167  # of ImageNet-1k
COCO_IMAGES = 118_287  # of train2017
IN_MILLIONS = 1e6

by_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def stand_in(model: str) -> list[str]:
    """Options that take the small model of the same architecture, a small image and a small batch."""
    prefix = model.partition("_")[0]  # LocalMamba has two architectures
    name = f"test_{prefix if vssm.list_models(f'test_{prefix}') else family_of(model)}"
    size = "96" if name == "test_a2mamba" else "32"  # whose windows do not fit into less
    return ["--model", name, "--img-size", size, "--batch-size", "4", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("recipes") / "data")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> list[str]:
    """Options that put a small model with random weights in the place of a teacher whose weights are downloaded."""
    path = tmp_path_factory.mktemp("recipes") / "teacher.safetensors"
    classifier = classifiers.build(ModelSpec(model="test_resnet"), classes=("dark", "light"))
    classifiers.save(path, classifier, classifier.model.state_dict(), {})
    return ["--distill-teacher", "test_resnet", "--distill-checkpoint", str(path)]


def written_in(path: Path) -> dict:
    """What the recipe and the defaults beside it say, by the names of settings."""
    files = [yaml.safe_load(each.read_text()) for each in (path.with_name("_default.yaml"), path)]
    return {key.replace("-", "_"): value for key, value in {**files[0], **files[1]}.items()}


def recipe_and_setting(*argv: str) -> tuple[Recipe, Setting]:
    parser = Parser(prog="vssm train")
    train_command.add_arguments(parser)
    return train_command._what_and_where(parse_with_config(parser, [*argv, "--device", "cpu", "--dry-run"]), None)


def test_every_model_with_published_settings_has_a_recipe():
    detectors = re.findall(r'model_name="(\w+)"', "".join(p.read_text() for p in (CONFIGS / "mmdet").glob("yolo_*.py")))
    assert {path.stem for path in RECIPES} | set(detectors) | WITHOUT_RECIPE == set(NAMES)
    assert set(detectors) == set(PUBLISHED_DETECTORS)
    assert not WITHOUT_RECIPE & {path.stem for path in RECIPES}


@by_recipe
def test_recipe_begins_with_the_accuracy_to_expect_and_what_it_costs(path):
    comment = " ".join(line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
    published = re.search(r"Published(?:, as preliminary)?: ([\d.]+) % top-1", comment)
    assert float(published[1]) == PUBLISHED[path.stem].top1
    assert re.search(r"arXiv:\d{4}\.\d{5}", comment)
    cost = re.search(r"Cost: (\d+) epochs are (\d+) million images", comment)
    assert int(cost[1]) == written_in(path)["epochs"]
    assert int(cost[2]) == round(int(cost[1]) * TRAINING_IMAGES / IN_MILLIONS)
    assert f"vssm benchmark {path.stem} --train tells how many a second" in comment


@pytest.mark.parametrize("name", PUBLISHED_DETECTORS)
def test_recipe_of_a_detector_begins_with_the_ap_to_expect_and_what_it_costs(name):
    path = CONFIGS / "mmdet" / f"yolo_{name.replace('_', '-')}_pafpn_300e_coco.py"
    published, cost, *_ = path.read_text().splitlines()
    assert published.startswith(f"# Published by its authors: {PUBLISHED_DETECTORS[name].ap} box AP on val2017")
    assert f"300 epochs are {300 * COCO_IMAGES / IN_MILLIONS:.0f} million images" in cost


@by_recipe
def test_every_line_of_a_recipe_reaches_the_training(path, folder):
    recipe, setting = recipe_and_setting(str(folder), "--config", str(path))
    written = written_in(path)
    assert setting.workers == written.pop("workers")
    for key, value in written.items():
        found = getattr(recipe, key)
        expected = (value, value) if key == "img_size" else tuple(value) if isinstance(value, list) else value
        assert found == (pytest.approx(float(value)) if isinstance(found, float) else expected), key
    with torch.device("meta"):
        model = classifiers.build(recipe).model
    rates = [each.drop_prob for each in model.modules() if isinstance(each, DropPath)]
    assert max(rates, default=0.0) == pytest.approx(recipe.drop_path or 0.0)


@by_recipe
def test_recipe_trains_a_small_model_of_the_same_architecture(path, folder, teacher, capsys):
    distilled = "distill_teacher" in written_in(path)
    options = ["--config", str(path), *stand_in(path.stem), *(teacher if distilled else [])]
    assert main(["train", str(folder), *options, "--dry-run"]) == 0
    assert "two steps took " in capsys.readouterr().out


@by_recipe
def test_optimizer_and_average_are_those_of_the_recipe(path, folder, teacher):
    written = written_in(path)
    distilled = "distill_teacher" in written
    options = ["--config", str(path), *stand_in(path.stem), *(teacher if distilled else [])]
    recipe, setting = recipe_and_setting(str(folder), *options)
    state = initial_state(prepare(recipe, setting, fresh=True))
    assert isinstance(state.optimizer, timm.optim.get_optimizer_class(written["opt"]))
    assert max(group["weight_decay"] for group in state.optimizer.param_groups) == float(written["weight_decay"])
    assert (state.ema is not None) == written["model_ema"]
    if state.ema is not None:
        assert state.ema.decay == written["model_ema_decay"]


def test_recipe_of_small_images_trains_patches_of_four_pixels(folder, capsys):
    config = CONFIGS / "small" / "images_64.yaml"
    options = ["--model", "test_vim", "--model-kwargs", "patch_size=4", "depth=1", "embed_dim=16", "--batch-size", "4"]
    assert main(["train", str(folder), "--config", str(config), *options, "--device", "cpu", "--dry-run"]) == 0
    assert "two steps took " in capsys.readouterr().out
