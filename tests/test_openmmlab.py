"""Our backbones in mmdetection and mmsegmentation; runs where the extra ``mm`` is installed."""

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import vssm
from golden import records
from golden.dense import OFFICIAL
from openmmlab_recipes import CONFIGS, SIZE, ours, small_config, train_one_step
from vssm.cli import main
from vssm.data.scenes import write_ade, write_coco

pytestmark = pytest.mark.mm


def _build(**arguments):
    ours()
    from mmengine.registry import MODELS

    return MODELS.build({"type": "VSSMBackbone", **arguments})


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"), train=2, val=1, size=SIZE)


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    return write_ade(tmp_path_factory.mktemp("ade"), train=2, val=1, size=SIZE)


def test_the_package_itself_does_without():
    code = "import sys, vssm, vssm.detection; sys.exit('mmengine' in sys.modules or 'mmcv' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_detector_loads_the_official_backbone(name):
    """As ``load_from`` and ``init_detector`` do it: into the whole model, where the keys have a prefix."""
    backbone = _build(**OFFICIAL[name])
    from mmengine.runner.checkpoint import load_state_dict

    record = records.load(name)
    detector = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(2, 2)})
    head = {f"head.{key}": value for key, value in detector["head"].state_dict().items()}
    theirs = {f"backbone.{key}": value for key, value in record.state_dict.items()}
    load_state_dict(detector, theirs | head, strict=True)
    with torch.no_grad():
        for level, each in enumerate(backbone.eval()(record.images)):
            record.check(f"stage{level}", each)


def test_an_incomplete_official_backbone_is_refused():
    backbone = _build(**OFFICIAL["efficient_vmamba/efficient_vmamba_tiny_backbone@256x192"])
    record = records.load("efficient_vmamba/efficient_vmamba_tiny_backbone@256x192")
    lost = "outnorm2.weight"
    with pytest.raises(ValueError, match=r"1 missing \(norms\.2\.weight\)"):
        backbone.load_state_dict({key: value for key, value in record.state_dict.items() if key != lost})


def test_pretrained_weights_stay_when_a_detector_is_initialised(tmp_path):
    classifier = vssm.create_model("test_vmamba")
    file = tmp_path / "classifier.safetensors"
    vssm.checkpoint.write(file, classifier.state_dict(), {})
    ours()
    from mmengine.model import BaseModule

    for arguments in ({"pretrained": str(file)}, {"init_cfg": {"type": "Pretrained", "checkpoint": str(file)}}):
        detector = BaseModule()
        detector.backbone = _build(model_name="test_vmamba", out_norm=True, **arguments)
        detector.init_weights()
        state = classifier.state_dict()
        for key, value in detector.backbone.model.state_dict().items():
            torch.testing.assert_close(value, state[key], rtol=0, atol=0)


