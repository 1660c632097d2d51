import csv
import json
import math
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from image_folders import TINY, make_folder
from tar_files import png, write_tar
from vssm.cli import demo as demo_command
from vssm.cli import main
from vssm.data import DataOptions, open_dataset
from vssm.data.loaders import InputConfig, eval_loader
from vssm.engine import classifier as classifiers
from vssm.engine import demo as demo_engine
from vssm.engine.checkpoints import state_files
from vssm.engine.classifier import Classifier, ModelSpec
from vssm.engine.contact_sheet import draw_contact_sheet
from vssm.engine.evaluate import evaluate, open_for
from vssm.engine.predict import gather_images, predict

CPU = torch.device("cpu")
SPEC = ModelSpec(
    model="test_vim",
    model_kwargs={"embed_dim": 8, "depth": 1, "patch_size": 8, "d_state": 1},
    in_chans=1,
    img_size=(16, 16),
)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VSSM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with data and the run of a model that has learnt them."""
    root = tmp_path_factory.mktemp("run")
    make_folder(root / "data", val=6)
    options = ["--epochs", "8", "--lr", "1e-2", "--mixup", "0", "--cutmix", "0", "--reprob", "0", "--color-jitter", "0"]
    assert main(["train", str(root / "data"), "--output", str(root / "output"), *TINY, *options]) == 0
    return root


@pytest.fixture
def checkpoint(run) -> str:
    return str(run / "output" / "final.safetensors")


class _Brightness(nn.Module):
    """Logits that are a table's row, which the image's brightness chooses."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.table[images.amax((1, 2, 3)).mul(10).round().long()]


def _images(root: Path, brightness: list[int], classes: int) -> Path:
    for index in range(classes):
        (root / "val" / str(index)).mkdir(parents=True)
    for number, level in enumerate(brightness):
        pixels = np.full((4, 4), round(25.5 * level), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "val" / str(number % classes) / f"{number}.png")
    return root


def test_metrics_equal_those_by_hand(tmp_path):
    # Images 0 to 6 are of the classes 0 to 6 and get the rows 0 to 6: ranks of the true class 1, 1, 2, 5, 6, 7, 1.
    ranks = [1, 1, 2, 5, 6, 7, 1]
    table = torch.zeros(11, 7)
    for target, rank in enumerate(ranks):
        others = [each for each in range(7) if each != target]
        for place, each in enumerate([*others[: rank - 1], target, *others[rank - 1 :]]):
            table[target, each] = -place
    root = _images(tmp_path, list(range(7)), 7)
    config = InputConfig(1, 4, 4, (0.0,), (1.0,), "nearest", 1.0)
    loader = eval_loader(open_dataset(root, "val"), config, batch_size=3)
    metrics = evaluate(_Brightness(table).train(), loader, source="x", device=CPU)
    assert (metrics["images"], metrics["correct_top1"], metrics["correct_top5"]) == (7, 3, 5)
    assert metrics["top1"] == pytest.approx(100 * 3 / 7, rel=1e-12)
    assert metrics["top5"] == pytest.approx(100 * 5 / 7, rel=1e-12)
    normaliser = math.log(sum(math.exp(-place) for place in range(7)))
    assert metrics["loss"] == pytest.approx(sum(normaliser + rank - 1 for rank in ranks) / 7, rel=1e-6)


def test_logits_that_are_not_finite_are_no_accuracy(tmp_path):
    root = _images(tmp_path, [0, 1], 2)
    loader = eval_loader(open_dataset(root, "val"), InputConfig(1, 4, 4, (0.0,), (1.0,)), batch_size=2)
    with pytest.raises(ValueError, match="logits are not finite"):
        evaluate(_Brightness(torch.full((11, 2), float("nan"))), loader, source="x", device=CPU)


def test_evaluation_leaves_the_mode_of_the_model(tmp_path):
    root = _images(tmp_path, [0, 1], 2)
    loader = eval_loader(open_dataset(root, "val"), InputConfig(1, 4, 4, (0.0,), (1.0,)), batch_size=2)
    for model in (_Brightness(torch.zeros(11, 2)).train(), _Brightness(torch.zeros(11, 2)).eval()):
        before = model.training
        evaluate(model, loader, source="x", device=CPU)
        assert model.training is before


def test_validate_needs_only_the_checkpoint(run, checkpoint, tmp_path, capsys):
    results = tmp_path / "results.json"
    assert main(["validate", str(run / "data"), "--checkpoint", checkpoint, "--results", str(results)]) == 0
    (record,) = json.loads(results.read_text())
    (trained,) = json.loads((run / "output" / "record.json").read_text())
    assert record["loss"] == pytest.approx(trained["loss"], rel=1e-5)
    assert (record["top1"], record["images"], record["correct_top1"]) == (100, 12, 12)
    assert record["spec"]["model"] == "test_vim"
    assert "test_vim" in capsys.readouterr().out


