"""Images on their way to a model: the numbers are those of timm's transforms, whatever travels between processes."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader, create_transform
from timm.data.auto_augment import AugmentOp

from image_folders import make_folder
from vssm.data import open_dataset
from vssm.data.loaders import Augmentation, InputConfig, eval_loader, train_loader
from vssm.data.pixels import Normalise, collate_pixels

CONFIG = InputConfig(height=24, width=40, crop_pct=0.9)


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


def seed() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("channels", [1, 3])
def test_evaluation_sees_the_numbers_of_timms_loader(tmp_path, workers, channels):
    images = open_dataset(make_folder(tmp_path), "val")
    config = InputConfig(channels, 24, 40, (0.45,) * channels, (0.225,) * channels)
    transform = config.transform()
    expected = torch.stack([transform(images.load(index, channels=channels)) for index in range(len(images))])
    found = torch.cat([batch.images for batch in eval_loader(images, config, batch_size=3, workers=workers)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    if channels == 3:
        options = {"interpolation": config.interpolation, "mean": config.mean, "std": config.std, "num_workers": 0}
        theirs = create_loader(ImageDataset(images.source), (3, 24, 40), 3, device=torch.device("cpu"), **options)
        assert torch.equal(found, torch.cat([each for each, _ in theirs]))


@pytest.mark.parametrize("policy", ["", "rand-m9-mstd0.5-inc1", "original"])
def test_training_sees_the_numbers_of_timms_transform_with_the_same_random_numbers(photo, policy):
    augmentation = Augmentation(aa=policy, reprob=0.9, interpolation="bicubic", color_jitter=0.3)
    theirs = create_transform(
        (3, 24, 40),
        is_training=True,
        scale=augmentation.scale,
        hflip=0.5,
        color_jitter=0.3,
        auto_augment=policy or None,
        interpolation="bicubic",
        mean=CONFIG.mean,
        std=CONFIG.std,
        re_prob=0.9,
        re_mode="pixel",
    )
    ours, normalise = augmentation.transform(CONFIG), Normalise(CONFIG.mean, CONFIG.std, device=torch.device("cpu"))
    seed()
    expected = torch.stack([theirs(photo) for _ in range(8)])
    seed()
    batch = collate_pixels([ours(photo) for _ in range(8)], shape=(3, 24, 40))
    assert batch.values.dtype == torch.uint8
    assert 4 <= len(batch.spots) <= 8
    torch.testing.assert_close(normalise(batch), expected, rtol=0, atol=1e-6)


def test_images_are_erased_in_worker_processes(tmp_path):
    images = open_dataset(make_folder(tmp_path), "train")
    flat = {"hflip": 0.0, "color_jitter": 0.0, "scale": (1.0, 1.0), "interpolation": "bilinear"}
    config = InputConfig(height=16, width=16, mean=(0.5,) * 3, std=(0.01,) * 3)  # so that 0 to 1 becomes -50 to 50
    (batch,) = train_loader(images, config, Augmentation(reprob=1.0, **flat), batch_size=24, seed=0, workers=1)
    erased = (batch.images.abs() < 5).all(1).float().mean((1, 2))
    assert (erased > 0.01).all()
    assert (erased < 0.5).all()


def test_a_batch_of_no_images_has_their_shape():
    batch = collate_pixels([], shape=(3, 24, 40))
    assert batch.values.shape == (0, 3, 24, 40)
    assert Normalise(CONFIG.mean, CONFIG.std, device=torch.device("cpu"))(batch).shape == (0, 3, 24, 40)


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "original", "augmix-m10"])
def test_policies_posterize_to_no_bits(photo, policy):
    transform = Augmentation(aa=policy).transform(CONFIG).transform
    (part,) = [each for each in transform.transforms if hasattr(each, "ops") or hasattr(each, "policy")]
    operations = getattr(part, "ops", None) or [each for pair in part.policy for each in pair]
    (first, *_) = [each for each in operations if "Posterize" in each.name]
    assert isinstance(first, AugmentOp)
    assert first.aug_fn(photo, 0, resample=0).getextrema() == ((0, 0),) * 3
    assert np.array_equal(np.asarray(first.aug_fn(photo, 3)), np.asarray(photo) & 0b11100000)
    first.prob, first.magnitude, first.magnitude_std = 1.0, 10, 0
    first(photo)
