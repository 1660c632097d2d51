"""Data sets in tar files: finding images and classes, reading by place, and what is wrong with a file."""

import json
import os
import pickle
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from image_folders import make_folder
from tar_files import png, write_shards, write_tar
from vssm.data import DataOptions, open_dataset, tar_index
from vssm.data.images import UnreadableImage
from vssm.data.loaders import InputConfig, eval_loader
from vssm.data.parts import expand_braces
from vssm.data.tar_index import read_index

GREY_8 = InputConfig(channels=1, height=8, width=8, mean=(0.0,), std=(1.0,), interpolation="nearest", crop_pct=1.0)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VSSM_CACHE", str(folder))
    return folder


def levels(images) -> list[int]:
    return [images.load(index, channels=1).getpixel((0, 0)) for index in range(len(images))]


def tar_of(folder: Path, path: Path, *, name: str) -> Path:
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname=name)
    return path


@pytest.mark.parametrize("name", [".", "data", "a/b"])
def test_a_tar_of_a_folder_equals_the_folder(tmp_path, name):
    make_folder(tmp_path / "data", classes=("c10", "c2", "c1"), train=3, val=2)
    path = tar_of(tmp_path / "data", tmp_path / "data.tar", name=name)
    for split in ("train", "val"):
        folder, tar = open_dataset(tmp_path / "data", split), open_dataset(path, split)
        assert tar.classes == folder.classes == ("c1", "c2", "c10")

        def content(images) -> dict[str, tuple]:
            keys = ["/".join(images.name(i).split("/")[-2:]) for i in range(len(images))]
            return {key: (images.load(i, channels=3).tobytes(), images.targets[i]) for i, key in enumerate(keys)}

        assert content(tar) == content(folder)


def test_loaders_read_tars_in_worker_processes(tmp_path):
    write_shards(tmp_path, "train", shards=3, samples=4)
    write_shards(tmp_path, "val")
    images = open_dataset(tmp_path, "train")
    assert levels(images) == list(range(0, 120, 10))  # which opens the files before workers are started
    batches = list(eval_loader(images, GREY_8, batch_size=5, workers=2))
    assert torch.cat([batch.targets for batch in batches]).tolist() == list(images.targets) == [0, 1] * 6
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(12))


def test_files_are_opened_again_in_another_process(tmp_path):
    images = open_dataset(write_shards(tmp_path, "val"), "val")
    assert levels(images) == [0, 10, 20, 30, 40, 50]
    mine = dict(images._files._open)
    child = os.fork()
    if child == 0:
        right = levels(images) == [0, 10, 20, 30, 40, 50] and not set(images._files._open.values()) & set(mine.values())
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert levels(pickle.loads(pickle.dumps(images))) == levels(images)


def test_more_files_than_stay_open_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr("vssm.data.tars._KEPT_OPEN", 1)
    images = open_dataset(write_shards(tmp_path, "val", shards=3), "val")
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    assert levels(images) == [10 * number for number in range(9)]
    assert len(images._files._open) == 1
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before + 1


def test_parts_are_told_by_words_in_the_names_of_files(tmp_path):
    write_shards(tmp_path, "imagenet1k-train", shards=2, samples=4)
    write_shards(tmp_path, "imagenet1k-validation", shards=1)
    write_shards(tmp_path, "imagenet1k-trained", shards=1)
    assert (len(open_dataset(tmp_path, "train")), len(open_dataset(tmp_path, "val"))) == (8, 3)
    pattern = f"{tmp_path}/imagenet1k-{{train-{{0000..0001}},validation-{{0000..0000}}}}.tar"
    assert (len(open_dataset(pattern, "train")), len(open_dataset(pattern, "val"))) == (8, 3)
    assert len(open_dataset(f"{tmp_path}/imagenet1k-validation-{{0000..0000}}.tar", "val")) == 3
    with pytest.raises(
        ValueError, match=r"none of its 1 files has train or training in its name; expected a pattern of"
    ):
        open_dataset(f"{tmp_path}/imagenet1k-validation-{{0000..0000}}.tar", "train")
    other = open_dataset(tmp_path, "val", options=DataOptions(val_split="trained"))
    assert len(other) == 3


def test_files_without_parts_are_what_to_validate_on(tmp_path):
    write_shards(tmp_path, "shard", shards=2)
    assert len(open_dataset(tmp_path, "val")) == len(open_dataset(f"{tmp_path}/shard-000{{0,1}}.tar", "val")) == 6
    assert len(open_dataset(tmp_path / "shard-0000.tar", "val")) == 3
    with pytest.raises(ValueError, match=r"shard-0000.tar: no folder train or training in it, it holds no folders"):
        open_dataset(tmp_path / "shard-0000.tar", "train")
    with pytest.raises(FileNotFoundError, match=r"no folder train or training in it, it holds shard-0000.tar, shard"):
        open_dataset(tmp_path, "train")


