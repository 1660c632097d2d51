"""Published recipes for OpenMMLab on generated data, shrunk until a CPU trains a step."""

from pathlib import Path

import pytest
import torch

import vssm

CONFIGS = Path(__file__).parents[1] / "configs"
SIZE = (64, 96)


def ours():
    pytest.importorskip("mmdet")
    pytest.importorskip("mmseg")
    import vssm.openmmlab

    return vssm.openmmlab


def _parts(node):
    if isinstance(node, dict):
        yield node
    for each in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
        yield from _parts(each)


def small_config(path, root, work_dir, *, model_name=None):
    """A published recipe on generated data, with everything shrunk that costs time on a CPU but not the backbone."""
    ours()
    from mmengine.config import Config

    cfg = Config.fromfile(path)
    cfg.model.backbone.update(pretrained=False, drop_path_rate=0.0)  # a dropped branch would learn nothing
    if cfg.model.backbone.model_name == "resnet50":
        cfg.model.backbone.zero_init_last = False  # nor would one that starts with a factor of zero
    detection = path.parent.name == "mmdet"
    if model_name is not None:
        cfg.model.backbone.model_name = model_name
        dims = [info["num_chs"] for info in vssm.create_model(model_name).feature_info]
        if "neck" in cfg.model:
            _set_channels(cfg.model, [dims[i] for i in cfg.model.backbone.get("out_indices", range(len(dims)))])
        else:
            cfg.model.decode_head.in_channels, cfg.model.auxiliary_head.in_channels = dims, dims[2]
    backbone = cfg.model.backbone
    if "window_sizes" in backbone:
        backbone.window_sizes = (4, 2)  # attention to thousands of tokens
    attends = backbone.model_name.startswith("a2mamba")
    if attends:
        backbone.update(windows=(3, 3, 3, 3), layer_scale=(1.0, 1.0, 1.0, 1.0))
    _shrink(cfg, scale=2 if attends else 1)  # maps must be as large as windows
    data = cfg.train_dataloader
    data.update(num_workers=0, persistent_workers=False, batch_size=2)
    dataset = data.dataset.get("dataset", data.dataset)  # inside of one that mixes images
    dataset.data_root = f"{root}/"
    if detection:
        dataset.update(
            ann_file="annotations/instances_train2017.json",
            data_prefix={"img": "train2017/"},
            metainfo={"classes": tuple(map(str, range(10)))},
            filter_cfg={"filter_empty_gt": True, "min_size": 8},
        )
        cfg.val_evaluator.ann_file = f"{root}/annotations/instances_train2017.json"
    else:
        folders = {"img_path": "images/training", "seg_map_path": "annotations/training"}
        dataset.update(data_prefix=folders, reduce_zero_label=True)
    cfg.val_dataloader = cfg.test_dataloader = cfg.val_cfg = cfg.test_cfg = None
    cfg.val_evaluator = cfg.test_evaluator = None
    cfg.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 1}
    data.sampler = {"type": "InfiniteSampler", "shuffle": False}
    cfg.default_hooks.checkpoint = {"type": "CheckpointHook", "interval": 1, "by_epoch": False}
    cfg.param_scheduler = []
    if cfg.optim_wrapper.type == "AmpOptimWrapper":
        cfg.optim_wrapper.type = "OptimWrapper"  # on a CPU there is no other
    cfg.env_cfg.dist_cfg = {"backend": "gloo"}
    cfg.randomness = {"seed": 0}
    # mmengine goes on with the log and the visualizer of a run of the same name.
    cfg.work_dir, cfg.experiment_name = str(work_dir), str(work_dir).replace("/", "_")
    cfg.visualizer.name = cfg.experiment_name
    return cfg


def _set_channels(model, channels):
    model.neck.in_channels = channels
    if "in_channels" in model.get("bbox_head", {}):
        model.bbox_head.in_channels = channels


def _shrink(cfg, *, scale):
    height, width = (scale * side for side in SIZE)
    small = {"fc_out_channels": 32, "num_convs": 1, "nms_pre": 50, "max_per_img": 20, "channels": 32}
    for part in _parts(cfg.model):
        for key, value in small.items():
            if key in part and isinstance(part[key], int):
                part[key] = value
        if "sampler" in part and "num" in part["sampler"]:
            part["sampler"]["num"] = 16
        if part.get("num_classes") in (3, 80):
            part["num_classes"] = 10
    if "size" in cfg.model.get("data_preprocessor", {}):
        cfg.model.data_preprocessor.size = (height, height)
    for step in _parts(cfg.train_dataloader.dataset):
        if step.get("type") in ("Mosaic", "VSSMScaleShift"):
            step["img_scale" if step["type"] == "Mosaic" else "size"] = (width, height)
        if "scale" in step and step["type"] in ("Resize", "RandomResize"):
            step["scale"] = (width, height)
        if "scales" in step:
            step["scales"] = [(width, height)]
        if step.get("type") == "Pad" and "size" in step:
            step["size"] = (width, height)
        if step.get("type") == "RandomCrop":
            step["crop_size"] = (height, height)


def train_one_step(cfg):
    from mmengine.runner import Runner

    runner = Runner.from_cfg(cfg)
    before = {name: parameter.detach().clone() for name, parameter in runner.model.named_parameters()}
    runner.train()
    loss = runner.message_hub.get_scalar("train/loss").data[0]
    assert torch.isfinite(torch.as_tensor(loss)).all()
    unchanged = [name for name, parameter in runner.model.named_parameters() if torch.equal(before[name], parameter)]
    return runner, unchanged
