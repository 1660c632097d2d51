"""``vssm validate``: many models, results that are gone on with, real labels, accuracy per class, all kinds of data."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from timm.data import RealLabelsImagenet

from image_folders import make_folder
from tar_files import png, write_shards, write_tar
from vssm.cli import main
from vssm.data import LabelledImages
from vssm.data.loaders import Batch
from vssm.engine import classifier as classifiers
from vssm.engine.classifier import ModelSpec
from vssm.engine.evaluate import open_for, validate
from vssm.engine.memory import halving
from vssm.engine.sweep import Subject, find_subjects, sweep
from vssm.engine.tallies import PerClass, RealLabels, read_real_labels, real_labels_of

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


@pytest.fixture
def data(tmp_path) -> Path:
    return make_folder(tmp_path / "data", train=1, val=3)


def save(path: Path, *, classes: tuple[str, ...] = ("dark", "light"), bias: int = 0) -> Path:
    """Writes a model that sees one class everywhere."""
    classifier = classifiers.build(SPEC, classes=classes)
    weights = classifier.model.state_dict()
    weights["head.weight"].zero_()
    weights["head.bias"].zero_()[bias] = 1
    path.parent.mkdir(exist_ok=True)
    classifiers.save(path, classifier, weights, {})
    return path


def fails(capsys, *argv: object) -> str:
    assert main(["validate", *map(str, argv)]) in (1, 2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vssm validate: ")
    return error


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_a_folder_of_checkpoints_is_measured_once(data, tmp_path, capsys, caplog, suffix):
    folder, results = tmp_path / "runs", tmp_path / f"results.{suffix}"
    for bias in (0, 1):
        save(folder / f"m{bias}.safetensors", bias=bias)
    (folder / "state-00000012.pth").write_bytes(b"a state to resume from")
    command = ["validate", str(data), "--checkpoint", str(folder), "--results", str(results)]
    caplog.set_level("INFO")
    assert main(command) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in table] == [["model", "top1"], ["test_vim", "50"], ["test_vim", "50"]]
    first = results.read_bytes()
    caplog.clear()
    assert main(command) == 0
    assert results.read_bytes() == first
    assert "skipped, since" in caplog.text
    assert capsys.readouterr().out == ""
    save(folder / "m2.safetensors")
    assert main([*command, "--batch-size", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main([*command, "--crop-pct", "1.0"]) == 0
    text = results.read_text()
    records = json.loads(text) if suffix == "json" else list(csv.DictReader(text.splitlines()))
    assert [Path(record["checkpoint"]).name for record in records] == [f"m{i}.safetensors" for i in (0, 1, 2, 0, 1, 2)]
    assert [int(record["batch_size"]) for record in records] == [64, 64, 2, 64, 64, 64]


def test_a_checkpoint_that_has_changed_is_measured_again(data, tmp_path):
    results, file = tmp_path / "r.json", save(tmp_path / "m.safetensors")
    for bias in (0, 1):
        save(file, bias=bias)
        assert main(["validate", str(data), "--checkpoint", str(file), "--results", str(results)]) == 0
    assert len(json.loads(results.read_text())) == 2


def test_results_are_written_after_every_model(tmp_path):
    results, subjects = tmp_path / "r.json", [Subject(name) for name in "abc"]
    done: list[str] = []

    def measure(subject: Subject) -> dict:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(subject.name)
        return {"model": subject.name}

    with pytest.raises(KeyboardInterrupt):
        sweep(subjects, measure, results=results)
    assert [record["model"] for record in json.loads(results.read_text())] == ["a", "b"]
    done.clear()
    sweep(subjects, measure, results=results)
    assert done == ["c"]
    assert [record["model"] for record in json.loads(results.read_text())] == ["a", "b", "c"]


def test_a_model_that_cannot_be_measured_does_not_stop_the_others(data, tmp_path, capsys, caplog):
    folder = tmp_path / "runs"
    save(folder / "a.safetensors", classes=("cat", "dog"))
    save(folder / "b.safetensors")
    (folder / "c.safetensors").write_bytes((folder / "b.safetensors").read_bytes()[:300])
    (folder / "c.json").write_text((folder / "b.json").read_text())
    save(folder / "d.safetensors", bias=1)
    results = tmp_path / "r.json"
    error = fails(capsys, data, "--checkpoint", folder, "--results", results)
    assert (
        error == f"vssm validate: 2 of 4 models could not be measured: {folder}/a.safetensors, {folder}/c.safetensors"
    )
    assert "(dark, light) are not among the 2 known (cat, dog)" in caplog.text
    assert "is not a complete safetensors file" in caplog.text
    assert [Path(each["checkpoint"]).name for each in json.loads(results.read_text())] == [
        "b.safetensors",
        "d.safetensors",
    ]


def test_models_are_found_by_pattern_and_list(tmp_path):
    listed = tmp_path / "models.txt"
    listed.write_text("# peers\nvim_tiny_patch16_stride8_224\nvim_small_*  # both\n\nvim_small_patch16_224.in1k\n")
    names = [subject.model for subject in find_subjects(str(listed), None)]
    assert names[0] == "vim_tiny_patch16_stride8_224"
    assert len(names) == len(set(names)) == 3
    assert all(name.startswith("vim_small") and "." in name for name in names[1:])
    assert {subject.model for subject in find_subjects("deit_tiny*", None)} >= {"deit_tiny_patch16_224.fb_in1k"}


def test_bad_names_and_folders_are_told_apart(data, tmp_path, capsys):
    save(tmp_path / "runs" / "a.safetensors").with_suffix(".json").unlink()
    for argv, message in (
        (["--model", "vimm_*", "--pretrained"], "no model with published weights matches 'vimm_*'; those of vssm are"),
        (["--model", "vimm_tiny", "--pretrained"], "unknown model 'vimm_tiny'; the nearest names are"),
        (["--model", "no.txt", "--pretrained"], "no.txt: no such list of models"),
        (
            ["--checkpoint", data],
            "expected checkpoints (.safetensors, .pth, .pt, .bin, .tar, .ckpt) in this folder, got",
        ),
        (["--checkpoint", tmp_path / "runs"], "without a description beside them: name their model with --model"),
        (["--checkpoint", tmp_path / "runs", "--model", "test_vim"], "does not fit Vim"),
        (["--checkpoint", "x.pth", "--real-labels", "no.json"], "no file 'x.pth'"),
    ):
        assert message in fails(capsys, data, *argv)
    (tmp_path / "empty.txt").write_text("# none\n")
    assert "one per line, got none" in fails(capsys, data, "--model", tmp_path / "empty.txt", "--pretrained")
    for content in ("{", '{"a": 1}'):
        (tmp_path / "r.json").write_text(content)
        error = fails(capsys, data, "--checkpoint", save(tmp_path / "m.safetensors"), "--results", tmp_path / "r.json")
        assert "r.json: not a file of results (" in error


def test_per_class_accuracy_names_confusions(data, tmp_path):
    file, table = save(tmp_path / "m.safetensors", bias=1), tmp_path / "classes.csv"
    for _ in range(2):
        assert main(["validate", str(data), "--checkpoint", str(file), "--per-class", str(table)]) == 0
    rows = list(csv.DictReader(table.open()))
    assert rows == [
        {"model": str(file), "index": "0", "class": "dark", "images": "3", "correct": "0", "top1": "0.0"}
        | {"confused_with": "light", "confused_images": "3"},
        {"model": str(file), "index": "1", "class": "light", "images": "3", "correct": "3", "top1": "100.0"}
        | {"confused_with": "", "confused_images": "0"},
    ]


def batch_of(targets: list[int], *, first: int = 0) -> Batch:
    indices = torch.arange(first, first + len(targets))
    return Batch(torch.empty(len(targets), 0), torch.tensor(targets), indices, [])


def logits_of(predicted: list[int], classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predicted), classes).float()


def test_the_first_of_equally_frequent_confusions_is_named():
    tally = PerClass("abcd")
    tally.update(logits_of([3, 1, 0], 4), batch_of([0, 0, 0]))
    tally.update(logits_of([2, 2], 4), batch_of([2, 0]))
    first, last = tally.rows()
    assert (first["images"], first["correct"], first["confused_with"], first["confused_images"]) == (4, 1, "b", 1)
    assert (last["class"], last["top1"], last["confused_with"]) == ("c", 100, None)


class Named(LabelledImages):
    """Images that have names and nothing else."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(source="x", classes=["a", "b"], targets=[0] * len(names))
        self.names = names

    def name(self, index: int) -> str:
        return self.names[index]