def test_training_images_are_never_validated_on_for_want_of_others(tmp_path):
    write_shards(tmp_path / "shards", "train")
    make_folder(tmp_path / "folder", val=1)
    (tmp_path / "folder" / "val").rename(tmp_path / "folder" / "other")
    tar = write_tar(tmp_path / "x.tar", {"train/a/1.png": png(1), "train/b/1.png": png(2)})
    for data in (tmp_path / "shards", tmp_path / "folder", tar, f"{tmp_path}/shards/train-000{{0,1}}.tar"):
        with pytest.raises((FileNotFoundError, ValueError), match="val or validation"):
            open_dataset(data, "val")


def test_a_folder_of_one_tar_per_class(tmp_path):
    for index, name in enumerate(("n01440764", "n01443537")):
        for split in ("train", "val"):
            write_tar(tmp_path / split / f"{name}.tar", {f"{i}.png": png(100 * index + i) for i in range(2)})
    images = open_dataset(tmp_path, "train")
    assert images.classes == ("n01440764", "n01443537")
    assert list(zip(images.targets, levels(images), strict=True)) == [(0, 0), (0, 1), (1, 100), (1, 101)]


def test_a_tar_of_tars_as_imagenet_comes(tmp_path):
    inner = [write_tar(tmp_path / f"{name}.tar", {f"{name}_1.png": png(level)}) for name, level in (("a", 7), ("b", 9))]
    outer = write_tar(tmp_path / "out" / "ILSVRC2012_img_train.tar", {path.name: path.read_bytes() for path in inner})
    images = open_dataset(tmp_path / "out", "train")
    assert (images.classes, levels(images)) == (("a", "b"), [7, 9])
    assert images.name(1) == f"{outer}/b/b_1.png"


def test_imagenets_flat_validation_images_with_a_file_of_labels(tmp_path):
    names = [f"ILSVRC2012_val_{number:08d}" for number in (3, 1, 2)]
    write_tar(tmp_path / "data" / "ILSVRC2012_img_val.tar", {f"{name}.png": png(int(name[-1])) for name in names})
    folder = tmp_path / "flat" / "val"
    folder.mkdir(parents=True)
    for name in names:
        (folder / f"{name}.png").write_bytes(png(int(name[-1])))
    truth = {1: "n2", 2: "n1", 3: "n3"}
    kaggle = "".join(f"ILSVRC2012_val_{number:08d},{name} 1 2 3 4\n" for number, name in truth.items())
    texts = [
        "ImageId,PredictionString\n" + kaggle,
        "n2\nn1\nn3\n",
        "".join(f"ILSVRC2012_val_{number:08d}.JPEG {name}\n" for number, name in truth.items()),
        "1\n0\n2\n",
    ]
    for data in (tmp_path / "data", tmp_path / "flat", folder):
        for text in texts:
            (tmp_path / "labels.txt").write_text(text)
            images = open_dataset(data, "val", options=DataOptions(val_labels=tmp_path / "labels.txt"))
            assert dict(zip(levels(images), images.targets, strict=True)) == {1: 1, 2: 0, 3: 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\n", "expected 3 lines, one per image, got 2"),
        ("x_1 a\nx_2 b\n", "no class of 1 of 3 images"),
        ("1\n2\n1000\n", "numbers from 1 to 1000 are those of ImageNet's development kit"),
        (None, "no such file of labels"),
    ],
)
def test_bad_files_of_labels_are_told_apart(tmp_path, text, message):
    path = write_tar(tmp_path / "val.tar", {f"x_{number}.png": png(number) for number in range(3)})
    if text is not None:
        (tmp_path / "labels.txt").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_dataset(path, "val", options=DataOptions(val_labels=tmp_path / "labels.txt"))


def test_labels_from_json_members(tmp_path):
    members = {}
    for number, (name, other) in enumerate((("cat", 1), ("dog", 0))):
        members |= {f"s{number}.json": {"label": name, "kind": other}, f"s{number}.png": png(number)}
    path = write_tar(tmp_path / "val.tar", members | {"s0.mask.png": png(200)})
    images = open_dataset(path, "val")
    assert (images.classes, images.targets, levels(images)) == (("cat", "dog"), (0, 1), [0, 1])
    assert open_dataset(path, "val", options=DataOptions(label_key="kind")).targets == (1, 0)
    with pytest.raises(ValueError, match=r"s0.json: no 'sort' in it; there are kind, label"):
        open_dataset(path, "val", options=DataOptions(label_key="sort"))