def test_validate_takes_the_weights_of_the_training_state_with_a_model_name(run, tmp_path):
    state = state_files(run / "output")[0]
    results = tmp_path / "results.csv"
    command = ["validate", str(run / "data"), "--checkpoint", str(state), *TINY[:-6], "--num-classes", "2"]
    assert main([*command, "--results", str(results)]) == 0
    (row,) = csv.DictReader(results.open())
    assert float(row["top1"]) >= 90


def _fails(capsys, *argv: object) -> str:
    status = main([str(word) for word in argv])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status in (1, 2)
    assert error.startswith(f"vssm {argv[0]}: ")
    return error


def test_checkpoints_that_do_not_fit_are_one_line(run, checkpoint, tmp_path, capsys):
    data = run / "data"
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(Path(checkpoint).read_bytes())
    assert "alone.json, which would describe its model, is not beside it; name the model with --model" in _fails(
        capsys, "validate", data, "--checkpoint", alone
    )
    kwargs = ["--img-size", "16", "--in-chans", "1"]
    other = _fails(
        capsys, "validate", data, "--checkpoint", alone, "--model", "test_vim", "--num-classes", "2", *kwargs
    )
    assert "does not fit Vim" in other
    tiny = TINY[:-6]
    assert "(--num-classes 2)" in _fails(capsys, "validate", data, "--checkpoint", alone, *tiny, "--num-classes", "5")
    alone.write_bytes(alone.read_bytes()[:500])
    assert "alone.safetensors' is not a complete safetensors file" in _fails(
        capsys, "validate", data, "--checkpoint", alone
    )
    assert "no file" in _fails(capsys, "validate", data, "--checkpoint", tmp_path / "nowhere.pth")


def test_data_with_other_classes_than_the_checkpoint_is_refused(run, checkpoint, tmp_path, capsys):
    data = make_folder(tmp_path, classes=("cat", "dog"))
    error = _fails(capsys, "validate", data, "--checkpoint", checkpoint)
    assert "2 of its 2 classes (cat, dog) are not among the 2 known (dark, light)" in error
    assert "expected 2 others" in _fails(capsys, "validate", "--checkpoint", checkpoint)


def test_unnamed_classes_must_be_as_many_as_those_of_the_data(tmp_path):
    data = make_folder(tmp_path)
    unnamed = classifiers.build(ModelSpec.from_dict({**SPEC.as_dict(), "num_classes": 3}))
    with pytest.raises(ValueError, match="expected 3 classes, as test_vim has, got 2"):
        open_for(unnamed, data)


def test_validate_asks_for_weights(capsys):
    for options in ([], ["--model", "test_vim"]):
        assert "expected --checkpoint FILE, or --model NAME --pretrained" in _fails(capsys, "validate", *options)
    assert "got both" in _fails(capsys, "validate", "--checkpoint", "x.pth", "--pretrained")
    assert "--batch-size: expected a positive integer, got 0" in _fails(capsys, "validate", "--batch-size", "0")
    assert "float16 needs a GPU" in _fails(capsys, "predict", "x.png", "--amp-dtype", "float16", "--device", "cpu")


