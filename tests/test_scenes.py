"""Scenes of digits: what is said of them is what is drawn."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vssm.data import open_digits
from vssm.data.scenes import ADE_CLASSES, DigitScenes, write_ade, write_coco


def _from_run_lengths(segmentation):
    height, width = segmentation["size"]
    flat = np.repeat(np.arange(len(segmentation["counts"])) % 2 == 1, segmentation["counts"])
    return flat.reshape(width, height).T


@pytest.mark.parametrize("size", [(96, 128), (33, 50)])
def test_boxes_and_masks_are_where_the_ink_is(size):
    scenes = DigitScenes("val", 20, size=size)
    counts = []
    for index in range(len(scenes)):
        scene = scenes.scene(index)
        assert scene.image.shape == (*size, 3)
        counts.append(len(scene.labels))
        taken = np.zeros(size, dtype=int)
        for box, mask in zip(scene.boxes, scene.masks, strict=True):
            x0, y0, x1, y1 = box
            rows, columns = np.nonzero(mask)
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x0, y0, x1, y1)
            taken[y0:y1, x0:x1] += 1
            background = ~scene.masks.any(0) & ~scene.unclear
            assert scene.image[mask].mean() > scene.image[background].mean() + 20
        assert taken.max() == 1
        assert not (scene.masks.any(0) & scene.unclear).any()
    assert min(counts) >= 1
    assert max(counts) > 2


def test_labels_are_those_of_the_digits():
    """Shrunk to 8×8 pixels, a digit is nearest to a digit of its own class."""
    digits = open_digits("train")
    known = np.stack([np.asarray(digits.load(i, channels=1), dtype=float).ravel() for i in range(len(digits))])
    scenes = DigitScenes("train", 40, size=(128, 128))
    right = []
    for index in range(len(scenes)):
        scene = scenes.scene(index)
        for label, mask, (x0, y0, x1, y1) in zip(scene.labels, scene.masks, scene.boxes, strict=True):
            cut = Image.fromarray((mask[y0:y1, x0:x1] * 255).astype(np.uint8))
            wide = max(1, round(8 * cut.width / cut.height))
            small = Image.new("L", (8, 8))
            small.paste(cut.resize((min(wide, 8), 8), Image.Resampling.BOX), ((8 - min(wide, 8)) // 2, 0))
            distance = ((known - np.asarray(small, dtype=float).ravel()) ** 2).sum(1)
            right.append(digits.targets[int(distance.argmin())] == label)
    assert np.mean(right) > 0.7


def test_scenes_are_the_same_every_time_and_differ_from_each_other():
    first, second = DigitScenes("train", 4), DigitScenes("train", 2)
    for index in range(2):
        np.testing.assert_array_equal(first.scene(index).image, second.scene(index).image)
    assert not np.array_equal(first.scene(0).image, first.scene(1).image)
    assert not np.array_equal(first.scene(0).image, DigitScenes("val", 1).scene(0).image)
    with pytest.raises(IndexError, match="index below 2, got 2"):
        second[2]


def test_targets_of_torchvision():
    scenes = DigitScenes("train", 3)
    image, target = scenes[2]
    scene = scenes.scene(2)
    np.testing.assert_allclose(image.permute(1, 2, 0) * 255, scene.image, atol=1e-4)
    assert target["boxes"].tolist() == scene.boxes.tolist()
    assert target["labels"].tolist() == (scene.labels + 1).tolist()
    assert torch.equal(target["masks"].bool(), torch.from_numpy(scene.masks))


def test_coco_layout(tmp_path):
    write_coco(tmp_path, train=3, val=2, size=(64, 80))
    for split, folder, count in (("train", "train2017", 3), ("val", "val2017", 2)):
        content = json.loads((tmp_path / "annotations" / f"instances_{folder}.json").read_text())
        assert [each["name"] for each in content["categories"]] == [str(digit) for digit in range(10)]
        assert len(content["images"]) == count
        scenes = DigitScenes(split, count, size=(64, 80))
        for index, image in enumerate(content["images"]):
            scene = scenes.scene(index)
            with Image.open(tmp_path / folder / image["file_name"]) as file:
                assert file.size == (image["width"], image["height"]) == (80, 64)
                assert np.abs(np.asarray(file, dtype=int) - scene.image).mean() < 8
            annotations = [each for each in content["annotations"] if each["image_id"] == image["id"]]
            assert [each["category_id"] - 1 for each in annotations] == scene.labels.tolist()
            for each, box, mask in zip(annotations, scene.boxes, scene.masks, strict=True):
                x, y, width, height = each["bbox"]
                assert [x, y, x + width, y + height] == box.tolist()
                np.testing.assert_array_equal(_from_run_lengths(each["segmentation"]), mask)
                assert each["area"] == mask.sum()
        assert len({each["id"] for each in content["annotations"]}) == len(content["annotations"])


def test_ade_layout(tmp_path):
    write_ade(tmp_path, train=2, val=1, size=(64, 80))
    for split, folder, count in (("train", "training", 2), ("val", "validation", 1)):
        names = sorted(path.stem for path in (tmp_path / "images" / folder).glob("*.jpg"))
        assert names == sorted(path.stem for path in (tmp_path / "annotations" / folder).glob("*.png"))
        assert len(names) == count
        scene = DigitScenes(split, count, size=(64, 80)).scene(0)
        with Image.open(tmp_path / "annotations" / folder / f"{names[0]}.png") as file:
            classes = np.asarray(file)
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            assert {ADE_CLASSES[each - 1] for each in np.unique(classes[mask])} == {str(label)}
        assert (classes[scene.unclear] == 0).all()
        assert (classes[~scene.unclear & ~scene.masks.any(0)] == 1).all()


def test_scenes_have_room_for_digits():
    with pytest.raises(ValueError, match="at least 32×32 pixels, got 16×64"):
        DigitScenes("train", 1, size=(16, 64))