def test_class_names_name_indices(tmp_path):
    data = write_shards(tmp_path / "data", "val")
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nowl\n")
    options = DataOptions(class_names=names)
    assert open_dataset(data, "val", options=options).classes == ("cat", "dog", "owl")
    assert open_dataset(data, "val").classes == ("0", "1")
    mine = open_dataset(data, "val", classes=("owl", "dog", "cat"), options=options)
    assert mine.targets == (2, 1, 2, 1, 2, 1)
    assert open_dataset(data, "val", preferred=("dog", "cat"), options=options).targets == (1, 0, 1, 0, 1, 0)
    assert open_dataset(data, "val", preferred=("a", "b"), options=options).classes == ("cat", "dog", "owl")
    assert open_dataset(data, "val", preferred=("a", "b")).classes == ("a", "b")
    with pytest.raises(ValueError, match=r"2 of its 2 classes \(cat, dog\) are not among the 2 known \(a, b\)"):
        open_dataset(data, "val", classes=("a", "b"), options=options)
    with pytest.raises(ValueError, match=r"1 of its 2 classes \(1\) are not among the 1 known"):
        open_dataset(data, "val", classes=("a",))
    for text, message in (("cat\ncat\n", "got cat more than once"), ("cat\n", "got 1 lines")):
        names.write_text(text)
        with pytest.raises(ValueError, match=message):
            open_dataset(data, "val", options=options)
    names.write_text("cat\nowl\n")
    write_shards(data, "val", classes=3)
    with pytest.raises(ValueError, match=r"expected class indices below 2, of which there are names, got 2"):
        open_dataset(data, "val", options=options)


def test_the_index_is_made_once_and_again_when_the_file_changes(tmp_path, monkeypatch, cache):
    path = write_shards(tmp_path, "val", shards=1) / "val-0000.tar"
    scans = []
    scan = tar_index._scan
    monkeypatch.setattr(tar_index, "_scan", lambda *args: scans.append(args) or scan(*args))
    first = read_index(path)
    assert read_index(path) == first
    assert len(scans) == 1
    (file,) = (cache / "tar_index").iterdir()
    os.utime(path, (0, 0))
    assert read_index(path) == first
    assert len(scans) == 2
    write_shards(tmp_path, "val", shards=1, samples=5)
    assert len(read_index(path).names) == 5
    assert len(scans) == 3
    file.write_text("[]")
    assert len(read_index(path).names) == 5
    assert len(scans) == 4
    assert json.loads(file.read_text())["path"] == str(path)


