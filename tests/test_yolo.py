"""Mamba-YOLO as a whole: the official outputs and losses, its parts by hand, and that it learns."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.ops import box_convert, box_iou, complete_box_iou

import vssm
from golden import records
from vssm.cli import main
from vssm.engine.info import count_parts
from vssm.yolo import MambaYoloDetector, MambaYoloNeck, YoloHead
from vssm.yolo.loss import Objects, assign, detection_losses, distribution_loss

RECORDS = ["mamba_yolo/mamba_yolo_t", "mamba_yolo/mamba_yolo_t@160x256"]
# As counted on the official models, whose 16 fixed weights of the expectation over bins are parameters.
PARAMETERS = {"mambayolo_tiny": 6_131_704, "mambayolo_base": 21_828_000, "mambayolo_large": 57_631_024}
# Multiply-adds at 640×640 in G, counted on the official models: of convolutions and of the scans' projections.
GMACS = {"mambayolo_tiny": 7.04 + 1.00, "mambayolo_base": 24.70 + 2.52, "mambayolo_large": 77.68 + 8.63}


def objects_of(name: str) -> list[Objects]:
    """The objects of a record, whose boxes are given by centre and size over the sides of the image."""
    given = json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text())["input"]
    images, _, height, width = given["shape"]
    rows = torch.tensor(given["targets"])
    boxes = box_convert(rows[:, 2:], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
    return [Objects(boxes[rows[:, 0] == i], rows[rows[:, 0] == i, 1].long()) for i in range(images)]


@pytest.mark.parametrize("name", RECORDS)
def test_detector_computes_the_official_outputs_and_losses(name, device):
    record = records.load(name)
    detector = MambaYoloDetector("mambayolo_tiny").eval()
    vssm.checkpoint.load(detector, record.state_dict)
    detector, images = detector.to(device), record.images.to(device)
    with torch.no_grad():
        maps = detector.backbone(images)
        record.check("backbone_sppf", detector.neck.pooling(maps[-1]))
        maps = detector.neck(maps)
        heads = detector.bbox_head(maps)
        cells = detector(images)
        losses = detection_losses(cells, [Objects(*(part.to(device) for part in each)) for each in objects_of(name)])
    for level, (each, classes, sides) in enumerate(zip(maps, *heads, strict=True), start=3):
        record.check(f"neck_p{level}", each)
        record.check(f"cls{level}", classes)
        record.check(f"box{level}", sides)
    boxes = box_convert(cells.boxes(), "xyxy", "cxcywh")
    record.check("boxes", boxes.transpose(1, 2).unsqueeze(2))
    record.check("scores", cells.classes.sigmoid().transpose(1, 2).unsqueeze(2))
    assert losses.keys() == {"loss_box", "loss_cls", "loss_dfl"}
    for key, loss in losses.items():
        record.check(key, loss[None])


@pytest.mark.parametrize("name", PARAMETERS)
def test_size_and_operations_are_those_of_the_official_detector(name):
    with torch.device("meta"):
        detector = MambaYoloDetector(name).eval()
        parts = count_parts(detector, torch.empty(1, 3, 640, 640)).values()
    assert sum(part.params for part in parts) == PARAMETERS[name] - 16
    macs = sum(part.conv_macs + part.matmul_macs for part in parts)
    assert macs / 1e9 == pytest.approx(GMACS[name], abs=0.006)


def test_official_keys_are_all_needed():
    record = records.load(RECORDS[1])
    detector = MambaYoloDetector("mambayolo_tiny")
    for lost, ours in (
        ("model.3.op.Ds", r"backbone\.model\.stages\.1\.blocks\.0\.mixer\.ssm\.D"),
        ("model.17.ss2d.0.out_norm.bias", r"neck\.bottom_up\.0\.mixer\.0\.out_norm\.bias"),
        ("model.21.cv3.2.2.weight", r"bbox_head\.classes\.2\.2\.weight"),
    ):
        with pytest.raises(ValueError, match=rf"1 missing \({ours}\)"):
            vssm.checkpoint.load(detector, {key: value for key, value in record.state_dict.items() if key != lost})
    with pytest.raises(ValueError, match=r"mambayolo: unknown key 'model\.9\.weight' in the checkpoint"):
        vssm.checkpoint.load(detector, record.state_dict | {"model.9.weight": torch.ones(1)})
    fixed = {"model.21.dfl.conv.weight": torch.arange(16.0).view(1, 16, 1, 1)}
    vssm.checkpoint.load(detector, record.state_dict | fixed)


def test_the_official_file_of_a_detector_is_converted(tmp_path, capsys):
    """As the official framework writes it: with the moving average, and the fixed weights of the expectation."""
    record = records.load(RECORDS[1])
    fixed = {"model.21.dfl.conv.weight": torch.arange(16.0).view(1, 16, 1, 1)}
    official = record.state_dict | fixed
    torch.save({"model": None, "ema": official, "updates": 3}, tmp_path / "official.pth")
    command = ["convert", str(tmp_path / "official.pth"), "--model", "mambayolo_tiny", "--task", "detect"]
    assert main([*command, "--entry", "ema"]) == 0
    assert "left out model.21.dfl.conv.weight: not part of mambayolo_tiny" in capsys.readouterr().out
    written = json.loads((tmp_path / "official.json").read_text())
    assert written["task"] == "detect"
    assert written["keys"].keys() == record.state_dict.keys()
    assert written["dropped"].keys() == {"model", "updates", *fixed}

    detector = MambaYoloDetector("mambayolo_tiny").eval()
    assert {mine for keys in written["keys"].values() for mine in keys} == detector.state_dict().keys()
    vssm.checkpoint.load(detector, vssm.checkpoint.read_whole(tmp_path / "official.safetensors"))
    with torch.no_grad():
        record.check("scores", detector(record.images).classes.sigmoid().transpose(1, 2).unsqueeze(2))


def test_what_is_no_detector_is_not_converted(tmp_path, capsys):
    state = records.load(RECORDS[1]).state_dict
    torch.save(state, tmp_path / "official.pth")
    command = ["convert", str(tmp_path / "official.pth"), "--task", "detect", "--model"]
    assert main([*command, "vmamba_tiny_s1l8"]) == 1
    assert "expected weights whose names begin with 'backbone.'" in capsys.readouterr().err
    assert main([*command, "mambayolo_tiny", "--img-size", "640"]) == 1
    assert "leave img_size out" in capsys.readouterr().err
    assert main([*command, "mambayolo_base"]) == 1
    assert "does not fit MambaYoloDetector" in capsys.readouterr().err
    del state["model.20.mlp.fc2.bias"]
    torch.save(state, tmp_path / "official.pth")
    assert main([*command, "mambayolo_tiny"]) == 1
    assert "1 missing (neck.bottom_up.1.mlp.fc2.bias)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["official.pth"]


def assigned_by_hand(objects: Objects, boxes, scores, centres):
    """The owner of each cell, None for most, and its target score, in loops."""
    inside, overlaps, metrics, picks = {}, {}, {}, {}
    for n, (box, label) in enumerate(zip(objects.boxes, objects.labels, strict=True)):
        for a, (x, y) in enumerate(centres.tolist()):
            inside[n, a] = box[0] < x < box[2] and box[1] < y < box[3]
            overlap = complete_box_iou(box[None], boxes[a][None]).item()
            overlaps[n, a] = max(overlap, 0.0) if inside[n, a] else 0.0
            metrics[n, a] = scores[a, label].item() ** 0.5 * overlaps[n, a] ** 6
        ranked = sorted(range(len(centres)), key=lambda a, n=n: -metrics[n, a])
        picks[n] = {a for a in ranked[:10] if inside[n, a]}
    owner = {}
    for a in range(len(centres)):
        picking = [n for n in picks if a in picks[n]]
        if len(picking) > 1:
            picking = [max(range(len(objects.boxes)), key=lambda n, a=a: overlaps[n, a])]
        if picking:
            owner[a] = picking[0]
    targets = {}
    for a, n in owner.items():
        mine = [other for other, one in owner.items() if one == n]
        best = max(metrics[n, each] for each in mine)
        targets[a] = metrics[n, a] * max(overlaps[n, each] for each in mine) / best if best else 0.0
    return owner, targets


def test_assignment_against_loops():
    cells = YoloHead(3, [8, 8], strides=(8, 16))
    maps = cells([torch.zeros(1, 8, 8, 8), torch.zeros(1, 8, 4, 4)])
    centres = cells.cells(maps).centres
    boxes = torch.cat([centres - 4 - 16 * torch.rand(80, 2), centres + 4 + 16 * torch.rand(80, 2)], dim=1)
    scores = torch.rand(80, 3)
    objects = Objects(
        torch.tensor([[2.0, 2, 41, 39], [10, 8, 50, 45], [5, 30, 20, 60], [50, 50, 53, 53], [12, 9, 49, 44]]),
        torch.tensor([2, 0, 1, 1, 0]),
    )
    targets = assign(objects, boxes, scores, centres)
    owner, expected = assigned_by_hand(objects, boxes, scores, centres)
    assert len(set(owner.values())) == 4  # none of the cells has its centre in the small box
    assert len(owner) < 40  # some are picked several times
    for a in range(80):
        row = torch.zeros(3)
        if a in owner:
            row[objects.labels[owner[a]]] = expected[a]
            assert torch.equal(targets.boxes[a], objects.boxes[owner[a]])
        torch.testing.assert_close(targets.scores[a], row, rtol=1e-4, atol=1e-7)


def test_distribution_loss_is_least_at_the_distance():
    distances = torch.tensor([[0.0, 2.25, 7.0, 40.0]])
    shares = torch.zeros(1, 4, 16)
    for side, (below, share) in enumerate(((0, 0.0), (2, 0.25), (7, 0.0), (14, 0.99))):
        shares[0, side, below], shares[0, side, below + 1] = 1 - share, share
    logits = torch.randn(1, 4, 16, requires_grad=True)
    loss = distribution_loss(logits, distances)
    torch.testing.assert_close(loss, -(shares * logits.log_softmax(-1)).sum(-1).mean(-1))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient, (logits.softmax(-1) - shares) / 4)


def small_detector(**arguments) -> MambaYoloDetector:
    return MambaYoloDetector("test_mambayolo", 4, **arguments)


def test_every_parameter_gets_a_gradient():
    detector = small_detector(neck_mixers=2)
    cells = detector(torch.rand(2, 3, 64, 96))
    (cells.boxes().square().mean() + cells.classes.square().mean()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_images_without_objects_only_lower_scores():
    detector = small_detector()
    losses = detector.losses(torch.rand(1, 3, 64, 64), [Objects(torch.empty(0, 4), torch.empty(0).long())])
    assert losses["loss_box"] == losses["loss_dfl"] == 0
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in detector.parameters())
    assert (detector.bbox_head.classes[0][-1].bias.grad > 0).all()


def test_boxes_without_extent_give_finite_losses():
    head = YoloHead(2, [4], strides=(8,))
    maps = head([torch.rand(1, 4, 4, 4)])
    sides = torch.full_like(maps.sides[0], -200).requires_grad_()
    saturated = sides + torch.zeros(64).index_fill(0, torch.tensor([0, 16, 32, 48]), 400)[:, None, None]
    cells = head.cells(maps._replace(sides=[saturated]))
    assert not (cells.boxes()[..., 2:] - cells.boxes()[..., :2]).any()
    losses = detection_losses(cells, [Objects(torch.tensor([[0.0, 0, 30, 30]]), torch.tensor([0]))])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert sides.grad.isfinite().all()


def test_it_starts_by_expecting_five_objects_in_an_image():
    head = YoloHead(10, [8, 8, 8])
    for branch in head.classes:
        nn.init.zeros_(branch[-1].weight)
    maps = head([torch.rand(1, 8, side, side) for side in (80, 40, 20)])
    for each in maps.classes:
        assert each.sigmoid().sum().item() == pytest.approx(5, rel=1e-2)


def test_sides_of_any_length():
    detector = small_detector().eval()
    images = torch.rand(2, 3, 75, 101)
    cells = detector(images)
    assert len(cells.centres) == len(cells.strides) == cells.classes.shape[1] == 13 * 10 + 7 * 5 + 4 * 3
    found = detector.detect(images, threshold=0.0, most=20)
    for image, each in zip(images, found, strict=True):
        (alone,) = detector.detect(image[None], threshold=0.0, most=20)
        torch.testing.assert_close(each, alone, rtol=1e-3, atol=1e-3)
        assert each["boxes"].min() >= 0
        assert (each["boxes"].amax(0) <= torch.tensor([101, 75, 101, 75])).all()
        assert (each["scores"].diff() <= 0).all()
        assert len(each["labels"]) == 20


def test_the_best_candidates_are_compared(monkeypatch):
    detector = small_detector().eval()
    images = torch.rand(1, 3, 64, 64)
    (everything,) = detector.detect(images, threshold=0.0, iou_threshold=1.0, most=10_000)
    assert len(everything["scores"]) == 4 * (8 * 8 + 4 * 4 + 2 * 2)
    monkeypatch.setattr("vssm.yolo.detector._CANDIDATES", 25)
    (few,) = detector.detect(images, threshold=0.0, iou_threshold=1.0, most=10_000)
    torch.testing.assert_close(few["scores"], everything["scores"][:25])


def test_wrong_maps_are_refused():
    neck = MambaYoloNeck([8, 16])
    with pytest.raises(ValueError, match=r"MambaYoloNeck: expected maps of \[8, 16\] channels, got \[8, 8\]"):
        neck([torch.rand(1, 8, 4, 4), torch.rand(1, 8, 2, 2)])


@pytest.mark.slow
def test_compiles_to_one_graph_and_exports_with_any_size():
    detector = small_detector().eval()
    images = torch.rand(2, 3, 64, 96)
    compiled = torch.compile(detector, fullgraph=True, backend="aot_eager")
    sizes = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(detector, (images,), dynamic_shapes=sizes, strict=True).module()
    cases = [(compiled, images), (program, images), (program, torch.rand(3, 3, 128, 96)), (program, images[..., :75])]
    for run, batch in cases:
        for mine, expected in zip(run(batch), detector(batch), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_learns_where_things_are_and_what_they_are():
    """By batch statistics, for the running ones follow slowly."""
    boxes = torch.tensor([[8, 4, 48, 40], [20, 10, 50, 58], [2, 30, 54, 62], [24, 24, 60, 60]])
    images = torch.full((4, 3, 64, 64), 0.1)
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        images[i, i % 2, y0:y1, x0:x1] = 0.9
    objects = [Objects(box[None].float(), torch.tensor([i % 2])) for i, box in enumerate(boxes)]
    detector = MambaYoloDetector("test_mambayolo", 2)
    optimizer = torch.optim.AdamW(detector.parameters(), 5e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    for _ in range(60):
        optimizer.zero_grad()
        sum(detector.losses(images, objects).values()).backward()
        optimizer.step()
        scheduler.step()
    for found, each in zip(detector.detect(images, threshold=0.5), objects, strict=True):
        assert found["labels"].tolist() == each.labels.tolist()
        assert box_iou(found["boxes"], each.boxes).item() > 0.9