def test_real_labels_agree_with_timm():
    names = [f"val/c/ILSVRC2012_val_{number:08d}.JPEG" for number in range(50_000, 0, -1)]
    labels = real_labels_of(Named(names), read_real_labels("imagenet"), source="imagenet")
    ours, theirs = RealLabels(labels), RealLabelsImagenet(names)
    generator = torch.Generator().manual_seed(0)
    for first in range(0, 2000, 500):
        logits = torch.randn(500, 1000, generator=generator)
        for row, right in zip(logits[::2], labels[first : first + 500 : 2], strict=True):
            row[right[-1:]] = 9  # else nearly all would be wrong
        ours.update(logits, batch_of([0] * 500, first=first))
        theirs.add_result(logits)
    metrics = ours.metrics()
    assert metrics["real_images"] == len(theirs.is_correct[1])
    assert metrics["real_images"] < 2000  # some have no label
    assert (metrics["real_top1"], metrics["real_top5"]) == pytest.approx(
        (theirs.get_accuracy(1), theirs.get_accuracy(5))
    )


def test_real_labels_are_found_by_number_name_or_place():
    lists = [[1], [2], [], [3]]
    numbered = Named(["b/ILSVRC2012_val_00000004.JPEG", "a/ILSVRC2012_val_00000001.JPEG"])
    assert real_labels_of(numbered, lists, source="x") == [[3], [1]]
    assert real_labels_of(Named(["d/x.png", "c/y.png"]), {"y.jpg": [1], "x": [0]}, source="x") == [[0], [1]]
    assert real_labels_of(Named(["p", "q", "r", "s"]), lists, source="x") == lists
    with pytest.raises(ValueError, match="f: expected labels of image 4, got 2 lists"):
        real_labels_of(numbered, lists[:2], source="f")
    with pytest.raises(ValueError, match="f: expected labels of the 2 images of x, whose names have no numbers"):
        real_labels_of(Named(["p", "q"]), lists, source="f")
    with pytest.raises(ValueError, match=r"f: no labels of 1 of 2 images \(y.png\)"):
        real_labels_of(Named(["x.png", "y.png"]), {"x": [0]}, source="f")