@pytest.mark.parametrize("tool", ["mmdet/test.py", "mmseg/train.py"])
def test_tools_of_the_frameworks_run(tool):
    ours()
    command = [sys.executable, "-m", "vssm.openmmlab", tool, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--cfg-options" in done.stdout


def test_an_unknown_tool_is_one_line():
    ours()
    done = subprocess.run([sys.executable, "-m", "vssm.openmmlab", "mmdet/no.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "vssm.openmmlab: no script 'mmdet/no.py', and no tool of an installed mmdet or mmseg"
    )


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"unknown model 'vmamba_tini'; the nearest names are"):
        _build(model_name="vmamba_tini")
    with pytest.raises(ValueError, match=r"out_indices must be increasing numbers of stages from 0 to 3"):
        _build(model_name="test_vmamba", out_indices=(0, 1, 2, 4))
    with pytest.raises(FileNotFoundError, match=r"no file 'missing\.pth' for pretrained; give a checkpoint"):
        _build(model_name="test_vmamba", pretrained="missing.pth").init_weights()
    with pytest.raises(ValueError, match=r"init_cfg must be dict\(type='Pretrained', checkpoint=FILE\)"):
        _build(model_name="test_vmamba", init_cfg={"type": "Kaiming"}).init_weights()
    other = tmp_path / "vim.safetensors"
    vssm.checkpoint.write(other, vssm.create_model("test_vim").state_dict(), {})
    with pytest.raises(ValueError, match="in the checkpoint"):
        _build(model_name="test_vmamba", pretrained=str(other)).init_weights()


def test_layer_decay_lowers_the_rates_of_earlier_blocks():
    backbone = _build(model_name="test_vim", pyramid=True, frozen_stages=1)
    from mmengine.optim import build_optim_wrapper

    detector = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(4, 4)})
    wrapper = {
        "constructor": "VSSMLayerDecay",
        "type": "OptimWrapper",
        "optimizer": {"type": "AdamW", "lr": 0.1, "weight_decay": 0.5},
    }
    optimizer = build_optim_wrapper(detector, {**wrapper, "paramwise_cfg": {"layer_decay": 0.5}}).optimizer
    of = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    named = dict(detector.named_parameters())
    trained = [name for name, parameter in named.items() if parameter.requires_grad]
    assert len(of) == len(trained) < len(named)

    def rate(name):
        return of[id(named[name])]["lr"]

    assert rate("head.weight") == rate("backbone.pyramid.1.0.weight") == 0.1
    in_proj = [rate(f"backbone.model.blocks.{i}.mixer.in_proj.weight") for i in (1, 2, 3)]
    assert in_proj == pytest.approx([0.0125, 0.025, 0.05])
    kept = {f"backbone.model.{name}" for name in backbone.model.no_weight_decay()}
    assert any(name.endswith("A_log") for name in kept)
    for name in trained:
        undecayed = named[name].ndim == 1 or name in kept
        assert of[id(named[name])]["weight_decay"] == (0.0 if undecayed else 0.5), name
    with pytest.raises(ValueError, match=r"expected paramwise_cfg=dict\(layer_decay=RATE\)"):
        build_optim_wrapper(detector, {**wrapper, "paramwise_cfg": {"layer_decay": 2.0}})


def test_layers_of_a_model_that_names_no_undecayed_weights():
    backbone = _build(model_name="test_convnext")
    from mmengine.optim import build_optim_wrapper

    wrapper = {
        "constructor": "VSSMLayerDecay",
        "type": "OptimWrapper",
        "optimizer": {"type": "AdamW", "lr": 0.1, "weight_decay": 0.5},
        "paramwise_cfg": {"layer_decay": 1.0},
    }
    optimizer = build_optim_wrapper(nn.ModuleDict({"backbone": backbone}), wrapper).optimizer
    decays = {each.ndim > 1: group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    assert decays == {True: 0.5, False: 0.0}


def _random_boxes(count):
    corners = torch.rand(count, 2) * 80
    return torch.cat([corners, corners + 5 + torch.rand(count, 2) * 40], dim=1)


def test_a_simple_pyramid_has_levels_of_all_strides():
    pyramid = ours().VSSMSimplePyramid([16], 32)
    levels = pyramid([torch.randn(2, 16, 8, 6)])
    assert [tuple(each.shape) for each in levels] == [
        (2, 32, *size) for size in ((32, 24), (16, 12), (8, 6), (4, 3), (2, 2))
    ]
    sum(each.square().sum() for each in levels).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in pyramid.parameters() if parameter.ndim > 1)
    with pytest.raises(
        ValueError, match=r"expected in_channels of one map.*got \[16, 32\] and 5; give the backbone one"
    ):
        ours().VSSMSimplePyramid([16, 32])


def test_suppression_keeps_what_the_definition_keeps():
    ours()
    from mmcv.ops import nms, soft_nms

    boxes, scores = _random_boxes(60), torch.rand(60)
    overlap = torchvision.ops.box_iou(boxes, boxes)
    left, kept = scores.argsort(descending=True).tolist(), []
    while left:
        best, *left = left
        kept.append(best)
        left = [each for each in left if overlap[best, each] <= 0.4]
    assert nms(boxes, scores, 0.4)[1].tolist() == kept

    lowered, order = scores.clone(), []
    left = set(range(len(boxes)))
    while left:
        best = max(left, key=lambda each: lowered[each])
        order.append(best)
        left.remove(best)
        for each in left:
            lowered[each] *= torch.exp(-(overlap[best, each] ** 2) / 0.5)
        left = {each for each in left if lowered[each] >= 0.05}
    dets, indices = soft_nms(boxes, scores, iou_threshold=0.3, sigma=0.5, min_score=0.05, method="gaussian")
    assert indices.tolist() == order
    torch.testing.assert_close(dets[:, 4], lowered[order])
    for method in ("linear", "naive"):
        dets, indices = soft_nms(boxes, scores, iou_threshold=0.4, min_score=0.0, method=method)
        assert (dets[:, 4].diff() <= 0).all()
    assert indices[dets[:, 4] > 0].tolist() == kept


