import hashlib
import os
import random
import signal
import struct
import sys
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from image_folders import make_folder
from vssm.data import open_dataset
from vssm.data.images import UnreadableImage, find_images, read_image
from vssm.data.loaders import Augmentation, InputConfig, ReadingCheck, eval_loader, train_loader
from vssm.data.sampling import EvaluationBatches, Share

GREY_8 = InputConfig(channels=1, height=8, width=8, mean=(0.0,), std=(1.0,), interpolation="nearest", crop_pct=1.0)
DIGITS_HASH = "5c1d7948b9d4c2052c30fd282508096cb3d2a7c9a6bc2d6cafd5feb5c09c7670"


def test_digits_are_split_into_disjoint_stratified_parts():
    train, val = open_dataset(None, "train"), open_dataset(None, "val")
    assert (len(train), len(val)) == (1442, 355)
    assert train.classes == val.classes == tuple("0123456789")
    pixels = [{images.load(i, channels=1).tobytes() for i in range(len(images))} for images in (train, val)]
    assert [len(each) for each in pixels] == [1442, 355]
    assert not pixels[0] & pixels[1]
    both, held_out = Counter(train.targets + val.targets), Counter(val.targets)
    assert all(held_out[digit] == both[digit] // 5 for digit in range(10))


def test_digits_are_split_the_same_everywhere():
    val = open_dataset(None, "val")
    names = ",".join(f"{val.name(i)}={val.targets[i]}" for i in range(len(val)))
    assert hashlib.sha256(names.encode()).hexdigest() == DIGITS_HASH


def test_digits_show_ink_as_white():
    train = open_dataset(None, "train")
    first = np.asarray(train.load(0, channels=1))
    assert first.shape == (8, 8)
    assert (first.min(), first.max()) == (0, 239)  # 15 of 16
    colour = np.asarray(train.load(0, channels=3))
    assert np.array_equal(colour, np.repeat(first[..., None], 3, axis=2))


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r'pip install "vssm\[demo\]"'):
        open_dataset(None, "train")


def test_folder_gives_classes_in_natural_order(tmp_path):
    make_folder(tmp_path, classes=("class10", "class2", "class1"), train=2, val=1)
    train = open_dataset(tmp_path, "train")
    assert train.classes == ("class1", "class2", "class10")
    assert Counter(train.targets) == {0: 2, 1: 2, 2: 2}
    assert all(train.classes[train.targets[i]] in train.name(i) for i in range(len(train)))


def test_held_out_part_takes_the_indices_of_the_training_classes(tmp_path):
    make_folder(tmp_path, classes=("a", "b", "c"), val=2)
    for file in (tmp_path / "val" / "a").iterdir():
        file.unlink()
    val = open_dataset(tmp_path, "val", classes=("a", "b", "c"))
    assert set(val.targets) == {1, 2}


@pytest.mark.parametrize("name", ["validation", "valid", "test"])
def test_held_out_part_may_have_another_name(tmp_path, name):
    make_folder(tmp_path)
    (tmp_path / "val").rename(tmp_path / name)
    assert len(open_dataset(tmp_path, "val")) == 8