def test_real_labels_are_validated_by(data, tmp_path, capsys):
    file, labels, results = save(tmp_path / "m.safetensors"), tmp_path / "real.json", tmp_path / "r.json"
    labels.write_text("[[0], [1], [1, 0], [], [0], [1]]")
    command = [data, "--checkpoint", file, "--real-labels", labels]
    assert main(["validate", *map(str, command), "--results", str(results)]) == 0
    (record,) = json.loads(results.read_text())
    assert (record["real_top1"], record["real_top5"], record["real_images"]) == (60, 100, 5)
    assert "real_top1" in capsys.readouterr().out
    for text, message in (
        ("[1]", "expected a list of lists"),
        ("[[-1]]", "expected a list of lists"),
        ("[", "not a JSON"),
    ):
        labels.write_text(text)
        assert message in fails(capsys, *command)
    labels.unlink()
    assert "real.json: no such file of real labels" in fails(capsys, *command)


def test_images_without_real_labels_have_no_accuracy():
    assert RealLabels([[]]).metrics() == {"real_top1": None, "real_top5": None, "real_images": 0}


def test_batches_are_halved_and_counts_begun_anew(data, tmp_path, monkeypatch, caplog):
    classifier = classifiers.load(save(tmp_path / "m.safetensors"))
    labels = tmp_path / "real.json"
    labels.write_text(json.dumps([[0]] * 6))
    forward, calls = classifier.model.forward, []

    def hungry(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 2:  # in the second batch, when something has been counted
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(images)

    monkeypatch.setattr(classifier.model, "forward", hungry)
    caplog.set_level("INFO")
    record = validate(classifier, data, device=CPU, batch_size=4, real_labels=str(labels), per_class=True)
    assert calls == [4, 2, 2, 2, 2]
    assert (record["batch_size"], record["images"], record["real_images"]) == (2, 6, 6)
    assert [row["images"] for row in record["per_class"]] == [3, 3]
    assert "not enough memory: trying 2 images per step" in caplog.text


def test_halving_ends_at_one_image():
    def hungry(_: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ValueError, match="one image does not fit into memory"):
        halving(hungry, 8)


def test_data_of_every_kind_gives_the_same_accuracy(tmp_path):
    levels = [0, 10, 200, 210]
    folder = tmp_path / "folder"
    for index, level in enumerate(levels):
        path = folder / "val" / ("dark", "light")[index // 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(level))
    names = tmp_path / "names.txt"
    names.write_text("dark\nlight\n")
    tar = write_tar(
        tmp_path / "x.tar", {f"x/val/{c}/{i}.png": png(levels[i]) for i, c in enumerate(("dark",) * 2 + ("light",) * 2)}
    )
    shards = {f"{i}.{suffix}": value for i in range(4) for suffix, value in (("cls", i // 2), ("png", png(levels[i])))}
    write_tar(tmp_path / "shards" / "val-00.tar", shards)
    classifier = classifiers.load(save(tmp_path / "m.safetensors"))
    with torch.no_grad():
        classifier.model.get_parameter("head.weight").copy_(torch.randn(2, 8))
    records = [
        validate(classifier, place, device=CPU)
        for place in (folder, folder / "val", tar, tmp_path / "shards", f"{tmp_path}/shards/val-{{00..00}}.tar")
    ]
    assert records[0]["images"] == 4
    assert math.isfinite(records[0]["loss"])
    assert {record["loss"] for record in records} == {records[0]["loss"]}


def test_models_of_imagenet_count_synsets_and_indices(tmp_path):
    unnamed = classifiers.build(SPEC.with_options({"num_classes": 1000}))
    write_tar(tmp_path / "val.tar", {"n01443537/1.png": png(1), "n01440764/1.png": png(2), "n15075141/1.png": png(3)})
    assert open_for(unnamed, tmp_path / "val.tar").targets == (1, 0, 999)
    write_shards(tmp_path / "shards", "val", classes=3)
    assert open_for(unnamed, tmp_path / "shards").targets == (0, 1, 2, 0, 1, 2)
    write_tar(tmp_path / "val.tar", {"cat/1.png": png(1), "dog/1.png": png(2)})
    with pytest.raises(ValueError, match="expected 1000 classes, as test_vim has, got 2"):
        open_for(unnamed, tmp_path / "val.tar")


def test_options_of_data_reach_it(tmp_path, capsys):
    data = make_folder(tmp_path / "data", train=1, val=2)
    (data / "val").rename(data / "held_out")
    file = save(tmp_path / "m.safetensors")
    assert "no folder val or validation or valid or test in it" in fails(capsys, data, "--checkpoint", file)
    assert main(["validate", str(data), "--checkpoint", str(file), "--val-split", "held_out"]) == 0
    assert "no folder other in it, it holds held_out, train" in fails(
        capsys, data, "--checkpoint", file, "--val-split", "other"
    )
