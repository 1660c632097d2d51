"""Mamba-YOLO in mmdetection; runs where the extra ``mm`` is installed."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import vssm
from golden import records
from openmmlab_recipes import CONFIGS, SIZE, ours, small_config, train_one_step
from vssm.cli import main
from vssm.data.scenes import write_coco
from vssm.engine.convert import convert
from vssm.yolo import MambaYoloDetector
from vssm.yolo.loss import Objects

pytestmark = pytest.mark.mm
RECIPES = CONFIGS / "mmdet"
TINY = RECIPES / "yolo_mambayolo-tiny_pafpn_300e_coco.py"
RECORD = "mamba_yolo/mamba_yolo_t"


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"), train=8, val=1, size=SIZE)


def _recipe(path):
    ours()
    from mmengine.config import Config

    return Config.fromfile(path)


def _build(model):
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()
    return MODELS.build(model)


def _samples(images, objects=()):
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    samples = []
    for i in range(len(images)):
        sample = DetDataSample(metainfo={"img_shape": images.shape[2:], "scale_factor": (1.0, 1.0)})
        if objects:
            sample.gt_instances = InstanceData(bboxes=objects[i].boxes, labels=objects[i].labels)
        samples.append(sample)
    return samples


@pytest.mark.parametrize("size", ["tiny", "base", "large"])
def test_weights_of_our_detector_fit_the_recipe(size):
    recipe = _recipe(RECIPES / f"yolo_mambayolo-{size}_pafpn_300e_coco.py")
    with torch.device("meta"):
        theirs = _build(recipe.model).state_dict()
        mine = MambaYoloDetector(f"mambayolo_{size}").state_dict()
    assert {key: value.shape for key, value in theirs.items()} == {key: value.shape for key, value in mine.items()}


def test_detector_of_mmdet_computes_the_official_losses_and_finds_what_ours_finds():
    record = records.load(RECORD)
    detector = MambaYoloDetector("mambayolo_tiny").eval()
    vssm.checkpoint.load(detector, record.state_dict)
    theirs = _build(_recipe(TINY).model).eval()
    theirs.load_state_dict(detector.state_dict())
    boxes = torch.tensor([[10.0, 20, 130, 180], [100, 100, 240, 200]])
    objects = [Objects(boxes[:1], torch.tensor([3])), Objects(boxes, torch.tensor([7, 0]))]
    with torch.no_grad():
        losses = theirs.loss(record.images, _samples(record.images, objects))
        results = theirs.predict(record.images, _samples(record.images), rescale=False)
    for name, loss in detector.losses(record.images, objects).items():
        torch.testing.assert_close(losses[name], 2 * loss)
    for result, mine in zip(results, detector.detect(record.images), strict=True):
        found = result.pred_instances
        assert len(found) == 300
        torch.testing.assert_close(found.scores, mine["scores"])
        torch.testing.assert_close(found.bboxes, mine["boxes"], rtol=1e-4, atol=1e-2)
        assert torch.equal(found.labels, mine["labels"])


def test_mmdet_opens_a_converted_file(tmp_path):
    record = records.load(RECORD)
    torch.save(record.state_dict, tmp_path / "official.pth")
    convert(tmp_path / "official.pth", "mambayolo_tiny", task="detect")
    ours()
    from vssm.engine.detect import framework

    model = framework("mmdet").init_detector(str(TINY), str(tmp_path / "official.safetensors"), device="cpu")
    detector = MambaYoloDetector("mambayolo_tiny")
    vssm.checkpoint.load(detector, record.state_dict)
    for key, value in detector.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)


def test_the_recipe_trains_saves_and_detects(coco, tmp_path):
    cfg = small_config(TINY, coco, tmp_path / "work", model_name="test_mambayolo")
    cfg.custom_hooks = [
        hook for hook in cfg.custom_hooks if hook.type == "VSSMChannelCheck"
    ]  # as trained, with mosaics
    runner, unchanged = train_one_step(cfg)
    without_object = "bbox_head.sides."  # levels that no object was assigned to
    assert [name for name in unchanged if not name.endswith("bias") and not name.startswith(without_object)] == []
    file = tmp_path / "work" / "iter_1.pth"

    predicting = small_config(TINY, coco, tmp_path / "work", model_name="test_mambayolo")
    predicting.test_dataloader = _recipe(TINY).test_dataloader
    predicting.dump(tmp_path / "recipe.py")
    options = ["--recipe", tmp_path / "recipe.py", "--checkpoint", file, "--results", tmp_path / "found.json"]
    assert main(["detect", str(coco / "val2017"), "--threshold", "0", *map(str, options)]) == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert {each["class"] for each in found["objects"]} <= set(map(str, range(10)))
    assert found["objects"]

    from vssm.engine.detect import framework

    model = framework("mmdet").init_detector(predicting, str(file), device="cpu")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, runner.model.state_dict()[key])


def test_images_are_of_one_size_with_and_without_mosaics(coco, tmp_path):
    cfg = small_config(TINY, coco, tmp_path / "work")
    from mmdet.registry import DATASETS

    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    counts = []
    for skipped in ((), ("Mosaic",)):
        dataset.update_skip_type_keys(skipped)
        samples = [dataset[i] for i in range(8)]
        for sample in samples:
            assert sample["inputs"].shape == (3, *SIZE)
            boxes = sample["data_samples"].gt_instances.bboxes.tensor
            assert boxes.numel() == 0 or (boxes.min() >= 0 and (boxes.amax(0)[2:] <= torch.tensor(SIZE[::-1])).all())
        counts.append(sum(len(sample["data_samples"].gt_instances) for sample in samples))
    assert counts[0] > counts[1] > 0


def _results(image, boxes):
    from mmdet.structures.bbox import HorizontalBoxes

    return {
        "img": image,
        "gt_bboxes": HorizontalBoxes(torch.tensor(boxes, dtype=torch.float32)),
        "gt_bboxes_labels": np.arange(len(boxes)),
        "gt_ignore_flags": np.zeros(len(boxes), dtype=bool),
    }


def test_boxes_follow_the_image():
    ours()
    from vssm.openmmlab.yolo import VSSMScaleShift

    np.random.seed(0)
    for _ in range(8):
        image = np.zeros((60, 80, 3), dtype=np.uint8)
        image[20:40, 30:60] = 255
        result = VSSMScaleShift((96, 64))(_results(image, [[30, 20, 60, 40]]))
        assert result["img"].shape == (64, 96, 3)
        assert result["img_shape"] == (64, 96)
        rows, columns = np.nonzero(result["img"][..., 0] > 200)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(result["gt_bboxes"].tensor[0].numpy(), found, atol=1.5)
        assert (result["img"][0, 0] == 114).all() or (result["img"][0, 0] == 0).all()


def test_an_image_of_the_right_size_stays_where_it_is_without_randomness():
    ours()
    from vssm.openmmlab.yolo import VSSMColourGains, VSSMScaleShift

    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    result = VSSMScaleShift((96, 64), scale=0.0, shift=0.0)(_results(image.copy(), [[3, 4, 30, 40]]))
    np.testing.assert_array_equal(result["img"], image)
    assert result["gt_bboxes"].tensor.tolist() == [[3, 4, 30, 40]]
    result = VSSMColourGains(0.0, 0.0, value=0.0)(result)
    assert np.abs(result["img"].astype(int) - image).max() <= 6  # hue is kept in steps of two degrees


def test_boxes_that_are_mostly_cut_off_are_dropped():
    ours()
    from vssm.openmmlab.yolo import VSSMScaleShift

    boxes = [[40, 40, 60, 60], [0, 0, 30, 30], [0, 40, 27, 60], [50, 50, 51.5, 80]]  # of which 25 to 75 is seen
    result = VSSMScaleShift((50, 50), scale=0.0, shift=0.0)(_results(np.zeros((100, 100, 3), dtype=np.uint8), boxes))
    assert result["gt_bboxes_labels"].tolist() == [0]
    assert result["gt_bboxes"].tensor.tolist() == [[15, 15, 35, 35]]


def test_colours_are_multiplied():
    ours()
    from vssm.openmmlab.yolo import VSSMColourGains

    np.random.seed(0)
    values = []
    for _ in range(50):
        result = VSSMColourGains()({"img": np.full((2, 2, 3), 100, dtype=np.uint8)})
        values.append(int(result["img"][0, 0, 0]))
        assert len(set(result["img"][0, 0].tolist())) == 1  # a grey stays one
    assert 60 <= min(values) < 70
    assert 130 < max(values) <= 140


def test_rates_rise_for_three_epochs_and_fall_to_a_hundredth():
    recipe = _recipe(TINY)
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import PARAM_SCHEDULERS

    wrapper = build_optim_wrapper(_build(recipe.model), recipe.optim_wrapper)
    schedulers = []
    for each in recipe.param_scheduler:
        cls = PARAM_SCHEDULERS.get(each.pop("type"))
        iterations = each.pop("convert_to_iter_based", False)
        build = cls.build_iter_from_epoch if iterations else cls
        schedulers.append((iterations, build(wrapper, **each, **({"epoch_length": 5} if iterations else {}))))
    group = wrapper.param_groups[0]
    rates, momenta = [], []
    for _ in range(300):
        rates.append(group["lr"])
        momenta.append(group["momentum"])
        for step in range(5):
            for of_iterations, scheduler in schedulers:
                if of_iterations or step == 4:
                    scheduler.step()
    assert rates[0] < 1e-6
    assert rates[3] == pytest.approx(0.01, rel=0.02)
    assert rates[150] == pytest.approx(0.01 * (1 - 0.99 * 150 / 299), rel=0.01)
    assert rates[299] == pytest.approx(1e-4, rel=0.05)
    assert momenta[0] == pytest.approx(0.8)
    assert momenta[3] == pytest.approx(0.937, rel=1e-3)


def test_weight_decay_is_for_all_but_biases_and_norms():
    recipe = _recipe(TINY)
    from mmengine.optim import build_optim_wrapper

    model = _build(recipe.model)
    groups = build_optim_wrapper(model, recipe.optim_wrapper).param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm | nn.BatchNorm2d)]
    of_norms = {id(parameter) for norm in norms for parameter in norm.parameters()}
    for name, parameter in model.named_parameters():
        undecayed = "bias" in name or id(parameter) in of_norms
        assert decay[id(parameter)] == (0 if undecayed else 4e-3), name
