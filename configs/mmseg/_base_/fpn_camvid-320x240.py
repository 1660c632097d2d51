# Semantic FPN from scratch for 1,000 steps of 16 crops on CamVid, 367 photographs of streets.
_base_ = ["mmseg::_base_/models/fpn_r50.py", "mmseg::_base_/default_runtime.py"]
custom_imports = dict(imports=["vssm.openmmlab"], allow_failed_imports=False)
custom_hooks = [dict(type="VSSMChannelCheck")]
width, height = 320, 240
data_preprocessor = dict(size=(height, width))
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained=None,
    backbone=dict(_delete_=True, type="VSSMBackbone", out_norm=True),
    decode_head=dict(
        num_classes=11,
        # By the overlap of each class, too: of the labels, a third is road and 0.3 % are bicyclists.
        loss_decode=[
            dict(type="CrossEntropyLoss", loss_name="loss_ce"),
            dict(type="LovaszLoss", reduction="none", loss_name="loss_lovasz"),
        ],
    ),
)
dataset = dict(
    type="BaseSegDataset",
    data_root="data/camvid/",
    img_suffix=".jpg",
    seg_map_suffix=".png",
    metainfo=dict(
        classes=(
            "sky",
            "building",
            "pole",
            "road",
            "pavement",
            "tree",
            "sign symbol",
            "fence",
            "car",
            "pedestrian",
            "bicyclist",
        ),
        palette=[
            [128, 128, 128],
            [128, 0, 0],
            [192, 192, 128],
            [128, 64, 128],
            [60, 40, 222],
            [128, 128, 0],
            [192, 128, 128],
            [64, 64, 128],
            [64, 0, 128],
            [64, 64, 0],
            [0, 128, 192],
        ],
    ),
)
train_dataloader = dict(
    batch_size=16,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/train", seg_map_path="annotations/train"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            # Never smaller than a crop: a network whose biases start at zero has gradients of 1e10 where it sees padding.
            dict(type="RandomResize", scale=(width, height), ratio_range=(1.0, 1.75), keep_ratio=True),
            dict(type="RandomCrop", crop_size=(height, width), cat_max_ratio=0.75),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PhotoMetricDistortion"),
            dict(type="PackSegInputs"),
        ],
    ),
)
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
val_dataloader = dict(
    batch_size=16,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/val", seg_map_path="annotations/val"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
train_cfg = dict(type="IterBasedTrainLoop", max_iters=1000, val_interval=1000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-4, weight_decay=0.05),
    constructor="VSSMLayerDecay",
    paramwise_cfg=dict(layer_decay=1.0),
    clip_grad=dict(max_norm=5),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=100, by_epoch=False),
    dict(type="CosineAnnealingLR", begin=100, end=1000, T_max=900, eta_min=0, by_epoch=False),
]
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1000),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