def test_regions_and_focal_loss_have_the_gradients_of_torchvision():
    ours()
    from mmcv import ops

    regions = torch.cat([torch.randint(0, 2, (9, 1)), _random_boxes(9)], dim=1).double()
    maps = torch.rand(2, 3, 30, 34, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(9, 3, 5, 5, dtype=torch.float64)
    results = []
    for pooled in (
        ops.roi_align(maps, regions, (5, 5), 0.25, 2, "avg", True),
        torchvision.ops.roi_align(maps, regions, (5, 5), 0.25, 2, True),
    ):
        results.append((pooled, *torch.autograd.grad((pooled * weight).sum(), maps)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)

    logits = torch.randn(8, 4, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 4, 4, 0, 2])  # 4 is the background
    hot = nn.functional.one_hot(target, 5)[:, :4].float()
    theirs = torchvision.ops.sigmoid_focal_loss(logits, hot, alpha=0.25, gamma=2.0)
    from vssm.openmmlab import mmcv_ops

    mine, gradient = torch.empty_like(logits), torch.empty_like(logits)
    mmcv_ops.sigmoid_focal_loss_forward(logits, target, torch.empty(0), mine, 2.0, 0.25)
    mmcv_ops.sigmoid_focal_loss_backward(logits, target, torch.empty(0), gradient, 2.0, 0.25)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs.sum(), logits)[0])


def test_other_operators_say_what_they_need():
    ours()
    ext = sys.modules["mmcv._ext"]
    if ext.__spec__.origin != "torchvision":
        pytest.skip("a compiled mmcv has all operators")
    with pytest.raises(NotImplementedError, match="carafe_forward needs mmcv with its compiled operators"):
        ext.carafe_forward()


@pytest.mark.parametrize(
    "name", ["mmdet/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py", "mmseg/upernet_vmamba-tiny-s1l8_160k_ade20k-512x512.py"]
)
def test_a_recipe_trains_saves_resumes_and_predicts(name, coco, ade, tmp_path):
    detection = name.startswith("mmdet")
    root = coco if detection else ade
    ours()
    from mmengine.config import Config

    cfg = small_config(CONFIGS / name, root, tmp_path / "work", model_name="test_vmamba")
    runner, unchanged = train_one_step(cfg)
    assert [each for each in unchanged if each.startswith("backbone.") or not each.endswith("bias")] == []

    file = tmp_path / "work" / "iter_1.pth"
    resumed = cfg.copy()
    resumed.load_from, resumed.resume, resumed.experiment_name = str(file), True, "again"
    resumed.train_cfg.max_iters = 2
    again, _ = train_one_step(resumed)
    assert again.iter == 2

    predicting = small_config(CONFIGS / name, root, tmp_path / "work", model_name="test_vmamba")
    predicting.test_dataloader = Config.fromfile(CONFIGS / name).test_dataloader
    predicting.dump(tmp_path / "recipe.py")
    command, folder = ("detect", coco / "val2017") if detection else ("segment", ade / "images" / "validation")
    options = ["--recipe", tmp_path / "recipe.py", "--checkpoint", file, "--results", tmp_path / "found.json"]
    options += ["--pictures", tmp_path / "out", *(["--threshold", "0"] if detection else [])]
    assert main([command, str(folder), *map(str, options)]) == 0
    (record,) = json.loads((tmp_path / "found.json").read_text())
    assert Path(record["picture"]).is_file()
    if detection:
        assert {each["class"] for each in record["objects"]} <= set(map(str, range(10)))
        assert all(each["mask"]["size"] == list(SIZE) for each in record["objects"])
        assert record["objects"]
    else:
        assert sum(record["shares"].values()) == pytest.approx(1)

    from vssm.engine.detect import framework

    init = framework("mmdet").init_detector if detection else framework("mmseg").init_model
    model = init(predicting, str(file), device="cpu")
    for key, value in model.backbone.state_dict().items():
        torch.testing.assert_close(value, runner.model.backbone.state_dict()[key])

    predicting.pop("test_pipeline")  # it is that of the data to test on, too
    predicting.dump(tmp_path / "recipe.py")
    assert main([command, str(folder), *map(str, options)]) == 0
    assert json.loads((tmp_path / "found.json").read_text()) == [record]
    predicting.pop("test_dataloader")
    predicting.dump(tmp_path / "recipe.py")
    assert main([command, str(folder), *map(str, options)]) == 1


