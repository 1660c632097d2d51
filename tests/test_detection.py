"""torchvision's detectors on our backbones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn, retinanet_resnet50_fpn

import vssm
from vssm import detection

SMALL = {"min_size": 64, "max_size": 96}
FEW_REGIONS = {"rpn_post_nms_top_n_train": 50, "box_batch_size_per_image": 8}
DETECTORS = {
    "fasterrcnn": (detection.fasterrcnn, fasterrcnn_resnet50_fpn),
    "maskrcnn": (detection.maskrcnn, maskrcnn_resnet50_fpn),
    "retinanet": (detection.retinanet, retinanet_resnet50_fpn),
}


def _targets(*, masks: bool) -> list[dict[str, Tensor]]:
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [30.0, 10.0, 60.0, 44.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    if masks:
        target["masks"] = torch.zeros(2, 70, 90, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(target["masks"], boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
    return [target]


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        *(("fasterrcnn", model) for model in vssm.list_models("test_*")),
        *((kind, model) for kind in ("maskrcnn", "retinanet") for model in ("test_vim", "test_vmamba")),
    ],
)
def test_every_weight_of_a_detector_learns(kind, model):
    few = {} if kind == "retinanet" else FEW_REGIONS
    detector = DETECTORS[kind][0](model, num_classes=3, **SMALL, **few)
    losses = detector([torch.rand(3, 70, 90)], _targets(masks=kind == "maskrcnn"))
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    without = [name for name, parameter in detector.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(parameter.grad.abs().sum() > 0 for parameter in detector.backbone.body.parameters())


def test_two_processes_have_the_losses_of_one(tmp_path):
    script = Path(__file__).parent / "detector_steps.py"
    launchers = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
    for name, launcher in launchers.items():
        command = [sys.executable, *launcher, str(script), str(tmp_path / f"{name}.json")]
        subprocess.run(command, check=True, capture_output=True)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in launchers)
    assert two == pytest.approx(one, rel=1e-6)
    assert one[1] < one[0]


@pytest.mark.parametrize("kind", DETECTORS)
def test_anchors_and_regions_are_those_of_torchvision_for_its_strides(kind):
    ours = DETECTORS[kind][0]("test_vmamba")
    theirs = DETECTORS[kind][1](weights=None, weights_backbone=None)
    if kind == "retinanet":
        anchors = [each.anchor_generator for each in (ours, theirs)]
    else:
        anchors = [each.rpn.anchor_generator for each in (ours, theirs)]
        assert vars(ours.roi_heads.box_roi_pool)["featmap_names"] == theirs.roi_heads.box_roi_pool.featmap_names
    assert anchors[0].sizes == anchors[1].sizes
    assert anchors[0].aspect_ratios == anchors[1].aspect_ratios
    own_part = {name for name, _ in theirs.named_parameters() if not name.startswith("backbone.body.")}
    assert {name for name, _ in ours.named_parameters() if not name.startswith("backbone.body.")} == own_part


@pytest.mark.parametrize(("model", "last"), [("test_vim", "blocks.3."), ("test_vmamba", "stages.3.")])
def test_trainable_layers_are_the_last(model, last):
    detector = detection.fasterrcnn(model, trainable_layers=1, **SMALL)
    body = detector.backbone.body
    trained = {name for name, parameter in body.model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in body.model.named_parameters() if name.startswith((last, "norm."))}
    assert all(parameter.requires_grad for parameter in detector.backbone.fpn.parameters())
    with pytest.raises(ValueError, match=r"trainable_layers of .* must be 0 to 4, got 5"):
        detection.fasterrcnn(model, trainable_layers=5)


def test_weights_of_a_classifier_are_loaded(tmp_path):
    classifier = vssm.create_model("test_vmamba", num_classes=7)
    vssm.checkpoint.write(tmp_path / "classifier.safetensors", classifier.state_dict(), {})
    detector = detection.fasterrcnn("test_vmamba", pretrained=tmp_path / "classifier.safetensors")
    state = classifier.state_dict()
    for key, value in detector.backbone.body.model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"nearest names are .*vmamba_tiny_s1l8"):
        detection.fasterrcnn("vmamba_tiny_s18")
    with pytest.raises(ValueError, match=r"no argument 'min_sise'"):
        detection.fasterrcnn("test_vmamba", min_sise=64)
    with pytest.raises(FileNotFoundError, match=r"no file .*missing\.pth"):
        detection.fasterrcnn("test_vmamba", pretrained=tmp_path / "missing.pth")
    with pytest.raises(ValueError, match=r"out_indices .* from 0 to 3 of test_vmamba, got \(0, 4\)"):
        detection.fasterrcnn("test_vmamba", backbone_kwargs={"out_indices": (0, 4)})