def test_bad_folders_are_told_apart(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere: no such data folder, expected class folders as in .*/train/"
    ):
        open_dataset(tmp_path / "nowhere", "train")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(FileNotFoundError, match="a file, not a data folder"):
        open_dataset(file, "train")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="no folder train or training in it, it is empty"):
        open_dataset(empty, "train")
    (empty / "other").mkdir()
    with pytest.raises(FileNotFoundError, match="it holds other"):
        open_dataset(empty, "train")
    (empty / "train" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images found"):
        open_dataset(empty, "train")


def test_a_single_class_is_refused_with_numbers(tmp_path):
    make_folder(tmp_path, classes=("cat",), train=3)
    with pytest.raises(
        ValueError, match=r"found 1 class \(cat\) of 3 images, at least 2 are needed; expected class fold"
    ):
        open_dataset(tmp_path, "train")


def test_images_outside_of_class_folders_are_refused(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "dark" / "000.png").rename(tmp_path / "train" / "loose.png")
    with pytest.raises(ValueError, match="1 images lie outside of class folders"):
        open_dataset(tmp_path, "train")


def test_unknown_classes_of_the_held_out_part_are_named(tmp_path):
    make_folder(tmp_path)
    with pytest.raises(ValueError, match=r"1 of its 2 classes \(light\) are not among the 2 known \(dark, grey\)"):
        open_dataset(tmp_path, "val", classes=("dark", "grey"))


def test_images_are_found_by_their_suffixes_in_order(tmp_path):
    for name in ("b.JPEG", "a.png", "notes.txt", "sub/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in find_images(tmp_path)] == ["a.png", "b.JPEG", "c.jpg"]


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-60])


def _replace_by_text(path):
    path.write_text("not an image")


def _empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncate, _replace_by_text, _empty])
def test_damaged_files_are_unreadable(tmp_path, damage):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    assert read_image(path).size == (16, 16)
    damage(path)
    with pytest.raises(UnreadableImage, match=r"image.png: not a readable image \(.+\)$"):
        read_image(path)