@pytest.mark.slow
def test_a_killed_run_goes_on(coco, tmp_path):
    name, work = "mmdet/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py", tmp_path / "work"
    cfg = small_config(CONFIGS / name, coco, work, model_name="test_vmamba")
    cfg.train_cfg.max_iters, cfg.default_hooks.logger.interval = 5, 1
    cfg.dump(tmp_path / "recipe.py")
    command = [sys.executable, "-m", "vssm.openmmlab", "mmdet/train.py", str(tmp_path / "recipe.py")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while not (work / "iter_2.pth").is_file():
            assert run.poll() is None
            time.sleep(0.05)
        run.kill()
    killed_at = int((work / "last_checkpoint").read_text().rpartition("iter_")[2].partition(".")[0])
    assert 1 <= killed_at < 5  # the newest file may be cut off, which last_checkpoint never names
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    first, second = sorted(work.glob("*/vis_data/scalars.json"))
    steps = [[json.loads(line)["iter"] for line in log.read_text().splitlines()] for log in (first, second)]
    assert steps[0][-1] >= killed_at
    assert steps[1] == list(range(killed_at + 1, 6))
    torch.load(work / "iter_5.pth", weights_only=False)


def test_what_a_run_reached_is_recorded(ade, tmp_path, monkeypatch, capsys):
    name = "mmseg/fpn_vmamba-tiny-s1l8_camvid-320x240.py"
    ours()
    from mmengine.config import Config

    cfg = small_config(CONFIGS / name, ade, tmp_path / "work", model_name="test_vmamba")
    whole = Config.fromfile(CONFIGS / name)
    cfg.test_dataloader, cfg.test_evaluator, cfg.test_cfg = whole.test_dataloader, whole.test_evaluator, whole.test_cfg
    folders = {"img_path": "images/validation", "seg_map_path": "annotations/validation"}
    cfg.test_dataloader.dataset.update(data_root=str(ade), data_prefix=folders, reduce_zero_label=True)
    cfg.test_dataloader.update(num_workers=0, batch_size=1)
    runner, _ = train_one_step(cfg)
    tool = runpy.run_path(str(CONFIGS.parent / "tools" / "dense_results.py"))
    with pytest.raises(ValueError, match="expected metrics of a validation or a test, got none; run the test first"):
        tool["read_run"](tmp_path / "work")
    metrics = runner.test()
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "work"), "--results", str(tmp_path / "dense.json")])
    capsys.readouterr()
    tool["main"]()
    assert "mIoU" in capsys.readouterr().out.splitlines()[0]
    (record,) = json.loads((tmp_path / "dense.json").read_text())
    assert record["mIoU"] == pytest.approx(metrics["mIoU"])
    setting = {"config": Path(name).stem, "model": "test_vmamba", "seed": 0, "iterations": 1}
    assert {key: record[key] for key in setting} == setting


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("mm*/*.py")))
def test_every_recipe_trains_a_step(name, coco, ade, tmp_path):
    cfg = small_config(CONFIGS / name, coco if name.startswith("mmdet") else ade, tmp_path / "work")
    runner, unchanged = train_one_step(cfg)
    # Of the gradient of a bias that a batch norm takes out again there is but rounding.
    takes_out = any(isinstance(module, nn.BatchNorm2d) for module in runner.model.backbone.modules())
    unchanged = [each for each in unchanged if not (takes_out and each.endswith("bias"))]
    assert [each for each in unchanged if each.startswith("backbone.")] == []


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("mmdet/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py", r"neck.in_channels is \[96, 192, 384, 768\]"),
        ("mmseg/upernet_vmamba-tiny-s1l8_160k_ade20k-512x512.py", r"decode_head.in_channels is \[96, 192, 384, 768\]"),
    ],
)
def test_wrong_channels_are_an_error_that_names_the_right_ones(name, setting, coco, ade, tmp_path):
    cfg = small_config(CONFIGS / name, coco if name.startswith("mmdet") else ade, tmp_path / "work")
    cfg.model.backbone.model_name = "test_vmamba"
    with pytest.raises(ValueError, match=rf"{setting}, but test_vmamba gives \[16, 32, 64, 128\]; set"):
        train_one_step(cfg)