def test_a_cache_that_cannot_be_written_is_only_a_line(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VSSM_CACHE", str(tmp_path / "file"))
    assert len(open_dataset(write_shards(tmp_path / "x", "val", shards=1), "val")) == 3
    assert "is not kept" in caplog.text


def cut_off(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_damaged_tars_are_told_apart(tmp_path):
    path = tmp_path / "val.tar"

    def fails(message: str) -> None:
        with pytest.raises(ValueError, match=rf"val\.tar: {message}"):
            open_dataset(path, "val")

    members = {f"{name}/1.png": png(1) for name in ("a", "b")}
    write_tar(path, members)
    whole = path.read_bytes()
    cut_off(path, 1100)  # in the second header
    fails("no end of the archive at byte 1024: it is cut off")
    path.write_bytes(whole[:1600])  # in the second image
    fails("expected a complete, uncompressed tar file, got something else")
    path.write_bytes(whole[:2048])  # after the second image
    fails("no end of the archive at byte 2048: it is cut off")
    path.write_bytes(whole[:1030] + b"x" * 400 + whole[1430:])
    fails("no end of the archive at byte 1024: it is damaged")
    path.write_text("no tar at all")
    fails("expected a complete, uncompressed tar file")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(__file__, arcname="a/1.png")
    fails("expected a complete, uncompressed tar file")
    write_tar(path, {"a/notes.txt": "nothing"})
    fails("no images found, expected CLASS/")
    write_tar(path, {"1.png": png(1), "2.png": png(2)})
    fails("2 images lie outside of class folders, expected CLASS/")
    write_tar(path, {"1.png": png(1), "1.cls": "cat"})
    fails("1.cls: expected the index of a class, got 'cat'")
    write_tar(path, {"1.png": png(1), "1.json": "{"})
    fails("1.json: not JSON")
    write_tar(path, {"1.png": png(1), "1.json": {"label": 1.5}})
    fails("1.json: expected 'label' to be an index or a name, got 1.5")
    write_tar(path, {"1.png": png(1), "1.cls": 1, "2.png": png(1)})
    fails(r"no class beside 1 of 2 images \(2.png\), while others have a .cls or .json")
    write_tar(path, {"1.png": png(1), "1.cls": 1, "2.png": png(1), "2.json": {"label": "x"}})
    fails("some classes are indices and some are names")


def test_a_tar_that_is_cut_off_later_has_unreadable_images(tmp_path):
    images = open_dataset(write_shards(tmp_path, "val", shards=1), "val")
    cut_off(tmp_path / "val-0000.tar", 1560)
    with pytest.raises(UnreadableImage, match=r"val-0000.tar/000000.png: cannot be read, the tar file is shorter"):
        images.load(0, channels=1)
    images = open_dataset(write_shards(tmp_path / "x", "val", shards=1), "val")
    (tmp_path / "x" / "val-0000.tar").unlink()
    with pytest.raises(UnreadableImage, match=r"000000.png: cannot be read \(.*No such file"):
        images.load(0, channels=1)


def test_a_member_that_is_no_image_is_unreadable(tmp_path):
    images = open_dataset(write_tar(tmp_path / "val.tar", {"a/1.png": b"text", "b/1.png": png(1)}), "val")
    with pytest.raises(UnreadableImage, match=r"val.tar/a/1.png: not a readable image \(cannot identify image file\)$"):
        images.load(0, channels=1)


def test_braces_expand_as_in_a_shell():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b{1..2}}-{x,y}") == ["a-x", "a-y", "b1-x", "b1-y", "b2-x", "b2-y"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x-{0..3.tar", "expected matching braces"),
        ("x-}0..3{.tar", "expected matching braces"),
        ("x-{3..0}.tar", "expected a range of 1 to 100000 numbers"),
        ("x-{a}.tar", r"expected \{first..last\} or \{one,other\} in braces"),
        ("x-{0..1}.zip", "expected a pattern of .tar files, got x-0.zip"),
        ("x-{0..1}.tar", r"2 of its 2 files are not there \(x-0.tar, x-1.tar\)"),
    ],
)
def test_bad_patterns_are_told_apart(pattern, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_dataset(pattern, "val")


class FakeHubDataset:
    """What timm's reader uses of a Hugging Face data set, on images in a folder."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self.rows = [
            {"image": {"bytes": None, "path": str(path)}, "label": int(path.stem) % 2}
            for path in sorted(root.iterdir())
        ]
        self.info = SimpleNamespace(features={"label": SimpleNamespace(names=names)}, splits=None)

    def cast_column(self, key: str, _: object) -> "FakeHubDataset":
        if key not in self.rows[0]:
            raise ValueError(f"no column {key}\nand more")
        return self

    def remove_columns(self, key: str) -> list[dict]:
        return [{name: value for name, value in row.items() if name != key} for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> None:
    """A package ``datasets`` that reads ROOT/NAME/SPLIT."""
    for split in ("train", "validation"):
        folder = tmp_path / "pets" / split
        folder.mkdir(parents=True)
        for number in range(4):
            (folder / f"{number}.png").write_bytes(png(number + (100 if split == "train" else 0)))
    module = ModuleType("datasets")
    module.load_dataset = lambda name, split, cache_dir: FakeHubDataset(tmp_path / name / split, ["dog", "cat"])
    module.get_dataset_split_names = lambda name: sorted(os.listdir(tmp_path / name))
    module.Image = lambda decode: None
    module.__spec__ = SimpleNamespace(name="datasets")
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)


@pytest.mark.usefixtures("hub")
def test_hugging_face_data_sets_are_read_by_timm(caplog):
    images = open_dataset("hfds/pets", "val")
    assert (images.classes, images.targets, levels(images)) == (("dog", "cat"), (0, 1, 0, 1), [0, 1, 2, 3])
    assert open_dataset("hfds/pets", "val", classes=("cat", "dog")).targets == (1, 0, 1, 0)
    assert levels(open_dataset("hfds/pets", "train"))[0] == 100
    assert levels(open_dataset("hfds/pets", "val", options=DataOptions(val_split="train")))[0] == 100
    assert images.name(2) == "hfds/pets (validation)/2"
    with pytest.raises(ValueError, match=r"hfds/pets: cannot read 'train' by the columns img, label: no column img$"):
        open_dataset("hfds/pets", "train", options=DataOptions(image_key="img"))


def test_hugging_face_data_sets_without_the_package_name_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hfds/pets: Hugging Face data sets need .*: pip install datasets"):
        open_dataset("hfds/pets", "train")


@pytest.mark.usefixtures("hub")
def test_a_part_that_a_hugging_face_data_set_does_not_have_is_named(tmp_path):
    (tmp_path / "pets" / "validation").rename(tmp_path / "pets" / "extra")
    with pytest.raises(ValueError, match=r"hfds/pets: no part val or validation .* in it, it holds extra, train"):
        open_dataset("hfds/pets", "val")


def test_options_survive_a_record():
    options = DataOptions(val_split="test", val_labels=Path("x.txt"))
    assert DataOptions.from_dict(json.loads(json.dumps(options.as_dict()))) == options