def _png_header(side: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 30_000])  # Pillow warns of the first and refuses the second
def test_decompression_bombs_are_not_decoded(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(_png_header(side))
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        read_image(path)


def test_image_modes_become_grey_or_colour(tmp_path):
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16"):
        path = tmp_path / f"{mode.replace(';', '')}.tif"
        Image.new(mode, (4, 4)).save(path)
        assert read_image(path, channels=3).mode == "RGB"
        assert read_image(path, channels=1).mode == "L"
    with pytest.raises(ValueError, match=r"expected 1 \(grey\) or 3 \(colour\) channels, got 4"):
        read_image(path, channels=4)


def test_eval_loader_normalises_and_keeps_the_order():
    images = open_dataset(None, "val")
    config = InputConfig(channels=1, height=8, width=8, mean=(0.5,), std=(0.25,), interpolation="nearest", crop_pct=1.0)
    batches = list(eval_loader(images, config, batch_size=100))
    assert [len(batch.targets) for batch in batches] == [100, 100, 100, 55]
    assert torch.cat([batch.targets for batch in batches]).tolist() == list(images.targets)
    expected = (torch.tensor(np.asarray(images.load(0, channels=1))) / 255 - 0.5) / 0.25
    torch.testing.assert_close(batches[0].images[0, 0], expected)


def test_a_process_that_reads_images_and_dies_is_one_line(tmp_path, monkeypatch):
    images = open_dataset(make_folder(tmp_path), "val")
    monkeypatch.setattr(type(images), "load", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ChildProcessError, match=r"one of the 1 processes that read images has died.*fewer --workers"):
        list(eval_loader(images, GREY_8, batch_size=4, workers=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_skip_and_count_damaged_files(tmp_path, workers):
    make_folder(tmp_path, val=5)
    _truncate(tmp_path / "val" / "light" / "001.png")
    images = open_dataset(tmp_path, "val")
    batches = list(eval_loader(images, GREY_8, batch_size=4, workers=workers))
    assert sum(len(batch.targets) for batch in batches) == 9
    (message,) = [message for batch in batches for message in batch.unreadable]
    assert message.startswith(f"{tmp_path}/val/light/001.png: not a readable image")
    assert 6 not in torch.cat([batch.indices for batch in batches])


def test_a_batch_of_damaged_files_is_empty(tmp_path):
    make_folder(tmp_path, val=2)
    for file in (tmp_path / "val" / "dark").iterdir():
        _empty(file)
    first, second = eval_loader(open_dataset(tmp_path, "val"), GREY_8, batch_size=2)
    assert (len(first.targets), len(first.unreadable)) == (0, 2)
    assert second.targets.tolist() == [1, 1]


def test_one_percent_of_unreadable_files_is_tolerated():
    images = open_dataset(None, "val")
    batch = next(iter(eval_loader(images, GREY_8, batch_size=2)))._replace(unreadable=["x.png: not a readable image"])
    check = ReadingCheck("DIR/train", 200)
    check.update(batch)
    check.update(batch)
    with pytest.raises(ValueError, match=r"DIR/train: 3 of 200 files cannot be read, more than 1 % of them; .*x.png"):
        check.update(batch)


def _train_loader(augmentation: Augmentation, **options):
    return train_loader(open_dataset(None, "val"), GREY_8, augmentation, **{"batch_size": 100, "seed": 7} | options)


def test_train_loader_shuffles_by_epoch_and_drops_the_rest():
    loader = _train_loader(Augmentation())

    def order(epoch: int) -> list[int]:
        loader.batch_sampler.begin(epoch)
        return torch.cat([batch.indices for batch in loader]).tolist()

    first = order(1)
    assert len(first) == len(set(first)) == 300
    assert order(2) != first
    assert order(1) == first


def test_repeated_augmentation_shows_fewer_images_more_often():
    images = open_dataset(None, "train")
    loader = train_loader(images, GREY_8, Augmentation(repeats=3), batch_size=64, seed=0)
    counts = Counter(torch.cat([batch.indices for batch in loader]).tolist())
    assert max(counts.values()) == 3
    assert sum(counts.values()) == 1280  # of 1442, rounded down to 256
    assert len(counts) < 1280 / 2.5


@pytest.mark.parametrize("aa", ["", "rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2"])
def test_augmentation_depends_on_seed_epoch_and_place_alone(aa):
    policy = Augmentation(aa=aa, reprob=0.5, repeats=3)

    def images(epoch: int = 1, step: int = 0, **options) -> list[torch.Tensor]:
        loader = _train_loader(policy, **options)
        loader.batch_sampler.begin(epoch, step)
        return [batch.images for batch in loader]

    plain = images()
    assert len(plain) == 2  # of 256 images
    for other in (images(workers=2), images(workers=1)):
        assert all(map(torch.equal, plain, other))
    assert torch.equal(images(step=1)[0], plain[1])
    for rank in range(3):
        shared = images(share=Share(rank, 3))
        assert all(torch.equal(part, whole[rank::3]) for part, whole in zip(shared, plain, strict=True))
    assert not torch.equal(images(epoch=2)[0], plain[0])
    assert not torch.equal(images(seed=8)[0], plain[0])


def test_reading_in_process_leaves_the_generators_of_others_alone():
    batches = iter(_train_loader(Augmentation(aa="rand-m9-mstd0.5-inc1", reprob=0.5)))
    draws = []
    for read in (False, True):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        if read:
            next(batches)
        draws.append((random.gauss(0, 1), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1]


def test_shared_evaluation_sees_every_image_once_in_equally_many_batches():
    images = open_dataset(None, "val").targets[:10]
    for ranks in (1, 2, 3, 4):
        batches = [
            list(EvaluationBatches(len(images), batch_size=3, share=Share(rank, ranks))) for rank in range(ranks)
        ]
        assert len({len(each) for each in batches}) == 1
        assert sorted(image for each in batches for batch in each for image in batch) == list(range(10))
    assert batches[3] == [[3, 7]]
    assert list(EvaluationBatches(4, batch_size=1, share=Share(2, 3))) == [[2], []]


def test_a_process_without_images_is_refused():
    with pytest.raises(ValueError, match="as many images in a batch as the 3 processes, got 2"):
        _train_loader(Augmentation(), batch_size=2, share=Share(0, 3))


def test_a_batch_is_no_larger_than_the_data_set(tmp_path):
    make_folder(tmp_path, train=3)
    loader = train_loader(open_dataset(tmp_path, "train"), GREY_8, Augmentation(), batch_size=1000, seed=0)
    assert [len(batch.targets) for batch in loader] == [6]