def test_download_that_fails_names_the_option_for_a_file_at_hand(monkeypatch, capsys, tmp_path):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert main(["validate", "--model", "vim_tiny_patch16_224", "--pretrained"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no route to host" in line
    assert line.endswith("commands take it with --checkpoint, train with --initial-checkpoint")


def test_predict_prints_and_writes_probabilities(run, checkpoint, tmp_path, capsys):
    folder, picture, records = run / "data" / "val", tmp_path / "sheet.png", tmp_path / "out.json"
    command = ["predict", str(folder), "--checkpoint", checkpoint, "--results", str(records), "--picture", str(picture)]
    assert main([*command, "--top-k", "7"]) == 0
    content = json.loads(records.read_text())
    assert len(content) == 12
    for record in content:
        assert record["correct"] is True
        assert record["true"] == Path(record["image"]).parent.name == record["predictions"][0]["class"]
        probabilities = [each["probability"] for each in record["predictions"]]
        assert len(probabilities) == 2
        assert sum(probabilities) == pytest.approx(1, abs=1e-6)
        assert probabilities == sorted(probabilities, reverse=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}/dark/000.png  (true: dark)"
    assert lines[1].split() == [f"{content[0]['predictions'][0]['probability']:.2%}", "dark"]
    assert Image.open(picture).width > 400


def test_predictions_equal_the_model_on_the_normalised_image(run, checkpoint):
    classifier = classifiers.load(checkpoint)
    path = run / "data" / "val" / "light" / "000.png"
    (record,) = predict(classifier, gather_images([path], classifier), device=CPU)
    pixels = torch.tensor(np.asarray(Image.open(path).convert("L"))) / 255  # 16x16 of 16/0.875: resized, then cropped
    assert record["true"] is None
    assert record["correct"] is None
    image = classifier.config.transform()(Image.open(path).convert("L"))
    assert image.mean() == pytest.approx(
        float((pixels.mean() - classifier.config.mean[0]) / classifier.config.std[0]), abs=0.1
    )
    expected = classifier.model(image[None]).softmax(-1)[0].max().detach()
    assert record["predictions"][0]["probability"] == pytest.approx(float(expected), abs=1e-6)


def test_predict_goes_on_after_images_that_cannot_be_read_and_fails_in_the_end(
    run, checkpoint, tmp_path, capsys, caplog
):
    bad, empty = tmp_path / "bad.png", tmp_path / "empty.jpg"
    bad.write_text("not an image")
    empty.touch()
    good = run / "data" / "val" / "light" / "000.png"
    results, picture = tmp_path / "out.json", tmp_path / "sheet.png"
    outputs = ("--checkpoint", checkpoint, "--results", results, "--picture", picture)
    error = _fails(capsys, "predict", bad, good, empty, good, *outputs)
    assert error == "vssm predict: 2 of 4 images cannot be read and were left out"
    assert [(record["index"], record["image"]) for record in json.loads(results.read_text())] == [
        (1, str(good)),
        (3, str(good)),
    ]
    assert f"left out: {bad}: not a readable image (cannot identify image file)" in caplog.messages
    assert f"left out: {empty}: not a readable image (it is empty)" in caplog.messages
    picture.unlink()
    assert "1 of 1 images cannot be read" in _fails(capsys, "predict", bad, *outputs)
    assert json.loads(results.read_text()) == []
    assert not picture.exists()


def test_predict_refuses_what_is_no_image(run, checkpoint, tmp_path, capsys):
    good = run / "data" / "val" / "light" / "000.png"
    assert "no such image file or folder" in _fails(capsys, "predict", tmp_path / "no.png", "--checkpoint", checkpoint)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no images in this folder" in _fails(capsys, "predict", empty, "--checkpoint", checkpoint)
    error = _fails(capsys, "predict", good, "--checkpoint", checkpoint, "--picture", "sheet.txt")
    assert "expected a file name ending in .png, .jpg" in error


def test_predict_takes_data_sets_of_every_kind_and_leaves_out_what_it_cannot_read(run, checkpoint, tmp_path, caplog):
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        archive.add(run / "data" / "val", arcname=".")
    many = make_folder(tmp_path / "many", train=1, val=75)
    (many / "val" / "light" / "074.png").write_bytes(b"not an image")
    results = tmp_path / "out.csv"
    places = [tmp_path / "val.tar", run / "data" / "val" / "dark" / "000.png", many / "val", tmp_path / "{val}.tar"]
    places[-1] = Path(f"{tmp_path}/{{val,val}}.tar")
    command = ["predict", *map(str, places), "--checkpoint", checkpoint, "--results", str(results), "--top-k", "1"]
    assert main([*command, "--workers", "1"]) == 1
    rows = list(csv.DictReader(results.open()))
    assert [int(row["index"]) for row in rows] == [*range(12), 12, *range(13, 162), *range(163, 187)]
    assert [row["true"] for row in rows[::6]][:3] == ["dark", "light", ""]
    assert rows[0]["image"].startswith(f"{tmp_path}/val.tar/")
    assert all(row["class_1"] == row["true"] and float(row["probability_1"]) > 0.5 for row in rows if row["true"])
    assert "left out: " in caplog.text
    assert "074.png: not a readable image" in caplog.text


def test_known_classes_of_images_are_told_by_folder_index_or_synset(tmp_path):
    unnamed = classifiers.build(ModelSpec.from_dict({**SPEC.as_dict(), "num_classes": 1000}))
    places = [
        write_tar(tmp_path / "synsets.tar", {"n01443537/1.png": png(1), "unheard_of/2.png": png(1)}),
        write_tar(tmp_path / "indices.tar", {"1.png": png(1), "1.cls": 3, "2.png": png(1), "2.cls": 1000}),
    ]
    assert gather_images(places, unnamed).targets == (1, -1, 3, -1)
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\nn01440764\n")
    assert gather_images(places[1:], unnamed, options=DataOptions(class_names=names)).targets == (0, -1)
    labels = tmp_path / "labels.txt"
    labels.write_text("1 n01443537\n2 unheard_of\n")
    assert gather_images(places[1:], unnamed, options=DataOptions(val_labels=labels)).targets == (1, -1)
    write_tar(tmp_path / "folder" / "x.tar", {"n01443537/1.png": png(1)})
    assert gather_images([tmp_path / "folder"], unnamed).targets == (1,)


def test_classes_without_names_are_called_by_imagenet_or_by_number():
    spec = ModelSpec.from_dict({**SPEC.as_dict(), "num_classes": 1000})
    assert classifiers.build(spec).classes[5] == "electric ray, crampfish, numbfish, torpedo"
    assert classifiers.build(spec.with_options({"num_classes": 3})).classes == ("0", "1", "2")
    assert classifiers.build(spec.with_options({"num_classes": 3}), classes=("a", "b")).classes == ("a", "b", "2")


def test_input_follows_the_model_unless_told():
    own = classifiers.build(ModelSpec(model="test_vim")).config
    assert (own.channels, own.height, own.width, own.crop_pct) == (3, 96, 96, 0.875)
    told = classifiers.build(ModelSpec(model="test_vim", in_chans=1, img_size=(32, 48), crop_pct=1.0)).config
    assert (told.channels, told.height, told.width, told.crop_pct) == (1, 32, 48, 1.0)
    assert told.mean == pytest.approx((sum(own.mean) / 3,))


def test_sheet_marks_wrong_ones_in_red(tmp_path):
    images = open_dataset(None, "val")

    def record(index: int, predicted: int) -> dict:
        true = images.classes[images.targets[index]]
        best = {"class": images.classes[predicted], "probability": 0.9}
        return {"index": index, "true": true, "correct": str(predicted) == true, "predictions": [best]}

    right = [record(index, images.targets[index]) for index in range(6)]
    wrong = [record(index, (images.targets[index] + 1) % 10) for index in range(6)]
    assert draw_contact_sheet(tmp_path / "right.png", images, right, title="all right") == 6
    assert draw_contact_sheet(tmp_path / "wrong.png", images, wrong, title="all wrong") == 6
    red = [
        int((np.asarray(Image.open(tmp_path / name)) == (208, 2, 27)).all(-1).sum())
        for name in ("right.png", "wrong.png")
    ]
    assert red[0] == 0
    assert red[1] > 6 * 4 * 100  # the frames alone
    assert draw_contact_sheet(tmp_path / "many.png", images, right * 20, title="120") == 100


def test_demo_ends_with_pictures_a_record_and_a_verdict(tmp_path, monkeypatch, capsys):
    fast = demo_engine.DIGITS.with_options({"epochs": 1, "warmup_epochs": 0, "model_kwargs": dict(SPEC.model_kwargs)})
    monkeypatch.setattr(demo_engine, "DIGITS", fast)
    output = tmp_path / "demo"
    for again in (False, True):
        assert main(["demo", "--output", str(output)]) == 1  # nothing is learnt so fast
        printed = capsys.readouterr()
        assert ("holds an earlier demonstration" in printed.out) is again
        assert printed.err.splitlines()[-1].startswith("vssm demo: expected at least 97 % of the held-out digits right")
        assert printed.out.count("in truth a") == 3
    assert {path.name for path in output.iterdir()} == {*demo_engine._WRITTEN, "images", "state-00000045.pth"}
    (record,) = json.loads((output / "record.json").read_text())
    assert record["held_out"]["images"] == 355
    assert len(record["wrong"]) == 355 - record["held_out"]["correct_top1"]
    assert len(list((output / "images").glob("*/*.png"))) == 20
    assert main(["predict", str(output / "images"), "--checkpoint", str(output / "final.safetensors")]) == 0


def test_demo_shows_a_command_that_works_where_the_environment_is_not_activated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert demo_command._command() == "vssm"
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "vssm").touch()
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    assert demo_command._command() == ".venv/bin/vssm"


@pytest.mark.slow
def test_digits_are_learnt(tmp_path):
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 0


def test_classifier_of_an_extended_head_has_more_names_than_data():
    spec = ModelSpec(model="test_vim", num_classes=12)
    model = Classifier(nn.Identity(), spec, InputConfig(), tuple("0123456789"))
    assert model.classes[-3:] == ("9", "10", "11")
